"""What tests of several files share about conversion."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers import GenerationConfig

from linearize.checkpoint.shards import read_folder
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.model import mixers
from linearize.model.mixers import softmax
from linearize.recipe import load as recipes

CONTROL = {"name": "softmax"}


def recipe_of(source: Path | str, **settings: Any) -> recipes.Recipe:
    return recipes.from_dict({"source": {"id": str(source)}, "convert": {"mixer": CONTROL, **settings}})


def run(source: Path, out: Path, *, overwrite: bool = False, link: bool = False, **settings: Any) -> Path:
    return convert(locate(str(source)), recipe_of(source, **settings), out, overwrite, link=link)


def tensors_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Name -> dtype and bytes of every tensor, read from the files."""
    return {
        name: (tensor.dtype, tensor.file.read_bytes()[tensor.start : tensor.start + tensor.size])
        for name, tensor in read_folder(folder).items()
    }


@pytest.fixture(scope="session")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied bf16 Qwen3 in several shards, with the small files that real repositories carry."""
    folder = tmp_path_factory.mktemp("source") / "sharded"
    model = tiny_model("qwen3", tie_word_embeddings=True, dtype="bfloat16").to(torch.bfloat16)
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[1, 3])
    model.save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    for name in ("LICENSE", "README.md", "pytorch_model.bin", "modeling_tiny.py", ".gitattributes"):
        (folder / name).write_text(name)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def scaled_mixer(monkeypatch: pytest.MonkeyPatch) -> str:
    """A mixer with a weight of its own, registered for one test."""

    class Scaled(softmax.Mixer):
        name = "scaled"

        def __init__(self, config: Any, geometry: Any) -> None:
            super().__init__(config, geometry)
            self.scale = nn.Parameter(torch.full((geometry.heads,), 0.5))

    monkeypatch.setitem(mixers.MIXERS, "scaled", Scaled)
    return "scaled"
