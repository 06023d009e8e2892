"""What stands above: loaded by its name when it is asked for, so that nothing here needs it."""

import importlib
import runpy
import sys


def from_above(module: str, name: str):
    """What a module of another folder offers under this name, such as ("tools.report", "write_page").
    Raises DataError where the project has no such folder or module."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a package that the module imports
        from data import DataError

        folder = module.partition(".")[0]
        raise DataError(f"{name} is in {module.replace('.', '/')}.py, and this copy of the project has no "
                        f"such file: it needs the folder {folder}/ too") from error


def moved(old: str, new: str) -> None:
    """Let an old module's name stand for a new module: run it where the old one is run, else be it."""
    if old == "__main__":
        runpy.run_module(new, run_name="__main__", alter_sys=True)
    else:
        sys.modules[old] = importlib.import_module(new)
