"""support/memory.py is now tools/memory.py; an import of the old name is one of it."""
from support.above import moved

moved(__name__, "tools.memory")
