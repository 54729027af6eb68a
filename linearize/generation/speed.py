"""Lossless mode measured: the source alone, drafted by the student, and the student alone, on the same text.

Each context is read once per model; then all write the same number of tokens behind copies of what was read, in turns.
Seconds are those of writing, from the first new token on. `lossless` is what one call of `generate` does: what the
student reads before it can draft is within its seconds, and told beside. `resumed` finds the student's state of the
text beside the source's cache, as a kept conversation does.
"""

import copy
import gzip
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
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
from linearize.generation.lossless import Counts, Lossless
from linearize.recipe.resources import package_folder

TEXT = "wikitext2_valid"
TURNS = 3


def bench_lossless(
    folder: str | Path,
    contexts: Sequence[int] = (512, 2048, 8192),
    tokens: int = 128,
    dtype: str = "auto",
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure what drafting brings, by context length.

    Args:
        folder: linearized folder, adapter folder or Hub id.
        contexts: tokens of the embedded validation text before the first new one.
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
    text = gzip.decompress((package_folder("eval") / "data" / f"{TEXT}.txt.gz").read_bytes()).decode()
    ids = torch.tensor([tokenizer(text[: 12 * max(contexts)], verbose=False)["input_ids"]], device=model.device)
    if ids.shape[1] < max(contexts):
        raise InputError(f"contexts: found {max(contexts)}; the text has {ids.shape[1]} tokens")
    settings = {"folder": str(folder), "text": TEXT, "tokens": tokens, "turns": TURNS, "dtype": str(model.dtype)}
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
        f"{row['kept']['resumed']:.0%} of {row['drafted']['resumed']} drafts kept), student "
        f"{row['ratio']['student']:.2f} x; {same}"
    )


def _context(drafting: Lossless, ids: Tensor, tokens: int) -> dict[str, Any]:
    """All three at one context."""
    model, source = drafting.model, drafting.source or drafting.model
    fresh = Lossless(model, drafting.source)
    caches = {"source": DynamicCache(config=source.config), "student": DynamicCache(config=model.config)}
    reading = {}
    with torch.no_grad():
        for name, student in (("source", False), ("student", True)):
            with fresh._as(student):
                start = time.perf_counter()
                reader = model if student else source
                fresh._pass(reader, ids[:, :-1], caches[name], 1)
                reading[name] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {"source": [], "lossless": [], "resumed": [], "student": []}
    written: dict[str, list[int]] = {}
    counts: dict[str, Counts] = {}
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True
    )
    for turn in range(TURNS):
        order = list(seconds)[turn % 4 :] + list(seconds)[: turn % 4]
        for name in order:
            again = copy.deepcopy(caches["student" if name == "student" else "source"])
            own = Lossless(model, drafting.source, always=0 if name == "source" else None, pace=fresh.pace)
            clock = Clock(None)
            if name == "student":
                with torch.no_grad(), only(model, settings):
                    output = model.generate(ids, generation_config=settings, past_key_values=again, streamer=clock)
            elif name == "source":
                with torch.no_grad(), own._as(student=False), only(source, settings):
                    output = source.generate(ids, generation_config=settings, past_key_values=again, streamer=clock)
            else:
                if name == "resumed":
                    own.resume(copy.deepcopy(caches["student"]), ids[0, :-1].tolist())
                with only(source, settings):
                    output = own.generate(ids, clock, generation_config=settings, past_key_values=again)
                fresh, counts[name] = own, own.counts
            seconds[name].append(clock.times[-1] - clock.times[1])
            written[name] = output.sequences[0, ids.shape[1] :].tolist()
    best = {name: min(each) for name, each in seconds.items()}
    rate = {name: (tokens - 1) / each for name, each in best.items()}
    other = next((name for name in ("lossless", "resumed") if written[name] != written["source"]), None)
    tie = None if other is None else _tie(fresh, source, ids, written["source"], written[other])
    return {
        "context": ids.shape[1],
        **{name: {"seconds": best[name], "tokens_per_second": rate[name]} for name in best},
        "ratio": {name: rate[name] / rate["source"] for name in ("lossless", "resumed", "student")},
        "reading_seconds": reading,
        "student_read_seconds": counts["lossless"].reading,
        **{
            key: {name: value(each) for name, each in counts.items()}
            for key, value in (
                ("per_pass", lambda each: each.per_pass),
                ("drafted", lambda each: each.drafted),
                ("kept", lambda each: each.kept / max(each.drafted, 1)),
            )
        },
        "same": tie is None,
        "tie": tie,
        "pace": {"accepted": fresh.pace.accepted, "step": fresh.pace.step, "draft": fresh.pace.draft,
                 "token": fresh.pace.token},
    }  # fmt: skip


def _tie(drafting: Lossless, source: Any, ids: Tensor, expected: list[int], written: list[int]) -> dict[str, float]:
    """How far apart the source's own logits of the two tokens are where the texts part, and what its dtype resolves."""
    pairs = zip(expected, written, strict=True)
    where, (ours, theirs) = next((index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])
    whole = torch.cat([ids, ids.new_tensor([expected[:where]])], 1)
    with torch.no_grad(), drafting._as(student=False):
        logits = drafting._pass(source, whole, DynamicCache(config=source.config), 1)[0, -1].float()
    resolution = float(torch.finfo(source.dtype).eps * logits[ours].abs())
    return {"at": where, "gap": abs(float(logits[ours] - logits[theirs])), "resolution": resolution}
