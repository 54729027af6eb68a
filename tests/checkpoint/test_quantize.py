"""Weights in 8 and 4 bits: near the model, smaller, and the same for a source, a student and adapters."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_model

from linearize.checkpoint import quantize
from linearize.checkpoint.open import load
from linearize.checkpoint.quantize import held_bytes, linear_layers, quantize_
from linearize.errors import InputError
from linearize.generation import generate
from linearize.model.modeling import linearize_

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
NEAR = {"int8": 0.02, "int4": 0.2, "nf4": 0.2}


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("mixer", [None, "gla", "clusters"])
def test_a_quantised_model_is_near_and_smaller(name: str, mixer: str | None) -> None:
    model = tiny_model(layers=2, hidden_size=64, intermediate_size=128).eval()
    if mixer:
        linearize_(model, {"name": mixer, "window": 8, "sinks": 2})
    ids, before, layers = torch.randint(4, 300, (2, 30)), held_bytes(model), linear_layers(model)
    inputs = {path: torch.randn(5, layer.in_features) for path, layer in layers.items()}
    with torch.no_grad():
        expected = {path: layer(inputs[path]) for path, layer in layers.items()}
        plain = sum(layer.weight.nbytes for layer in layers.values())
        quantize_(model, name)
        for path, y in expected.items():
            got = model.get_submodule(path)(inputs[path])
            assert 0 < (got - y).norm() / y.norm() < NEAR[name]
        assert model(ids).logits.isfinite().all()
    assert before - held_bytes(model) > 0.6 * plain
    assert model.generate(ids[:, :5], max_new_tokens=3, do_sample=False).shape == (2, 8)


def test_a_folder_opens_quantised(converted: Path) -> None:
    assert generate(converted, "The river", quantize="int8", max_new_tokens=3).new_tokens == [3]
    with pytest.raises(InputError, match="leave quantize out"):
        generate(converted, "The river", quantize="int8", lossless=True)


def test_layers_that_bitsandbytes_packs_wrongly_are_refused() -> None:
    with pytest.raises(InputError, match="48 inputs, no multiple of 64"):
        quantize_(tiny_model(layers=2, hidden_size=48), "nf4")


def test_what_cannot_be_is_refused(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="Did you mean 'int4'"):
        load(converted, quantize="int44")
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs bitsandbytes.*pip install 'linearize\[quantize\]'"):
        load(converted, quantize="nf4")
