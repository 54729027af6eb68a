"""Imports go one way, `model` is closed, and third parties enter by one door each.

python tests/test_layers.py    prints how many levels the imports have, and how many arrows join the rooms
"""

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "linearize"
# Lowest first. A room may import rooms of lower rows, and itself.
ROWS = [
    {"errors", "formats", "progress", "version"},
    {"model"},
    {"arguments", "autoload", "__init__"},
    {"recipe", "launch"},
    {"checkpoint", "serving"},
    {"conversion", "recovery", "results"},
    {"evaluation", "reporting", "hub", "generation"},
    {"pipeline"},
    {"verbs"},
    {"cli"},
    {"train"},
]
# Third party -> the only places that may import it.
DOORS = {
    "lm_eval": ("evaluation/tasks.py",),
    "peft": ("checkpoint/adapters.py", "recovery/merge.py"),
    "accelerate": ("recovery/train.py", "recovery/loop.py"),
    "datasets": ("recovery/documents.py",),
    "fla": ("model/ops/fla_backend.py",),
    "matplotlib": ("reporting/plot.py",),
    "typer": ("cli/",),
    "vllm": ("serving/",),
}
CLOSED = {"torch", "transformers", "linearize.errors", "linearize.model", "fla", "triton"}
"""What a checkpoint needs to run; fla is optional and imported inside functions."""
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}


@cache
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


def room(name: str) -> str:
    """The module or folder directly below the package that a full name belongs to; the package itself is __init__."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in ROOMS else "__init__"


def row(name: str) -> int:
    rows = [index for index, names in enumerate(ROWS) if name in names]
    assert rows, f"linearize/{name} has no row in ROWS"
    return rows[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    own = room(".".join(["linearize", *path.relative_to(PACKAGE).with_suffix("").parts]))
    for name in imports(path):
        if name.split(".")[0] != "linearize" or own == "__init__":
            continue
        other = room(name)
        assert other == own or row(other) < row(own), f"{path.name} imports {name}: {own} may not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_third_parties_enter_by_one_door(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for name in {name.split(".")[0] for name in imports(path)} & set(DOORS):
        assert place.startswith(DOORS[name]), f"{place} imports {name}; only {', '.join(DOORS[name])} may"


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").rglob("*.py")), ids=lambda path: path.name)
def test_the_model_is_closed(path: Path) -> None:
    for name in imports(path):
        allowed = name.split(".")[0] in {*sys.stdlib_module_names, *CLOSED}
        assert allowed or ".".join(name.split(".")[:2]) in CLOSED, f"{path.name} imports {name}"
    assert "from linearize" not in path.read_text(encoding="utf-8"), "relative imports only"


def test_the_rule_notices_a_wrong_import() -> None:
    assert imports(PACKAGE / "cli" / "__init__.py") | imports(PACKAGE / "cli" / "app.py") >= {
        "linearize.errors",
        "typer",
    }
    assert row(room("linearize.cli")) > row(room("linearize.conversion.plan")) > row(room("linearize.model.modeling"))


# --- how deep and how wide


def _files() -> dict[str, Path]:
    """Full name of every module of the package -> its file."""
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@cache
def arrows(running: bool = False) -> dict[str, set[str]]:
    """Module -> the modules of the package that it names; `running`: without those that only a type checker reads."""
    files = _files()
    graph = {}
    for name, path in files.items():
        inside = path.relative_to(PACKAGE.parent).with_suffix("").parts
        tree = ast.parse(path.read_text(encoding="utf-8"))
        unread = {
            id(node)
            for guard in ast.walk(tree)
            if running and isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.dump(guard.test)
            for node in ast.walk(guard)
        }
        targets: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in unread:
                continue
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*inside[: len(inside) - node.level] * bool(node.level), *filter(None, [node.module])])
                targets |= {full if (full := f"{base}.{alias.name}") in files else base for alias in node.names}
        graph[name] = (targets & files.keys()) - {name}
    return graph


@cache
def rooms() -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second."""
    return {(room(a), room(b)) for a, targets in arrows().items() for b in targets if room(a) != room(b)}


@cache
def level(name: str) -> int:
    """1 for a room that imports no other, else one more than the highest that it imports."""
    return 1 + max((level(other) for own, other in rooms() if own == name), default=0)


def test_the_house_stays_low_and_its_rooms_know_few_others() -> None:
    assert max(level(room(name)) for name in arrows()) <= 10
    assert len(rooms()) <= 80
    assert [pair for pair in rooms() if row(pair[0]) <= row(pair[1]) and pair[0] != "__init__"] == []


def test_no_file_imports_itself_through_others() -> None:
    TopologicalSorter(arrows(running=True)).prepare()  # raises CycleError, which names the circle


if __name__ == "__main__":
    print(f"levels: {max(level(room(name)) for name in arrows())}; arrows between rooms: {len(rooms())}")
