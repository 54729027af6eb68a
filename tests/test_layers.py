"""Imports go down: command line -> run -> stages -> models -> mixers -> ops; third parties enter by one door each."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "linearize"
# Lowest first. A module may import modules of lower rows; of its own row only where they share a folder.
ROWS = [
    {"errors", "results_schema"},
    {"schema", "files"},
    {"results"},
    {"recipe", "table"},
    {"ops"},
    {"cache"},
    {"mixers"},
    {"archs"},
    {"modeling"},
    {"autoload"},
    {"__init__"},
    {"weights", "bundle"},
    {"sources"},
    {"inspection", "probe", "plot", "card", "data", "losses", "monitor", "adapters", "optim", "resume"},
    {"transfer", "memory", "prepare", "teacher"},
    {"convert", "calibrate", "select", "train", "evaluate", "hub", "generate", "export"},
    {"run", "costs"},
    {"cli"},
]
# Third party -> the only places that may import it.
DOORS = {
    "lm_eval": ("evaluate/compare.py",),
    "peft": ("adapters.py",),
    "accelerate": ("train.py",),
    "datasets": ("data.py",),
    "fla": ("ops/fla_backend.py",),
    "matplotlib": ("plot.py",),
    "typer": ("cli/",),
}
# Checking a recipe asks the mixer about its own settings; the import is inside the function that does it.
UPWARD = {("recipe", "mixers")}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at the top or inside a function."""
    inside = ["linearize", *path.relative_to(PACKAGE).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*inside[: -node.level]] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" if name == "linearize" else name for alias in node.names}
    return found


def part(name: str) -> str:
    """The module or folder directly below the package that a full name belongs to; the package itself is __init__."""
    pieces = name.split(".")
    known = {file.stem for file in PACKAGE.glob("*.py")} | {
        folder.name for folder in PACKAGE.iterdir() if folder.is_dir()
    }
    return pieces[1] if len(pieces) > 1 and pieces[1] in known else "__init__"


def row(name: str) -> int:
    places = [index for index, names in enumerate(ROWS) if name in names]
    assert places, f"linearize/{name} has no row in ROWS"
    return places[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path: Path) -> None:
    own = part(".".join(["linearize", *path.relative_to(PACKAGE).with_suffix("").parts]))
    for name in imports(path):
        if name.split(".")[0] != "linearize":
            continue
        other = part(name)
        allowed = other == own or row(other) < row(own) or (own, other) in UPWARD
        assert allowed, f"{path.name} imports {name}: {own} may not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_third_parties_enter_by_one_door(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for name in {name.split(".")[0] for name in imports(path)} & set(DOORS):
        assert place.startswith(DOORS[name]), f"{place} imports {name}; only {', '.join(DOORS[name])} may"


def test_the_rule_notices_a_wrong_import(tmp_path: Path) -> None:
    assert imports(PACKAGE / "cli" / "__init__.py") | imports(PACKAGE / "cli" / "app.py") >= {
        "linearize.errors",
        "typer",
    }
    assert row(part("linearize.cli")) > row(part("linearize.convert.plan")) > row(part("linearize.modeling"))
