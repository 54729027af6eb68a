"""Perplexity of a text by position in the context: one plain loop, exactly specified, the same for every column.

1. The whole text is tokenized once, without special tokens, and cut into consecutive pieces of `length` tokens, or of
   `length - 1` where the tokenizer puts a beginning-of-sequence token in front of text; that token then starts each
   block. What is left at the end is dropped.
2. Of the N pieces, `blocks` are taken, evenly spread: number floor(i N / blocks) for i = 0 … blocks - 1.
3. A block of up to PIECE tokens is one forward pass; a longer one is read in pieces of PIECE tokens, each continuing
   the cache of those before it: the logits of a whole document would take more memory than the model. The token at
   position t = 1 … length - 1 is predicted from the t tokens before it; its loss is -log p in nats, from the logits in
   float32.
4. Buckets split the positions at 1, W, 2 W, 4 W, … up to `length`, W being the window. In the first one the window sees
   all that the source sees; the others are beyond it. Perplexity is exp of the mean loss over all tokens of all blocks.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.model.transformers_api import CACHE, cache_of

PIECE = 2048
"""Tokens of one forward pass."""
STRETCH = 512
"""Predictions whose logits are float32 at the same time."""


def beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer puts one in front of text."""
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def cut(text: str, tokenizer: Any, length: int, blocks: int) -> Tensor:
    """Tokenize a text and take evenly spread blocks of it.

    Args:
        text: the text.
        tokenizer: of the models.
        length: tokens of a block, with the beginning-of-sequence token where there is one.
        blocks: how many.

    Returns:
        int64 [blocks, length].

    Raises:
        InputError: the text is too short.
    """
    # verbose=False: a text longer than the model's context is no mistake here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = beginning(tokenizer)
    piece = length - len(first)
    count = len(ids) // piece
    if count < blocks:
        raise InputError(
            f"perplexity: the text has {len(ids)} tokens, which make {count} blocks of {length}; {blocks} were asked "
            "for; use fewer or shorter blocks"
        )
    starts = [i * count // blocks * piece for i in range(blocks)]
    return torch.tensor([first + ids[start : start + piece] for start in starts])


def edges(length: int, window: int | None) -> list[int]:
    """Borders of the buckets: 1, W, 2 W, 4 W, … and `length`.

    Args:
        length: tokens of a block.
        window: W; None for 64.
    """
    borders, border = [1], window or 64
    while border < length:
        if border > 1:
            borders.append(border)
        border *= 2
    return [*borders, length]


def pieces(model: PreTrainedModel, block: Tensor, ends: list[int], cached: bool) -> Iterator[tuple[Tensor, Any]]:
    """Read one text piece by piece, each piece continuing the cache of those before it.

    Args:
        model: a causal LM.
        block: int64 [tokens].
        ends: where the pieces end, rising; the last one is the number of tokens.
        cached: whether a cache is kept; must be where there are several pieces.

    Yields:
        Logits [n, vocabulary] of a piece, in the model's dtype, and the cache after it (None if none is kept).
    """
    past = None
    for start, end in pairwise([0, *ends]):
        ids = block[None, start:end].to(model.device)
        output = model(input_ids=ids, **{CACHE: past}, use_cache=cached)
        past = cache_of(output)
        yield output.logits[0], past


def predictions(model: PreTrainedModel, block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What a model predicts in one block, from the first token on, stretch by stretch.

    Args:
        model: a causal LM.
        block: int64 [length].

    Yields:
        fp32 logits [n, vocabulary] and the tokens [n] they predict, on the model's device; length - 1 in all.
    """
    ends = [*range(PIECE, len(block), PIECE), len(block)]
    start = 1
    for logits, _ in pieces(model, block, ends, cached=len(ends) > 1):
        tokens = block[start : start + len(logits)].to(logits.device)
        start += len(logits)
        for part, target in zip(logits[: len(tokens)].split(STRETCH), tokens.split(STRETCH), strict=True):
            yield part.float(), target


@torch.inference_mode()
def losses(model: PreTrainedModel, ids: Tensor, advance: Callable[[int], None] = lambda count: None) -> Tensor:
    """Loss of every token but the first of each block.

    Args:
        model: a causal LM; evaluated as it is, block by block.
        ids: int64 [blocks, length].
        advance: called with 1 after each block.

    Returns:
        fp32 [blocks, length - 1], nats; column t - 1 belongs to position t.

    Raises:
        InputError: a loss is not finite.
    """
    rows = []
    for block in ids:
        row = [F.cross_entropy(logits, tokens, reduction="none") for logits, tokens in predictions(model, block)]
        rows.append(torch.cat(row).cpu())
        if not rows[-1].isfinite().all():
            position = int((~rows[-1].isfinite()).nonzero()[0]) + 1
            raise InputError(
                f"perplexity: the model's prediction after {position} tokens is not a number; its weights are damaged "
                "or its dtype is too narrow: check them with `linearize inspect`, or evaluate in float32 (--dtype "
                "float32)"
            )
        advance(1)
    return torch.stack(rows)


def by_position(loss: Tensor, borders: list[int]) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Summarise losses by bucket.

    Args:
        loss: fp32 [blocks, length - 1], see `losses`.
        borders: see `edges`.

    Returns:
        One {start, end, ppl, tokens} per bucket, positions start <= t < end; and the mean loss [blocks][buckets].
    """
    # Summed in float64: means of thousands of float32 losses then agree to the last printed digit, whatever the order.
    parts = [loss[:, start - 1 : end - 1].double() for start, end in pairwise(borders)]
    table = [
        {"start": start, "end": end, "ppl": math.exp(part.mean()), "tokens": part.numel()}
        for (start, end), part in zip(pairwise(borders), parts, strict=True)
    ]
    return table, torch.stack([part.mean(1) for part in parts], dim=1).tolist()


def measure(
    model: PreTrainedModel, texts: list[tuple[str, Tensor]], window: int | None, advance: Callable[[int], None]
) -> dict[str, Any]:
    """The `perplexity` entry of a column of results.json.

    Args:
        model: a causal LM.
        texts: name and blocks, int64 [blocks, length], of each text; the first one gives the headline value.
        window: W of the buckets.
        advance: called with 1 after each block.

    Returns:
        See `linearize.results.schema.Perplexity`.
    """
    entries = []
    for name, ids in texts:
        loss = losses(model, ids, advance)
        table, per_block = by_position(loss, edges(ids.shape[1], window))
        entries.append(
            {
                "text": name,
                "length": ids.shape[1],
                "blocks": ids.shape[0],
                "value": math.exp(loss.double().mean()),
                "tokens": loss.numel(),
                "by_position": table,
                "losses": per_block,
            }
        )
    longest = max(entries, key=lambda entry: entry["length"])
    first = entries[0]
    return {"value": first["value"], "tokens": first["tokens"], "by_position": longest["by_position"], "texts": entries}
