"""Heads that stay softmax are those that cost most alone; the folder has them, and costs what was said."""

import json

import pytest
import torch
from helpers.selection import GLA, LAYERS, ids, model, plain_kl, wanted, work
from helpers.tiny import tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from linearize.checkpoint import shards
from linearize.checkpoint.describe import inspect
from linearize.checkpoint.manifest import verify
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recovery.select import choose, select
from linearize.recovery.train import train
from linearize.reporting import plot
from linearize.reporting.choices import selection

__all__ = ["ids", "model", "wanted", "work"]  # fixtures
G = 2


@torch.no_grad()
def converted_kl(ids, replaced: dict[int, list[int]]) -> float:
    """Of a model whose layers have the mixer in these key/value heads only, written out."""
    source = tiny_model("llama", LAYERS)
    p = source(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    for layer, heads in replaced.items():
        linearize_(source, {**GLA, "softmax_heads": [h for h in range(G) if h not in heads]}, [layer])
    q = source(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return float(F.kl_div(q, p, log_target=True, reduction="sum")) / p[..., 0].numel()


def test_the_heads_that_cost_most_stay(model, ids, tmp_path):
    found = choose(model, ids, 3, "sensitivity", "heads")
    alone = {(i, h): converted_kl(ids, {i: [h]}) for i in range(LAYERS) for h in range(G)}
    assert [(row["layer"], row["head"]) for row in found["alone"]] == list(alone)
    # fp32 sums over a vocabulary of 384, against fp64.
    assert [row["kl"] for row in found["alone"]] == pytest.approx(list(alone.values()), rel=1e-3, abs=1e-6)
    best = sorted(alone, key=lambda part: -alone[part])[:3]
    assert sorted((int(i), h) for i, heads in found["heads"].items() for h in heads) == sorted(best)
    left = {i: [h for h in range(G) if (i, h) not in best] for i in range(LAYERS)}
    measured = {row["keep"]: row["kl"] for row in found["budgets"] if row["kl"] is not None}
    whole = plain_kl(ids, list(range(LAYERS)))
    assert measured[0] == pytest.approx(whole, rel=1e-3)
    assert measured[3] == pytest.approx(converted_kl(ids, {i: hs for i, hs in left.items() if hs}), rel=1e-3)
    assert [row["predicted_kl"] for row in found["budgets"]][-1] == 0
    sizes = [row["cache_32k"] for row in found["budgets"]]
    assert all(a < b for a, b in zip(sizes, sizes[1:], strict=False))
    assert all(module.mixer.name == "gla" and module.branch == "all" for module in linearized_modules(model))
    found = {"keep": 3, "by": "sensitivity", "per": "heads", "tokens": 96, "seq_len": 48, **found}
    lines = selection(found).splitlines()
    assert lines[0].startswith(f"3 of {LAYERS * G} replaced heads by sensitivity: softmax in ")
    assert lines[4].split()[:2] == [str(x) for x in best[0]] and lines[4].endswith("softmax")
    assert lines[-1].endswith("0:0,1 1:0,1 2:0,1 3:0,1")
    assert json.loads(json.dumps(found)) == found
    assert plot.draw_selection(found, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("by", ["uniform", "greedy", "recall"])
def test_other_criteria_choose_heads_too(model, ids, by):
    assert sum(map(len, choose(model, ids, 2, by, "heads")["heads"].values())) == 2


def test_a_folder_has_the_heads_and_costs_what_was_said(work, wanted, tmp_path):
    choice = select(work / "calibrated", wanted, tmp_path / "out", keep=5, per="heads")
    heads = {int(i): hs for i, hs in choice["heads"].items()}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = {m.layer_idx: m for m in linearized_modules(opened)}
    assert {i: list(m.softmax_heads) for i, m in layers.items() if m.softmax_heads} == {
        i: hs for i, hs in heads.items() if len(hs) < G
    }
    assert {i for i, hs in heads.items() if len(hs) == G} == set(range(LAYERS)) - set(layers)
    gates = {
        m.layer_idx: m.mixer.gate for m in linearized_modules(AutoModelForCausalLM.from_pretrained(work / "calibrated"))
    }
    for i, module in layers.items():
        left = [h for h in range(G) if h not in heads.get(i, [])]
        assert torch.equal(module.mixer.gate, gates[i].view(G, -1)[left].flatten())
    assert verify(tmp_path / "out") == []
    at_32k = next(row for row in inspect(tmp_path / "out")["cache"]["contexts"] if row["context"] == 32768)
    assert choice["budgets"][5]["cache_32k"] == at_32k["linearized"]
    before, after = shards.read_folder(work / "calibrated"), shards.read_folder(tmp_path / "out")
    for name, tensor in after.items():
        if ".mixer." not in name:
            old = before[name]
            content = [t.file.read_bytes()[t.start : t.start + t.size] for t in (old, tensor)]
            assert content[0] == content[1]
    assert recipes.load(tmp_path / "out" / "recipe.yaml").select.per == "heads"
    train(tmp_path / "out", wanted, None, tmp_path / "trained")
    with pytest.raises(InputError, match="some heads stay softmax already"):
        select(tmp_path / "out", wanted, keep=1, per="heads")
    assert len(select(tmp_path / "out", wanted, keep=1)["layers"]) == 1


def test_feature_maps_lose_the_rows_of_the_heads(work, wanted, tmp_path):
    hedgehog = recipes.from_dict(recipes.to_dict(wanted), {"convert.mixer.name": "hedgehog"})
    convert(locate(str(work / "source")), hedgehog, tmp_path / "converted")
    choice = select(tmp_path / "converted", hedgehog, tmp_path / "out", keep=1, per="heads")
    (layer,) = choice["heads"]
    opened = {m.layer_idx: m.mixer for m in linearized_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))}
    assert opened[int(layer)].query_map.shape == (2, 16, 32 // 2) and opened[int(layer)].key_map.shape == (1, 16, 16)
    assert verify(tmp_path / "out") == []


def test_what_cannot_be_selected_says_so(work, wanted):
    with pytest.raises(InputError, match="found 9; the folder has 8 replaced heads, so from 0 to 8"):
        select(work / "converted", wanted, keep=9, per="heads")
    with pytest.raises(InputError, match="select.per: found 'head'; did you mean 'heads'"):
        select(work / "converted", wanted, per="head")


def test_heads_are_chosen_where_the_source_sees_the_whole_text(ids):
    sliding = linearize_(tiny_model("mistral", layers=2, sliding_window=8), GLA)
    with pytest.raises(InputError, match=r"slides a window in every replaced layer.*per: layers"):
        choose(sliding, ids, 1, "sensitivity", "heads")
    mixed = linearize_(tiny_model("gemma3_text", layers=6, sliding_window=8), GLA)
    choice = choose(mixed, ids, 1, "sensitivity", "heads")
    assert {row["layer"] for row in choice["alone"]} == {5}, "only every sixth layer of Gemma 3 sees the whole text"
