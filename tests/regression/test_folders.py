"""Folders that earlier versions wrote open for ever, with the logits that they had then.

Written by version 0.1.0 (format 1 of the `linearize` block, schema 1 of results) from a tiny random Llama of two
layers: gla: converted. calibrated: clusters with a gate. selected: one head softmax again. adapters: LoRA and mixers'
weights on `calibrated`. merged: these folded in. with-code: gated_deltanet, with the code as one file beside it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearize.checkpoint.manifest import verify
from linearize.checkpoint.open import load
from linearize.recipe import load as recipes
from linearize.recovery.merge import merge
from linearize.results import file as results_file

HERE = Path(__file__).parent
EXPECTED = load_file(HERE / "expected.safetensors")
FOLDERS = sorted(path.parent.name for path in HERE.glob("*/linearize.json"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of the last four tokens, [4, V]."""
    with torch.no_grad():
        return model(EXPECTED["ids"]).logits[0, -4:]


def check(name: str, found: torch.Tensor) -> None:
    # fp32 sums of another machine in another order: 1e-5 of the largest logit.
    torch.testing.assert_close(found, EXPECTED[name], rtol=0, atol=1e-5 * float(EXPECTED[name].abs().max()))


@pytest.mark.parametrize("name", FOLDERS)
def test_it_opens_with_the_logits_of_then(name: str) -> None:
    check(name, logits(load(HERE / name)[0]))


@pytest.mark.parametrize("name", FOLDERS)
def test_its_manifest_and_its_recipe_are_read(name: str) -> None:
    assert verify(HERE / name) == []
    assert recipes.load(HERE / name / "recipe.yaml").convert.mixer["window"] == 8


def test_adapters_of_then_are_merged_to_the_model_of_then(tmp_path: Path) -> None:
    merged = merge(HERE / "adapters", tmp_path / "merged")
    check("merged", logits(AutoModelForCausalLM.from_pretrained(merged)))


def test_code_of_then_opens_by_itself(tmp_path: Path) -> None:
    """In a process that cannot import this package."""
    shutil.copytree(HERE / "with-code", tmp_path / "model")
    program = (
        "import sys; sys.modules['linearize'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM; from safetensors.torch import load_file\n"
        "from safetensors.torch import save_file\n"
        "model = AutoModelForCausalLM.from_pretrained('model', trust_remote_code=True)\n"
        f"ids = load_file({str(HERE / 'expected.safetensors')!r})['ids']\n"
        "with torch.no_grad(): save_file({'logits': model(ids).logits[0, -4:].contiguous()}, 'logits.safetensors')"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check("with-code", load_file(tmp_path / "logits.safetensors")["logits"])


def test_results_of_then_are_read() -> None:
    results = results_file.read(HERE / "results.json")
    assert results["schema"] == 1 and results["columns"]["student"]["perplexity"]["value"] > 0
    assert json.loads((HERE / "results.json").read_text()) == results
