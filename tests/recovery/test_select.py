"""The layers that become softmax again are those that cost most; the rest of the folder stays; prices are right."""

import json
from pathlib import Path

import pytest
import torch
from helpers.selection import LAYERS, ids, model, plain_kl, wanted, work
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from linearize import pipeline
from linearize.checkpoint import shards
from linearize.checkpoint.describe import inspect
from linearize.checkpoint.manifest import verify
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches
from linearize.recipe import load as recipes
from linearize.recovery.select import choose, evenly, greedy, measure, repeats, select
from linearize.recovery.train import train
from linearize.reporting import plot
from linearize.reporting.choices import selection

__all__ = ["ids", "model", "wanted", "work"]  # fixtures


def test_the_layers_that_cost_most_stay(model, ids):
    choice = choose(model, ids, 2, "sensitivity")
    plain = [plain_kl(ids, [i]) for i in range(LAYERS)]
    # fp32 sums over a vocabulary of 384, against fp64.
    assert [row["kl"] for row in choice["alone"]] == pytest.approx(plain, rel=1e-4)
    order = sorted(range(LAYERS), key=lambda i: -plain[i])
    assert choice["layers"] == sorted(order[:2])
    for k, row in enumerate(choice["budgets"]):
        assert row["keep"] == k and row["layers"] == sorted(order[:k])
        assert row["predicted_kl"] == pytest.approx(sum(plain[i] for i in order[k:]), rel=1e-4)
    measured = {row["keep"]: row["kl"] for row in choice["budgets"] if row["kl"] is not None}
    whole = plain_kl(ids, list(range(LAYERS)))
    assert measured == {0: pytest.approx(whole, rel=1e-4), 2: pytest.approx(plain_kl(ids, order[2:]), rel=1e-4)}
    assert all(module.branch == "all" for module in linearized_modules(model))


def test_greedy_takes_the_best_of_each_step(model, ids):
    layers = list(range(LAYERS))
    chosen = greedy(model, ids, layers, 3)
    left = [[j for j in layers if j not in chosen[:k]] for k in range(4)]
    for k in range(3):
        each = [plain_kl(ids, [j for j in left[k] if j != i]) for i in left[k]]
        assert left[k][each.index(min(each))] == chosen[k]
    _, kl = measure(model, ids, left[1:])
    assert kl[2] <= kl[1] <= kl[0]
    choice = choose(model, ids, 2, "greedy")
    assert choice["layers"] == sorted(greedy(model, ids[:1], layers, 2))


@torch.no_grad()
def test_recall_ranks_by_the_loss_on_what_is_said_again(model, ids):
    choice = choose(model, ids, 1, "recall")
    again, labels = repeats(ids)
    assert torch.equal(again[:, :36], ids[:, :36]) and torch.equal(again[:, 36:], ids[:, 12:24])
    assert (labels[:, :37] == -100).all() and torch.equal(labels[:, 37:], ids[:, 13:24])

    def loss(layers):
        with branches(model, "source"), branches(model, "all", layers):
            logits = model(again, use_cache=False).logits[:, 36:-1]
        return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 13:24].flatten()))

    kl = [row["kl"] for row in choice["alone"]]
    floor = sum(kl) / LAYERS
    scores = [max(0.0, loss([i]) - loss([])) / (kl[i] + floor) for i in range(LAYERS)]
    # Differences of losses near 8 in fp32: 1e-6, divided by KLs near 0.1.
    assert [row["score"] for row in choice["alone"]] == pytest.approx(scores, abs=1e-4)
    assert max(scores) > 1e-2 and choice["layers"] == [scores.index(max(scores))]


def test_uniform_is_even(model, ids):
    assert evenly(list(range(30)), 4) == [3, 11, 18, 26] and evenly([1, 5, 9], 3) == [1, 5, 9]
    assert choose(model, ids, 1, "uniform")["layers"] == [2]


def test_a_folder_keeps_all_but_the_mixers_of_the_chosen_layers(work, wanted, tmp_path):
    choice = select(work / "calibrated", wanted, tmp_path / "out", keep=2)
    assert len(choice["layers"]) == 2
    before, after = shards.read_folder(work / "calibrated"), shards.read_folder(tmp_path / "out")
    gone = [f"model.layers.{i}.self_attn.mixer.gate" for i in choice["layers"]]
    assert sorted(before.keys() - after.keys()) == sorted(gone) and not after.keys() - before.keys()

    def content(tensor):
        return tensor.dtype, tensor.shape, tensor.file.read_bytes()[tensor.start : tensor.start + tensor.size]

    assert all(content(tensor) == content(before[name]) for name, tensor in after.items())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [m.layer_idx for m in linearized_modules(opened)] == [i for i in range(LAYERS) if i not in choice["layers"]]
    assert all(m.mixer.config.calibrated for m in linearized_modules(opened))
    assert verify(tmp_path / "out") == []
    manifest = json.loads((tmp_path / "out" / "linearize.json").read_text())
    assert manifest["selection"]["layers"] == choice["layers"] and manifest["source"]
    assert manifest["calibration"]["tokens"] == 128
    assert recipes.load(tmp_path / "out" / "recipe.yaml").select == recipes.Select(tokens=96, seq_len=48, keep=2)
    price = choice["budgets"][2]["cache_32k"]
    at_32k = next(row for row in inspect(tmp_path / "out")["cache"]["contexts"] if row["context"] == 32768)
    assert price == at_32k["linearized"] and choice["budgets"][LAYERS]["cache_32k"] == at_32k["source_kv"]
    before = next(row for row in inspect(work / "calibrated")["cache"]["contexts"] if row["context"] == 32768)
    assert choice["budgets"][0]["cache_32k"] == before["linearized"]
    train(tmp_path / "out", wanted, None, tmp_path / "trained")
    assert (tmp_path / "trained" / "adapter_model.safetensors").is_file()


def test_all_layers_are_the_source_again(work, wanted, tmp_path, ids):
    # A mixer whose weights are a shard of their own, which the conversion writes beside an index.
    delta = recipes.from_dict(recipes.to_dict(wanted), {"convert.mixer.name": "delta_net"})
    convert(locate(str(work / "source")), delta, tmp_path / "converted")
    assert len(list((tmp_path / "converted").glob("*.safetensors"))) == 2
    select(tmp_path / "converted", delta, tmp_path / "out", keep=LAYERS, by="uniform")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert shards.read_folder(tmp_path / "out").keys() == shards.read_folder(work / "source").keys()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    source = AutoModelForCausalLM.from_pretrained(work / "source")
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, source(ids).logits)


def test_what_cannot_be_selected_says_so(work, wanted, model, ids):
    for keep, expected in ((5, "found 5; the folder has 4 replaced layers, so from 0 to 4"), (-1, "select.keep: .*-1")):
        with pytest.raises(InputError, match=expected) as error:
            select(work / "converted", wanted, keep=keep)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="select.by: found 'sensitivty'; did you mean 'sensitivity'"):
        select(work / "converted", wanted, by="sensitivty")
    with pytest.raises(InputError, match="96 tokens do not fill one block of 128"):
        select(work / "converted", wanted, seq_len=128)
    with pytest.raises(InputError, match="found 10; .* blocks of less than 11"):
        choose(model, ids[:, :10], 1, "sensitivity")
    with pytest.raises(InputError, match="found 20; .* blocks of less than 21"):
        choose(model, ids[:, :20], 1, "recall")


def test_what_is_shown(model, ids, tmp_path):
    found = {"keep": 1, "by": "recall", "per": "layers", "tokens": 96, "seq_len": 48, **choose(model, ids, 1, "recall")}
    lines = selection(found).splitlines()
    best = found["layers"][0]
    assert lines[0] == f"1 of {LAYERS} replaced layers by recall: softmax in {best}"
    assert lines[4].split() == [str(best), *lines[4].split()[1:3], "softmax"]
    assert lines[-1].endswith(f"0-{LAYERS - 1}") and lines[-LAYERS - 2].startswith("keep  predicted KL  measured KL")
    assert json.loads(json.dumps(found)) == found
    assert plot.draw_selection(found, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_selects_between_calibration_and_training(work, wanted, tmp_path, monkeypatch):
    wanted = recipes.from_dict(recipes.to_dict(wanted), {"calibrate.tokens": 64, "calibrate.seq_len": 64})
    # The comparison is another stage's matter.
    monkeypatch.setattr("linearize.evaluation.evaluate.evaluate", lambda folder, **given: {"model": str(folder)})
    said: list[str] = []
    assert pipeline.run(wanted, tmp_path, note=said.append) == {"model": str(tmp_path / "merged")}
    stages = ["0-calibrated", "0-converted", "0-selected", "1-distil", "merged"]
    assert sorted(path.name for path in tmp_path.iterdir()) == stages
    manifest = json.loads((tmp_path / "0-selected" / "linearize.json").read_text())
    assert manifest["calibration"]["tokens"] == 64
    assert "0-selected" in (tmp_path / "1-distil" / "adapter_config.json").read_text()
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())["linearize"]["layers"]
    assert sorted(map(int, merged)) == [i for i in range(LAYERS) if i not in manifest["selection"]["layers"]]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    pipeline.run(wanted, tmp_path, note=said.append)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert sum("finished earlier, kept" in line for line in said) == len(stages)
    changed = recipes.from_dict(recipes.to_dict(wanted), {"select.keep": 1})
    with pytest.raises(InputError, match="0-selected: was made with another recipe, which differs in select.keep"):
        pipeline.run(changed, tmp_path)
    said.clear()
    pipeline.run(changed, tmp_path, overwrite=True, note=said.append)
    assert [Path(line.split(":")[0]).name for line in said] == ["0-converted", "0-calibrated"]
