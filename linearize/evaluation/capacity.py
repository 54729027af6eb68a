"""How many pairs of key and value a model remembers, and in how many bytes of cache.

A prompt is N pairs, filler until no window holds any of them, and the questions: two pairs again as an example, then up
to `ASKED` others, each asked after the answers before it. N times the share of right answers is the number of pairs
remembered; a model that forgets nothing remembers N, one whose memory is full as many as fit.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation import recall, stories
from linearize.evaluation.caches import cache_bytes
from linearize.evaluation.recall import WINDOW, Item
from linearize.evaluation.suite import CapacitySpec
from linearize.model.sizes import text_sizes
from linearize.model.transformers_api import cache_of

EXAMPLES, ASKED = 2, 8
MOST = len(stories.ADJECTIVES) * len(stories.NOUNS)


def check(spec: CapacitySpec) -> None:
    """Refuse numbers of pairs that cannot be asked.

    Raises:
        InputError: none, one given twice, or one that leaves nothing to ask or that there are not enough words for.
    """
    if not spec.pairs or len(set(spec.pairs)) < len(spec.pairs):
        raise InputError(f"capacity: pairs is {spec.pairs}; expected at least one number, each once")
    if min(spec.pairs) <= EXAMPLES or max(spec.pairs) > MOST:
        raise InputError(f"capacity: pairs is {spec.pairs}; expected numbers from {EXAMPLES + 1} to {MOST}")


def items(tokenizer: Any, pairs: int, window: int, seed: int, n: int) -> list[Item]:
    """Generate items; the same arguments give the same items.

    Args:
        tokenizer: of the model.
        pairs: in a prompt.
        window: tokens of filler behind them, or a sentence more.
        seed: of pairs and filler.
        n: how many items.
    """
    made = []
    for number in range(n):
        rng = random.Random(f"capacity {pairs} {seed} {number}")
        keys = rng.sample([" ".join(pair) for pair in itertools.product(stories.ADJECTIVES, stories.NOUNS)], pairs)
        values = {key: f" {rng.randint(10, 99)}" for key in keys}
        asked = rng.sample(keys, min(pairs, EXAMPLES + ASKED))
        filler, sentences = "", stories.sentences(rng)
        while len(tokenizer(filler, add_special_tokens=False)["input_ids"]) < window:
            filler += ("\n" if not filler else " ") + next(sentences)
        context = "\n".join(["All the numbers:", *(f"{key}:{values[key]}" for key in keys)]) + filler
        examples = [f"{key}:{values[key]}" for key in asked[:EXAMPLES]]
        first, *others = asked[EXAMPLES:]
        prompt = "\n".join([context, "Again:", *examples, f"{first}:"])
        more = tuple((f"\n{key}:", values[key]) for key in others)
        made.append(Item(prompt, values[first], more, len(context)))
    return made


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    spec: CapacitySpec,
    window: int | None,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """The `capacity` entry of a column of results.json; arguments as of `recall.measure`.

    Returns:
        See `linearize.results.schema.Capacity`; without the numbers of pairs that are longer than the model's context.
    """
    context = text_sizes(model.config).context
    cells = []
    for pairs in sorted(spec.pairs):
        asked = items(tokenizer, pairs, window or WINDOW, seed, spec.items)
        length = max(len(tokenizer(item.text, verbose=False)["input_ids"]) for item in asked)
        if context is not None and length > context:
            advance(spec.items)
            continue
        scores = recall.right(model, tokenizer, asked, batch_size, advance)
        before = tokenizer(asked[0].prompt[: asked[0].context], return_tensors="pt", verbose=False)["input_ids"]
        past = cache_of(model(input_ids=before.to(model.device), use_cache=True, logits_to_keep=1))
        cells.append({"pairs": pairs, "length": length, "cache_bytes": cache_bytes(past), **recall.summary(scores)})
    return cells


def total(spec: CapacitySpec) -> int:
    """Items that `measure` goes through."""
    return spec.items * len(spec.pairs)
