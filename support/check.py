"""python -m support.check is now python -m tools.check; the old name runs it."""
from support.above import moved

moved(__name__, "tools.check")
