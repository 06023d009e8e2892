"""What stands above: loaded by its name when it is asked for, so that nothing here needs it."""

import importlib
import runpy
import sys
from types import ModuleType


class NotHere(FileNotFoundError):
    """What stands above is not in this copy of the project."""


def from_above(module: str, name: str):
    """What a module of another folder offers under this name, such as ("tools.report", "write_page").
    Raises NotHere where the project has no such module."""
    return getattr(import_above(module, name), name)


def import_above(module: str, what: str) -> ModuleType:
    """A module of another folder, in which `what` is. Raises NotHere where there is none."""
    # In a private package (tools/private.py) the other folders are in it too.
    name = __name__.removesuffix("support.above") + module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a package that the module imports
        folder, _, file = module.rpartition(".")
        raise NotHere(f"{what} is in {folder}/{file}.py, and this copy of the project has no such file: "
                      f"it needs the folder {folder}/ too") from error


def moved(old: str, new: str) -> None:
    """Let an old module's name stand for a new module: run it where the old one is run, else be it."""
    try:
        module = import_above(new, "what was here")
    except NotHere as error:
        if old == "__main__":
            raise SystemExit(f"error: {error}") from error
        raise
    if old == "__main__":
        del sys.modules[new]  # it is to run as the script
        runpy.run_module(new, run_name="__main__", alter_sys=True)
    else:
        sys.modules[old] = module
