"""python -m support.convert is now python -m tools.convert; the old name runs it."""
from support.above import moved

moved(__name__, "tools.convert")
