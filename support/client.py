"""support/client.py is now tools/client.py; an import of the old name is one of it."""
from support.above import moved

moved(__name__, "tools.client")
