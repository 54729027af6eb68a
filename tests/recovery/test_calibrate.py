"""Calibration finds the numbers it is meant to find, changes nothing else, and survives the folder."""

import json

import pytest
import torch
from helpers.tiny import save_source, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recovery.calibrate import GRID, SCALES, calibrate, fit, scale

GLA = {"name": "gla", "window": 8, "sinks": 2}


def ids(blocks=3, length=60):
    return torch.randint(3, 384, (blocks, length))


class Probe(nn.Module):
    """Keeps what a layer of the source is asked, and what it answers."""

    def forward(self, q, k, v, context):
        self.asked, self.answer = (q, k, v, context), context.attend(q, k, v)
        return self.answer


def test_no_shift_of_the_grid_would_have_been_better():
    """Against a plain search: every head of every layer alone, each value tried in the layer itself."""
    model, x = linearize_(tiny_model("llama", layers=2), GLA), ids(1)
    gates = fit(model, x)
    assert all(model.config.linearize["layers"][str(i)]["calibrated"] for i in gates)
    mixers = [module.mixer for module in linearized_modules(model)]
    for module in linearized_modules(model):
        module.mixer = Probe()
    with torch.no_grad():
        model(x, use_cache=False)
    for module, mixer in zip(linearized_modules(model), mixers, strict=True):
        chosen, errors = mixer.gate.data.clone(), []
        for value in GRID:
            mixer.gate.data.fill_(value)
            with torch.no_grad():
                miss = mixer(*module.mixer.asked) - module.mixer.answer
            errors.append(miss.square().sum((0, 2, 3)))
        found = torch.stack(errors)
        at = found[[int((g == GRID).nonzero()) for g in chosen], range(len(chosen))]
        torch.testing.assert_close(at, found.amin(0), rtol=1e-4, atol=1e-6)


def test_a_calibrated_model_is_nearer_to_its_source_and_its_weights_are_the_same():
    model, x = linearize_(tiny_model("llama"), GLA), ids()
    before = {n: p.clone() for n, p in model.named_parameters()}

    def miss():
        with torch.no_grad():
            now = model(x, use_cache=False).logits
            with branches(model, "source"):
                return float((now - model(x, use_cache=False).logits).square().mean())

    first = miss()
    fit(model, x)
    assert miss() < first
    again = {n: p for n, p in model.named_parameters() if "mixer" not in n}
    assert again.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in again.items())


@pytest.mark.parametrize("mixer", [GLA, GLA | {"name": "gated_deltanet"}], ids=["a log weight", "a factor"])
def test_gates_go_as_far_as_other_text_wants(mixer):
    """Against plain models, one per scale; a fit that hurts (gates of the wrong sign) is taken back."""
    model, x = linearize_(tiny_model("llama", layers=2), mixer), ids(1)
    fit(model, x)
    for module in linearized_modules(model):
        module.mixer.gate.data.mul_(-3)
    fitted = [module.mixer.gate.data.clone() for module in linearized_modules(model)]
    found = {}
    for factor in SCALES:
        for module, gate in zip(linearized_modules(model), fitted, strict=True):
            module.mixer.gate.data.copy_(factor * gate)
        with torch.no_grad():
            logits = model(x, use_cache=False).logits[0, :-1]
        found[factor] = float(nn.functional.cross_entropy(logits, x[0, 1:]))
    for module, gate in zip(linearized_modules(model), fitted, strict=True):
        module.mixer.gate.data.copy_(gate)
    losses = scale(model, x[0])
    assert list(losses) == sorted(losses, key=losses.__getitem__)
    assert losses == pytest.approx(found, rel=1e-5)
    for module, gate in zip(linearized_modules(model), fitted, strict=True):
        assert torch.equal(module.mixer.gate.data, next(iter(losses)) * gate)


def test_decoding_knows_the_gate():
    model, x = linearize_(tiny_model("llama"), GLA), ids(2)
    fit(model, x)
    with torch.no_grad():
        full = model(x, use_cache=False).logits
        past = model(x[:, :30], use_cache=True).past_key_values
        steps = [model(x[:, t : t + 1], past_key_values=past).logits for t in range(30, 60)]
    assert float((torch.cat(steps, 1) - full[:, 30:]).abs().max()) < 1e-4


def test_a_folder_becomes_a_calibrated_folder(tmp_path):
    source = save_source(tmp_path / "source", layers=2)
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"The river rose for {i} days and nobody minded. " * 9}) + "\n" for i in range(30))
    )
    wanted = recipes.load(
        "smollm2-135m",
        ["convert.mixer.window=8", f"data=[{{path: {text}}}]", f"source={{id: {source}}}"],
    )
    convert(locate(str(source)), wanted, tmp_path / "converted")
    wanted = recipes.from_dict(recipes.to_dict(wanted), {"calibrate.tokens": 999, "calibrate.seq_len": 64})
    out = calibrate(tmp_path / "converted", wanted, tmp_path / "out", tokens=256)
    assert recipes.load(out / "recipe.yaml").calibrate == recipes.Calibrate(256, 64)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert any(bool(m.mixer.gate.any()) for m in linearized_modules(model))
    manifest = json.loads((out / "linearize.json").read_text())
    assert manifest["calibration"]["tokens"] == 256 and manifest["source"]
    assert set(manifest["calibration"]["loss_by_scale"]) == {str(factor) for factor in SCALES}
    with pytest.raises(InputError, match="calibrate: found .* 10 tokens do not fill one block"):
        recipes.from_dict(recipes.to_dict(wanted), {"calibrate.tokens": 10})
    with pytest.raises(InputError, match="do not fill one block"):
        calibrate(tmp_path / "converted", wanted, tmp_path / "other", tokens=10, seq_len=64)


def test_what_cannot_be_calibrated_says_so():
    with pytest.raises(InputError, match="has a memory"):
        fit(linearize_(tiny_model("llama", layers=2), {"name": "window", "window": 8}), ids())
    with pytest.raises(InputError, match="beyond window and sinks"):
        fit(linearize_(tiny_model("llama", layers=2), {"name": "gla", "window": 64}), ids())
