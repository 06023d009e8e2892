"""support/adapters.py is now tools/adapters.py; an import of the old name is one of it."""
from support.above import moved

moved(__name__, "tools.adapters")
