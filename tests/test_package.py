"""What a user installs: a wheel that brings its recipes and suites along and works from any folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from linearize.recipe import load as recipes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_content(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("recipes", "eval"):
        shipped = {f"linearize/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name for name in shipped if "__pycache__" not in name} <= set(names)
    assert "linearize/py.typed" in names
    allowed = ("linearize/", f"linearize-{'.'.join(wheel.name.split('-')[1:2])}.dist-info/")
    assert [name for name in names if not name.startswith(allowed)] == [], "nothing else at the top of site-packages"
    assert [name for name in names if "__pycache__" in name] == []


@pytest.mark.slow
def test_installed_wheel_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site-packages"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        paths = {"PYTHONPATH": str(target)}
        return subprocess.run(
            command, cwd=elsewhere, env={**environment, **paths}, check=True, capture_output=True, text=True
        ).stdout

    assert python("-c", "import linearize; print(linearize.__file__)").startswith(str(target))
    assert [row["name"] for row in json.loads(python("-m", "linearize.cli", "recipes", "--json"))] == recipes.names()
    found = python("-c", "from linearize.evaluation.suite import load; print(load('smoke').name)")
    assert found.strip() == "smoke"
    assert (target / "bin" / "linearize").is_file()
    assert list(elsewhere.iterdir()) == []


def test_the_scripts_of_the_readme_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    for script in ("scripts/demo.sh", "scripts/test.sh"):
        assert f"bash {script}" in readme and os.access(ROOT / script, os.X_OK)
        subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
