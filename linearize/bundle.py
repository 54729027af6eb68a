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

import re
import sys
from types import ModuleType

_MODULES = {{}}
'''
_LOADER = '''

def _load():
    """Run the modules above, each after those that it imports, as a package of this file's own."""
    package = re.sub("[^a-zA-Z0-9_]", "_", f"{__name__}_runtime")
    for name in sorted(["", *_MODULES]):  # a package before what is in it
        full = f"{package}.{name}".rstrip(".")
        module = sys.modules[full] = ModuleType(full)
        module.__file__, module.__path__ = __file__, []
        parent, _, own = full.rpartition(".")
        if name:
            setattr(sys.modules[parent], own, module)
    for name, text in _MODULES.items():
        for line in ("from linearize.", "from linearize "):
            text = text.replace(line, line.replace("linearize", package))
        exec(compile(text, f"{__file__}:{name}", "exec"), sys.modules[f"{package}.{name}"].__dict__)
    return sys.modules[package]


_runtime = _load()
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
    parts = [_HEAD.format(version=__version__, mixers=", ".join(sorted(mixers)))]
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
    """Add a module to `files` after all that it imports; packages come before what is in them only where they are
    empty, as those of the mixers import their content."""
    if name in files:
        return
    tree = ast.parse(_source(name))
    for node in tree.body:
        for imported in _imported(node):
            if imported.rpartition(".")[2] in unused and name == "mixers":
                continue
            _collect(imported, files, unused)
    if "." in name and not _source(name.partition(".")[0]).strip():
        files.setdefault(name.partition(".")[0], ast.parse(""))
    files[name] = tree


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
        base = (node.module or "").partition(".")[2]
        taken = [f"{alias.name} = {'.'.join(filter(None, ('_runtime', base, alias.name)))}" for alias in node.names]
        lines[node.lineno - 1 : node.end_lineno] = taken
    return "\n".join(lines) + "\n"
