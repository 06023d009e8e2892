"""What a stub under an old name does. (It imports nothing, for tools/client.py needs numpy alone.)"""

import importlib
import runpy
import sys


def moved(old: str, new: str) -> None:
    """Let an old module's name stand for a new module: run it where the old one is run, else be it."""
    if old == "__main__":
        runpy.run_module(new, run_name="__main__", alter_sys=True)
    else:
        sys.modules[old] = importlib.import_module(new)
