"""This project as the package `descore`, in a process that has a `data` or a `model` of its own.

    import runpy
    runpy.run_path("/where/this/project/is/tools/private.py")
    from descore.infer import Scorer

Every module is there under its private name, such as `descore.data`; sys.path, and what the plain
names stand for, are left alone. A process that is started anew, rather than forked, has to run this
file too: put the lines above where its main module imports them.
"""

import ast
import sys
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path

NAME = "descore"
ROOT = Path(__file__).resolve().parent.parent
OURS = {path.stem for path in ROOT.glob("*.py")} | {"support", "tools"}


class Loader(SourceFileLoader):
    """Runs a module whose imports of the project's modules are of their private names."""

    def get_code(self, fullname: str):
        # Not from the bytecode beside the file, which imports the plain names.
        tree = ast.parse(self.get_data(self.path), self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                node.module = private(node.module)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in OURS:
                        alias.asname = alias.asname or alias.name
                        alias.name = private(alias.name)
        return compile(tree, self.path, "exec", dont_inherit=True)


class Finder:
    """Finds the package, and what is in it."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name == NAME:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations.append(str(ROOT))
            return spec
        if not name.startswith(f"{NAME}."):
            return None
        return FileFinder(path[0], (Loader, [".py"])).find_spec(name)


def private(module: str) -> str:
    """The name of a module within the package; another project's is left as it is."""
    return f"{NAME}.{module}" if module.partition(".")[0] in OURS else module


# Before the finder of plain modules, which would find these too.
sys.meta_path.insert(0, Finder)
