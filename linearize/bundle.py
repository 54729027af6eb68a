"""The code that a folder needs, as one file that it brings along: it opens with `trust_remote_code=True` where this
package is not installed.

The file is put together from the installed modules, as they are: modeling.py below, and what it imports as text above
it, without the mixers that the folder does not use. It needs torch and transformers, nothing else.
"""

import ast
from pathlib import Path
from typing import Any

from linearize import __version__
from linearize.mixers import MIXERS

NAME = "modeling_linearized"
FILE = f"{NAME}.py"
AUTO_MAP = {"AutoConfig": f"{NAME}.LinearizedConfig", "AutoModelForCausalLM": f"{NAME}.LinearizedForCausalLM"}

_ROOT = Path(__file__).parent
_HEAD = '''"""A linearized model: the source's own classes of transformers with other attention, for trust_remote_code.

Put together by linearize {version} (Apache-2.0) from its own modules, unchanged: those in _MODULES, and modeling.py
below them. Mixers here: {mixers}. With the package `linearize` installed this file is not read.
"""

import importlib
import importlib.util
import re
import sys

_PACKAGES = {packages}
_MODULES = {{"": ""}}
'''
_LOADER = '''

class _Finder:
    """Lets Python import the modules above, as a package of this file's own."""

    package = re.sub("[^a-zA-Z0-9_]", "_", f"{__name__}_runtime")

    def find_spec(self, fullname, path=None, target=None):
        name = fullname.removeprefix(self.package).removeprefix(".")
        if fullname.partition(".")[0] != self.package or name not in _MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=name in ("", *_PACKAGES))

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__.removeprefix(self.package).removeprefix(".")
        text = re.sub("^( *from )linearize(?=[. ])", rf"\\g<1>{self.package}", _MODULES[name], flags=re.MULTILINE)
        module.__file__ = __file__
        exec(compile(text, f"{__file__}:{name}", "exec"), module.__dict__)


sys.meta_path.insert(0, _Finder())


def _runtime(name):
    return importlib.import_module(f"{_Finder.package}.{name}")


'''


def code(mixers: set[str]) -> str:
    """The text of `modeling_linearized.py` for a model with these mixers.

    Args:
        mixers: names of the mixers in it.

    Returns:
        Python that defines LinearizedConfig and LinearizedForCausalLM.
    """
    files: dict[str, ast.Module] = {}
    # What is tried as a mixer at run time is found by name, so that the list of all mixers is cut to those.
    unused = {module.__module__.rpartition(".")[2] for name, module in MIXERS.items() if name not in mixers}
    _collect("modeling", files, unused)
    modules = [name for name in files if name != "modeling"]
    packages = sorted(name for name in modules if _path(name).name == "__init__.py")
    parts = [_HEAD.format(version=__version__, mixers=", ".join(sorted(mixers)), packages=packages)]
    for name in modules:
        text = _source(name)
        if name == "mixers":
            text = ast.unparse(_Without(unused & _absent(files)).visit(files[name])) + "\n"
        parts.append(f"\n_MODULES[{name!r}] = {_quoted(text)}\n")
    return "".join([*parts, _LOADER, "\n", _bare(_source("modeling"), files["modeling"])])


def auto_map(config: dict[str, Any]) -> dict[str, Any]:
    """A linearized configuration that names the code beside it."""
    return {**config, "auto_map": AUTO_MAP}


def mixers_of(config: dict[str, Any]) -> set[str]:
    """Names of the mixers in a linearized configuration; the control is always among them, for comparison."""
    return {"softmax", "window", *(values["name"] for values in config["linearize"]["layers"].values())}


def _path(name: str) -> Path:
    path = _ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _source(name: str) -> str:
    return _path(name).read_text(encoding="utf-8")


def _collect(name: str, files: dict[str, ast.Module], unused: set[str]) -> None:
    """Add a module, the packages it is in, and all that they import to `files`."""
    if not name or name in files:
        return
    files[name] = tree = ast.parse(_source(name))
    _collect(name.rpartition(".")[0], files, unused)
    for node in ast.walk(tree):
        for imported in _imported(node):
            if not (imported.rpartition(".")[2] in unused and name == "mixers"):
                _collect(imported, files, unused)


def _imported(node: ast.AST) -> list[str]:
    """Modules of this package that a statement imports."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("linearize"):
        return []
    base = node.module.partition(".")[2] if node.module else ""  # type: ignore[union-attr]
    names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
    modules = [name for name in names if _path(name).is_file()]
    return modules or [base]


def _absent(files: dict[str, ast.Module]) -> set[str]:
    """Mixers' modules that nothing pulled in."""
    return {path.stem for path in (_ROOT / "mixers").glob("*.py")} - {name.rpartition(".")[2] for name in files}


class _Without(ast.NodeTransformer):
    """Takes names out of import lists and tuples."""

    def __init__(self, names: set[str]):
        self.names = names

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        node.names = [alias for alias in node.names if alias.name not in self.names]
        return node

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        node.elts = [e for e in node.elts if not (isinstance(e, ast.Name) and e.id in self.names)]
        return node


def _quoted(text: str) -> str:
    return repr(text) if "'" * 3 in text or text.endswith(("\\", "'")) else f"r'''{text}'''"


def _bare(text: str, tree: ast.Module) -> str:
    """modeling.py with its imports from this package taken from the modules above instead."""
    lines = text.splitlines()
    for node in reversed(tree.body):
        if not isinstance(node, ast.ImportFrom) or not _imported(node):
            continue
        base, taken = (node.module or "").partition(".")[2], []
        for alias in node.names:
            whole = f"{base}.{alias.name}".lstrip(".")
            taken.append(
                f"{alias.name} = _runtime({whole!r})"
                if _path(whole).is_file()
                else f"{alias.name} = _runtime({base!r}).{alias.name}"
            )
        lines[node.lineno - 1 : node.end_lineno] = taken
    return "\n".join(lines) + "\n"
