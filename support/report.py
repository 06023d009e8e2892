"""python -m support.report is now python -m tools.report; the old name runs it."""
from support.above import moved

moved(__name__, "tools.report")
