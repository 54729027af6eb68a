"""Outliers are found where they are, in the student's and in the source's attention."""

from pathlib import Path

import pytest
import torch

from linearize.checkpoint.open import load
from linearize.errors import InputError
from linearize.evaluation import outliers as module
from linearize.evaluation.outliers import TOKENS, outliers, text
from linearize.verbs import inspect


def test_a_weight_that_makes_one_channel_huge_is_named(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SUPER", 7.0)  # a channel of few cannot stand out by more
    model, tokenizer = load(converted)
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] *= 1e4
        down.weight[3, 5] = 100.0
    model.save_pretrained(tmp_path / "super")
    tokenizer.save_pretrained(tmp_path / "super")
    rows = outliers(tmp_path / "super")
    (weight,) = rows[0]["super_weights"]
    assert (weight["row"], weight["column"]) == (3, 5) and rows[0]["source"]["super_weights"]
    assert rows[1]["super_weights"] == [] and rows[1]["activation"] > 2 * rows[0]["activation"]
    assert all(row["state"] >= 1 for row in rows) and "(3, 5)" in text(rows)


def test_inspect_shows_them(converted: Path) -> None:
    assert TOKENS == 1024
    shown = inspect(converted, outliers=True)
    assert [row["layer"] for row in shown["outliers"]] == [row["layer"] for row in shown["layers"]]
    assert "outliers" not in inspect(converted)


def test_a_plain_model_is_refused(llama_folder: Path) -> None:
    with pytest.raises(InputError, match="compared in linearized models"):
        outliers(llama_folder)
