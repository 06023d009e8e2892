"""What stands above: loaded by its name when it is asked for, so that nothing here needs it."""

import importlib
import runpy
import sys


class NotHere(FileNotFoundError):
    """What stands above is not in this copy of the project."""


def from_above(module: str, name: str):
    """What a module of another folder offers under this name, such as ("tools.report", "write_page").
    Raises NotHere where the project has no such module."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a package that the module imports
        folder, _, file = module.rpartition(".")
        raise NotHere(f"{name} is in {folder}/{file}.py, and this copy of the project has no such file: "
                      f"it needs the folder {folder}/ too") from error


def moved(old: str, new: str) -> None:
    """Let an old module's name stand for a new module: run it where the old one is run, else be it."""
    if old == "__main__":
        runpy.run_module(new, run_name="__main__", alter_sys=True)
    else:
        sys.modules[old] = importlib.import_module(new)
