"""Recurrences with exact tokens beside clusters: what fills the budget, and rows that other files hold."""

import json
from pathlib import Path

import pytest
import torch
from helpers.scripts import SCRIPTS, runner
from helpers.tiny import tiny_model

from linearize.model.modeling import linearize_
from linearize.model.sizes import state_bytes


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.mark.parametrize(("name", "key"), [("gla", "exact"), ("window", "window"), ("clusters", "clusters")])
def test_the_largest_number_fills_the_budget(name: str, key: str) -> None:
    import exact_store

    mixer = {"name": name, "combine": "none" if name == "window" else "memory", "sinks": 2, "window": 8}
    found = exact_store.fitted(tiny_model(layers=2), mixer, key, 60_000)
    sizes = []
    for more in (0, 8 if name == "clusters" else 1):
        model = linearize_(tiny_model(layers=2), found | {key: found[key] + more})
        sizes.append(state_bytes(model.config, exact_store.LENGTH)["linearized"])
    assert sizes[0] <= 60_000 < sizes[1]


def test_an_interval_holds_the_mean() -> None:
    import exact_store

    random = torch.Generator().manual_seed(0)
    source = torch.rand(8, 50, generator=random)
    mean, low, high = exact_store.interval(source + 0.1 + 0.05 * torch.randn(8, 1, generator=random), source, 0)
    assert 1 < low < mean < high < 1.3


def test_rows_of_other_files_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [
        {"row": row, "part": "perplexity", "text": "t", "over_source": [1.1, 1.0, 1.2], "number": 5, "bytes": 2**20}
        for row in ("gla + exact, int8", "source")
    ]
    (tmp_path / "a.json").write_text(json.dumps({"cells": cells}))
    (tmp_path / "words.txt").write_text("a text")
    run = runner("exact_store", tmp_path, monkeypatch)
    given = ("--text", tmp_path / "words.txt", "--add", tmp_path / "a.json", "--rows", "gla + exact, int8")
    assert [cell["row"] for cell in run(*given)["cells"]] == ["source", "gla + exact, int8"]
    assert "| gla + exact, int8 | 5 | 1.00 MiB | 1.100 (1.000 to 1.200) |" in (tmp_path / "tiny.md").read_text()
