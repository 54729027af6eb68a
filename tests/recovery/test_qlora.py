"""QLoRA: the frozen weights lie in 4 bits while adapters learn, and come back as they were when these are folded in."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import MIXER, tiny_model, tiny_tokenizer
from helpers.training import losses, recipe_for

from linearize.checkpoint.open import load
from linearize.checkpoint.quantize import held_bytes, linear_layers
from linearize.errors import InputError
from linearize.model.modeling import linearize_
from linearize.recovery import loop
from linearize.recovery.merge import merge
from linearize.recovery.train import train


def test_adapters_learn_beside_weights_in_4_bits(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    converted = tmp_path / "converted"
    linearize_(tiny_model(layers=2, hidden_size=64, intermediate_size=128), MIXER).save_pretrained(converted)
    tiny_tokenizer().save_pretrained(converted)
    students, opened = [], loop.open_student
    monkeypatch.setattr(loop, "open_student", lambda *given: students.append(opened(*given)) or students[-1])
    train(converted, recipe_for(text, steps=30, lm=0.5, lr=1e-2, quantize="nf4"), None, tmp_path / "out")
    lm, _ = losses(tmp_path / "out").T
    assert lm[-5:].mean() < lm[:5].mean() - 0.1
    merged, _ = load(merge(tmp_path / "out", tmp_path / "merged"))
    before, _ = load(converted)
    assert held_bytes(students[0]) < held_bytes(before)
    for path, layer in linear_layers(before).items():  # what is added has the rank of the adapters
        difference = merged.get_submodule(path).weight - layer.weight
        assert difference.dtype == layer.weight.dtype and int(torch.linalg.matrix_rank(difference, rtol=1e-3)) <= 4


@pytest.mark.parametrize("peft", [None, {"method": "full"}, {"method": "dora"}, {"method": "miss"}])
def test_what_does_not_go_with_4_bits_is_refused(text: Path, peft: dict | None) -> None:
    with pytest.raises(InputError, match="goes with peft.method lora or rslora"):
        recipe_for(text, quantize="nf4", peft=peft)
