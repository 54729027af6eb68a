"""Lossless mode measured: the source alone, drafted by the student, and the student alone, on the same text.

Each context is read once per model; then all write the same number of tokens behind copies of what was read, in turns.
Seconds are those of writing, from the first new token on. `lossless` is what one call of `generate` does: what the
student reads before it can draft is within its seconds, and told beside. `resumed` finds the student's state of the
text beside the source's cache, as a kept conversation does. `forced` does too, and drafts four tokens in every round,
whether it pays or not: how many are kept there is what the student is worth as a draft, on any machine.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from linearize.checkpoint.atomic import write_text
from linearize.checkpoint.open import load
from linearize.checkpoint.replacing import check_file_output
from linearize.checkpoint.text import only
from linearize.errors import InputError
from linearize.generation.decoder import Clock
from linearize.generation.lossless import Lossless, Pace
from linearize.model.transformers_api import CACHE

TURNS = 5
FORCED = 4
WAYS = ["source", "lossless", "resumed", "forced", "student"]
DRAFTED = WAYS[1:4]


def bench_lossless(
    folder: str | Path,
    text: str,
    contexts: Sequence[int] = (512, 2048, 8192),
    tokens: int = 128,
    dtype: str = "auto",
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure what drafting brings, by context length.

    Args:
        folder: linearized folder, adapter folder or Hub id.
        text: what is continued; longer than the longest context.
        contexts: tokens of the text before the first new one.
        tokens: that are written, greedily.
        dtype: of the weights.
        out: results file; None writes none.
        say: is told a line about each context.

    Returns:
        settings, and rows: context, seconds and tokens per second of each, their ratios to the source, of both ways of
        drafting tokens per pass, drafts and the share of them that was kept, whether the text is the source's, and,
        where it is not, how near a tie the two tokens were.

    Raises:
        InputError: the folder cannot draft, or the text is shorter than a context.
    """
    if out is not None:
        check_file_output(Path(out), "what `bench --lossless` writes", _ours)
    model, tokenizer = load(folder, dtype)
    drafting = Lossless.of(folder, model)
    ids = torch.tensor([tokenizer(text[: 12 * max(contexts)], verbose=False)["input_ids"]], device=model.device)
    if ids.shape[1] < max(contexts):
        raise InputError(f"contexts: found {max(contexts)}; the text has {ids.shape[1]} tokens")
    settings = {
        "folder": str(folder),
        "text": sha256(text.encode()).hexdigest(),
        "tokens": tokens,
        "turns": TURNS,
        "dtype": str(model.dtype),
    }
    results: dict[str, Any] = {"settings": settings | {"threads": torch.get_num_threads()}, "rows": []}
    for context in contexts:
        row = _context(drafting, ids[:, :context], tokens)
        results["rows"].append(row)
        say(line(row))
        if out is not None:
            write_text(Path(out), json.dumps(results, indent=1) + "\n")
    return results


def _ours(content: bytes) -> bool:
    with suppress(ValueError, TypeError, RecursionError):
        return {"settings", "rows"} == set(json.loads(content))
    return False


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    same = "the source's text" if row["same"] else f"differs at a tie of {row['tie']['gap']:.2g}"
    return (
        f"{row['context']:>7} tokens: source {row['source']['tokens_per_second']:.1f} tokens/s, lossless "
        f"{row['ratio']['lossless']:.2f} x ({row['per_pass']['lossless']:.2f} tokens per pass), with the student's "
        f"state at hand {row['ratio']['resumed']:.2f} x ({row['per_pass']['resumed']:.2f}; "
        f"{row['kept']['resumed']:.0%} of {row['drafted']['resumed']} drafts kept), always {FORCED} drafts "
        f"{row['ratio']['forced']:.2f} x ({row['kept']['forced']:.0%} of {row['drafted']['forced']} kept), student "
        f"{row['ratio']['student']:.2f} x; {same}"
    )


def _context(drafting: Lossless, ids: Tensor, tokens: int) -> dict[str, Any]:
    """All ways of writing at one context."""
    caches, reading = _read(drafting, ids)
    pace, always = Pace(), Pace()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    written: dict[str, list[int]] = {}
    last: dict[str, Lossless] = {}
    for turn in range(TURNS):
        for name in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            own = Lossless(drafting.model, drafting.source, always=FORCED if name == "forced" else None)
            own.pace, always.step = always if name == "forced" else pace, pace.step
            seconds[name].append(_write(own, name, ids, tokens, caches, written))
            last[name] = own
    typical = {name: median(each) for name, each in seconds.items()}
    drafted = {name: last[name].counts for name in DRAFTED}
    other = next((name for name in DRAFTED if written[name] != written["source"]), None)
    tie = None if other is None else _tie(drafting, ids, written["source"], written[other])
    return {
        "context": ids.shape[1],
        **{name: {"seconds": typical[name], "tokens_per_second": (tokens - 1) / typical[name]} for name in WAYS},
        "ratio": {name: _ratio(seconds["source"], seconds[name]) for name in WAYS[1:]},
        "turns": seconds,
        "reading_seconds": reading,
        "student_read_seconds": drafted["lossless"].reading,
        "per_pass": {name: counts.per_pass for name, counts in drafted.items()},
        "drafted": {name: counts.drafted for name, counts in drafted.items()},
        "kept": {name: counts.kept / max(counts.drafted, 1) for name, counts in drafted.items()},
        "same": tie is None,
        "tie": tie,
        "pace": vars(always),
    }


def _ratio(alone: list[float], drafted: list[float]) -> float:
    """How many times faster, by the median of the turns: what the machine does meanwhile meets both of a turn alike."""
    return median(a / b for a, b in zip(alone, drafted, strict=True))


def _read(drafting: Lossless, ids: Tensor) -> tuple[dict[str, DynamicCache], dict[str, float]]:
    """The caches of both behind all but the last token, and the seconds of reading them."""
    caches, seconds = {}, {}
    for name, reader in (("source", drafting.source or drafting.model), ("student", drafting.model)):
        caches[name] = DynamicCache(config=reader.config)
        with torch.no_grad(), drafting.alone(name):
            start = time.perf_counter()
            drafting._pass(reader, ids[:, :-1], caches[name], 1)
            seconds[name] = time.perf_counter() - start
    return caches, seconds


def _write(
    own: Lossless, name: str, ids: Tensor, tokens: int, caches: dict[str, DynamicCache], written: dict[str, list[int]]
) -> float:
    """Write in one of `WAYS` behind copies of the caches, into `written`; the seconds from the first new token on."""
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True
    )
    alone = name if name in caches else None
    writer = own.model if alone == "student" else own.source or own.model
    again, clock = copy.deepcopy(caches[alone or "source"]), Clock(None)
    if alone is None and name != "lossless":
        own.resume(copy.deepcopy(caches["student"]), ids[0, :-1].tolist())
    with torch.no_grad(), only(writer, settings):
        if alone is None:
            output = own.generate(ids, clock, generation_config=settings, **{CACHE: again})
        else:
            with own.alone(alone):
                output = writer.generate(ids, generation_config=settings, **{CACHE: again}, streamer=clock)
    written[name] = output.sequences[0, ids.shape[1] :].tolist()
    return clock.times[-1] - clock.times[1]


def _tie(drafting: Lossless, ids: Tensor, expected: list[int], written: list[int]) -> dict[str, float]:
    """Where the texts part: how far apart the source's logits of the two tokens are, and how far its own logits move
    between reading the text at once and reading the last token as a step, which is as much as its dtype says."""
    pairs = zip(expected, written, strict=True)
    where, (ours, theirs) = next((index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])
    source = drafting.source or drafting.model
    whole, cache = torch.cat([ids, ids.new_tensor([expected[:where]])], 1), DynamicCache(config=source.config)
    with torch.no_grad(), drafting.alone("source"):
        logits = drafting._pass(source, whole, DynamicCache(config=source.config), 1)[0, -1].float()
        drafting._pass(source, whole[:, :-1], cache, 1)
        step = drafting._pass(source, whole[:, -1:], cache, 1)[0, -1].float()
    return {"at": where, "gap": abs(float(step[ours] - step[theirs])), "moves": float((logits - step).abs().max())}
