"""python -m support.filter is now python -m tools.filter; the old name runs it."""
from support.above import moved

moved(__name__, "tools.filter")
