"""python -m support.pairs is now python -m tools.pairs; the old name runs it."""
from support.above import moved

moved(__name__, "tools.pairs")
