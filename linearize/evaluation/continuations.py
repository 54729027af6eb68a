"""Greedy continuations of beginnings of texts: made by transformers' own `generate`, compared, counted.

Continuations have a fixed number of tokens: an end-of-text token does not stop them, and what a folder says about
generation (sampling, penalties) is not followed. Columns then differ by their models alone.
"""

import random
import statistics
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from linearize.checkpoint.text import only
from linearize.errors import InputError
from linearize.evaluation import perplexity

SHORTEST, LONGEST = 64, 128
"""Tokens of a beginning that is continued."""
CHARACTERS = 16
"""Of text that are taken per token wanted: more than any tokenizer needs for prose."""

Advance = Callable[[int], None]


def beginnings(text: str, tokenizer: Any, count: int, seed: int) -> list[Tensor]:
    """Prompts from a text: each begins where a line does, and goes on over the lines that follow.

    Args:
        text: lines.
        tokenizer: of the models.
        count: how many; no line is taken twice.
        seed: of which lines, and of how many tokens each.

    Returns:
        int64 [tokens] each, SHORTEST to LONGEST tokens.

    Raises:
        InputError: the text has fewer lines with enough text after their start.
    """
    width, draw = LONGEST * CHARACTERS, random.Random(seed)
    lines = text.splitlines(keepends=True)
    starts = [at for at, line in zip(accumulate(map(len, lines), initial=0), lines, strict=False) if line.strip()]
    starts = [at for at in starts if at + width <= len(text)]
    if len(starts) < count:
        raise InputError(
            f"behaviour: {count} beginnings were asked for, but only {len(starts)} lines of the text have {width} "
            "characters after their start; use a longer text, or lower behaviour.prompts"
        )
    first = perplexity.beginning(tokenizer)
    prompts = []
    for start in draw.sample(starts, count):
        ids = tokenizer(text[start : start + width], add_special_tokens=False, verbose=False)["input_ids"]
        prompts.append(torch.tensor([*first, *ids][: draw.randint(SHORTEST, LONGEST)]))
    return prompts


class _Steps(BaseStreamer):
    """Tells a progress bar about the tokens of a batch."""

    def __init__(self, advance: Advance):
        self.advance = advance

    def put(self, value: Tensor) -> None:
        # transformers sends the prompt first, as rows.
        if value.ndim < 2:
            self.advance(value.numel())

    def end(self) -> None:
        pass


def greedy(
    model: PreTrainedModel, prompts: list[Tensor], tokens: int, pad: int, with_logits: bool, advance: Advance
) -> tuple[Tensor, Tensor]:
    """Continue one left-padded batch by the likeliest token, whatever it is.

    Args:
        model: a causal LM.
        prompts: int64 [tokens] each.
        tokens: how many new ones.
        pad: token that fills the batch up.
        with_logits: whether logits are kept.
        advance: called with the number of rows after each step.

    Returns:
        The new tokens, int64 [prompts, tokens], and their logits, fp32 [prompts, tokens, vocabulary] ([prompts, 0]
        without), on the CPU.
    """
    ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in prompts], batch_first=True, padding_side="left")
    plain = GenerationConfig(do_sample=False, pad_token_id=pad, return_dict_in_generate=True)
    with only(model, plain) as settings:
        settings.max_new_tokens, settings.output_logits = tokens, with_logits
        output: Any = model.generate(  # pyright: ignore[reportCallIssue]
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            streamer=_Steps(advance),
        )
    logits = torch.stack([x.cpu() for x in output.logits], 1) if with_logits else torch.empty(len(prompts), 0)
    return output.sequences[:, ids.shape[1] :].cpu(), logits


def cached_is_whole(model: PreTrainedModel, prompt: Tensor, tokens: Tensor, logits: Tensor) -> tuple[int, float]:
    """Compare the steps of one continuation with a single forward pass over it, without cache and padding.

    Args:
        model: a causal LM.
        prompt: int64 [P].
        tokens: int64 [n], what the cached steps picked.
        logits: fp32 [n, vocabulary], of those steps.

    Returns:
        At how many steps the whole forward picks the same token; the largest difference of the logits.
    """
    ids = torch.cat([prompt, tokens[:-1]])
    whole = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, len(prompt) - 1 :].float().cpu()
    return int((whole.argmax(-1) == tokens).sum()), float((whole - logits).abs().max())


def agreement(own: Tensor, reference: Tensor) -> list[int]:
    """Tokens before the first that differs, per row.

    Args:
        own: int64 [prompts, tokens].
        reference: of the same shape.
    """
    return (own == reference).cumprod(1).sum(1).tolist()


def repetition(rows: list[list[int]]) -> dict[str, float]:
    """The `repetition` entry of results.json, from continuations; rep-n of one with fewer than n tokens is 0."""

    def ngrams(row: list[int], n: int) -> list[tuple[int, ...]]:
        return list(zip(*(row[i:] for i in range(n)), strict=False))

    def distinct(grams: list[tuple[int, ...]]) -> float:
        return len({*grams}) / max(len(grams), 1)

    repeated = {n: [1 - distinct(own) if (own := ngrams(row, n)) else 0.0 for row in rows] for n in (2, 3, 4)}
    together = {n: [ngram for row in rows for ngram in ngrams(row, n)] for n in (1, 2)}
    return {
        **{f"rep_{n}": statistics.fmean(shares) for n, shares in repeated.items()},
        **{f"distinct_{n}": distinct(grams) for n, grams in together.items()},
    }
