"""Merging folds adapters into the weights they belong to, wherever the adapters come from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_converted
from helpers.training import recipe_for, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearize.checkpoint import adapters
from linearize.checkpoint.describe import inspect
from linearize.checkpoint.manifest import verify
from linearize.checkpoint.open import load, open_model
from linearize.errors import InputError
from linearize.recovery.merge import merge
from linearize.recovery.train import train


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_merged_adapters_give_the_same_logits(converted, text, tmp_path, method):
    peft = {"method": method, "r": 4, "alpha": 8, "roles": ["q", "v", "mlp"]}
    out = train(converted, recipe_for(text, lr=1e-2, peft=peft), None, tmp_path / "out")
    (out / "results.json").write_text("measured on these weights")
    merged = merge(out, tmp_path / "merged")
    ids = torch.randint(3, 300, (2, 40))
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, merged, converted)]
    with torch.no_grad():
        separate, together, start = (model(ids).logits for model in models)
    # fp32: x W + (x A) B against x (W + A B); logits are about 10.
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-5)
    assert (together - start).abs().max() > 1e-2
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "recipe.yaml"} <= names
    assert {"generation_config.json", "train_log.jsonl", "tb"} <= names and not names & {
        "adapter_config.json",
        "results.json",
    }
    assert models[1].config.linearize == models[2].config.linearize
    assert verify(merged) == []
    with pytest.raises(InputError, match="exists"):
        merge(out, merged)


def test_merging_into_bf16_rounds_once(text, tmp_path):
    folder = save_converted(tmp_path / "converted", dtype=torch.bfloat16)
    out = train(folder, recipe_for(text, lr=1e-2), None, tmp_path / "out")
    name = "model.layers.1.self_attn.v_proj"
    A, B = (weights(out)[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    base = load_file(folder / "model.safetensors")[f"{name}.weight"]
    found = load_file(merge(out, tmp_path / "merged") / "model.safetensors")[f"{name}.weight"]
    assert base.dtype == found.dtype == torch.bfloat16
    assert torch.equal(found, (base.float() + 2 * (B @ A)).bfloat16())


def test_merging_finds_the_model_beside_moved_adapters(text, tmp_path):
    save_converted(tmp_path / "a" / "converted")
    train(tmp_path / "a" / "converted", recipe_for(text, steps=1), None, tmp_path / "a" / "out")
    (tmp_path / "a").rename(tmp_path / "b")
    merge(tmp_path / "b" / "out", tmp_path / "merged")
    (tmp_path / "b" / "converted").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="converted, which is not there"):
        merge(tmp_path / "b" / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_merging_needs_adapters(converted, tmp_path):
    with pytest.raises(InputError, match="no adapters here"):
        merge(converted, tmp_path / "merged")


def logits(folder, ids):
    with torch.no_grad():
        return load(folder)[0](ids).logits


def test_downloaded_adapters_are_merged_without_logs(converted, text, tmp_path):
    """A push leaves TensorBoard's files out."""
    out = train(converted, recipe_for(text, lr=1e-2), None, tmp_path / "out")
    whole = merge(out, tmp_path / "whole")
    shutil.rmtree(out / "tb")
    merged, ids = merge(out, tmp_path / "merged"), torch.randint(3, 300, (1, 40))
    assert torch.equal(logits(merged, ids), logits(whole, ids)) and verify(merged) == []
    made = json.loads((merged / "linearize.json").read_text())
    assert made["training"]["stage"]["name"] == "distil" and made["source"]


@pytest.mark.parametrize("manifest", [True, False], ids=["a base of ours", "a base without manifest"])
def test_adapters_of_another_trainer_are_merged(text, tmp_path, manifest):
    """They come without manifest, recipe and tokenizer: what they do not bring along is the base's."""
    base = save_converted(tmp_path / "converted")
    if manifest:
        (base / "linearize.json").write_text(json.dumps({"source": {"id": "org/source"}, "files": {}}))
    model = adapters.attach(open_model(base), recipe_for(text).train[0].peft)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    model.save_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    ids = torch.randint(3, 300, (1, 40))
    with torch.no_grad():
        expected = model.eval()(ids).logits
    merged = merge(tmp_path / "out", tmp_path / "merged")
    # fp32: a sum of two products becomes one product with a sum.
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-4)
    made = json.loads((merged / "linearize.json").read_text())
    assert made["source"] == ({"id": "org/source"} if manifest else None) and "training" not in made
    assert (merged / "tokenizer.json").is_file() and verify(merged) == []


@pytest.mark.parametrize(("name", "content"), [("linearize.json", "[1"), ("linearize.json", "[1]")])
def test_a_damaged_manifest_is_one_paragraph_and_nothing_is_written(name: str, content: str, tmp_path: Path) -> None:
    regression = Path(__file__).parents[1] / "regression"
    for folder in ("adapters", "calibrated"):
        shutil.copytree(regression / folder, tmp_path / folder)
    (tmp_path / "adapters" / name).write_text(content)
    with pytest.raises(InputError, match=name):
        merge(tmp_path / "adapters", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for broken in ("{", "[]"):
        (tmp_path / "adapters" / "adapter_config.json").write_text(broken)
        with pytest.raises(InputError, match="adapter_config.json"):
            inspect(tmp_path / "adapters")
