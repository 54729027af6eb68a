"""Memories with the same bytes: what fills the budget, intervals, and results that are joined."""

import json
from pathlib import Path

import pytest
import torch
from helpers.scripts import SCRIPTS, runner
from helpers.tiny import TEXT, save_source, tiny_model

from linearize.model.modeling import linearize_
from linearize.model.sizes import state_bytes

MACHINE = {"cpu": "a machine", "commit": "abc"}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.mark.parametrize(("name", "key"), [("gla", "exact"), ("window", "window"), ("clusters", "clusters")])
def test_the_largest_number_fills_the_budget(name: str, key: str) -> None:
    import bench_memory

    mixer = {"name": name, "combine": "none" if name == "window" else "memory", "sinks": 2, "window": 8}
    largest = bench_memory.fitted(tiny_model(layers=2), mixer, key, 60_000)
    sizes = []
    for more in (0, 8 if name == "clusters" else 1):
        model = linearize_(tiny_model(layers=2), largest | {key: largest[key] + more})
        sizes.append(state_bytes(model.config, bench_memory.LENGTH)["linearized"])
    assert sizes[0] <= 60_000 < sizes[1]


def test_an_interval_holds_the_mean() -> None:
    import bench_memory

    random = torch.Generator().manual_seed(0)
    source = torch.rand(8, 50, generator=random)
    mean, low, high = bench_memory.interval(source + 0.1 + 0.05 * torch.randn(8, 1, generator=random), source, 0)
    assert 1 < low < mean < high < 1.3


def test_results_measured_apart_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(name: str, *rows: tuple[str, float]) -> Path:
        cells = [
            {"row": row, "part": "perplexity", "text": "t", "over_source": [x, 1.0, 1.2], "number": 5, "bytes": 2**20}
            for row, x in rows
        ]
        settings = {"threads": 1, "seed": 0, "blocks": 8, "length": 32, "items": 2, "rows": [row for row, _ in rows]}
        (tmp_path / name).write_text(json.dumps({"cells": cells, "settings": settings, "environment": MACHINE}))
        return tmp_path / name

    first, second = part("a", ("gla", 1.1), ("source", 1.0)), part("b", ("gla", 1.2), ("kda", 1.3))
    run = runner("bench_memory", tmp_path, monkeypatch)
    joined = run("--add", first, second)["cells"]
    assert [(cell["row"], cell["over_source"][0]) for cell in joined] == [("source", 1.0), ("gla", 1.2), ("kda", 1.3)]
    table = (tmp_path / "tiny.md").read_text()
    assert "| kda | 5 | 1.00 MiB | 1.300 (1.000 to 1.200) |" in table
    assert "\nJoined later, gla; kda: a machine, commit abc.\n" in table
    again = run("--add", tmp_path / "tiny.json", second)
    assert [more["rows"] for more in again["added"]] == [["gla", "kda"]], "what was measured anew is named once"


def test_rows_texts_and_tasks_are_measured_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source(tmp_path / "source", layers=2)
    recipe = {"source": {"id": str(source)}, "convert": {"mixer": {"name": "gla", "window": 8, "sinks": 2}}}
    (tmp_path / "base.yaml").write_text(json.dumps(recipe))
    (tmp_path / "words.txt").write_text(TEXT * 2)
    run = runner("bench_memory", tmp_path, monkeypatch)
    files = ("--recipe", tmp_path / "base.yaml", "--texts", tmp_path / "words.txt")
    given = (*files, "--caches", "24KiB", "--rows", "a longer window", "clusters, int8")
    small = ("--length", 64, "--blocks", 2, "--items", 2, "--tasks", "multikey", "--back", 40)
    cells = run(*given, *small, "--kl", 1)["cells"]
    names, parts = ("source", "a longer window", "clusters, int8"), ("perplexity", "recall", "kl")
    expected = {(row, part) for row in names for part in parts} - {("source", "kl")}
    assert {(cell["row"], cell["part"]) for cell in cells} == expected
    nats = {cell["row"]: cell["kl"] for cell in cells if cell["part"] == "kl" and cell["text"] == "words"}
    assert abs(nats["a longer window"][0]) < 1e-6 < nats["clusters, int8"][0] < 0.01
    assert all(cell.get("over_source", [1.0] * 3) == [1.0] * 3 for cell in cells if cell["row"] == "source")
    assert all(cell["bytes"] <= 24 * 1024 for cell in cells if cell["row"] != "source")
    cells = run(*given, "--length", 160, "--speed", 4)["cells"]
    assert [cell["row"] for cell in cells] == ["source", "a longer window", "clusters, int8"]
    grows = {cell["row"]: cell["cache_bytes"] for cell in cells}
    assert grows["a longer window"] < grows["source"] and all(cell["token_seconds"] > 0 for cell in cells)
    assert "| ms a token | s to read |" in (tmp_path / "tiny.md").read_text()
