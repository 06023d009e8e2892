"""python -m support.probe is now python -m tools.probe; the old name runs it."""
from support.above import moved

moved(__name__, "tools.probe")
