"""python -m support.annotate is now python -m tools.annotate; the old name runs it."""
from support.above import moved

moved(__name__, "tools.annotate")
