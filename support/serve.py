"""python -m support.serve is now python -m tools.serve; the old name runs it."""
from support.above import moved

moved(__name__, "tools.serve")
