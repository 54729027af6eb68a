"""Decoding speed and memory by context length: the source, the window control and the converted model, side by side.

    python scripts/bench_decode.py                                          # everything: hours on two cores
    python scripts/bench_decode.py --contexts 256,1024 --batches 1 --dtypes float32 --repeats 3 --parts decode

Parts:
  decode   time per token after a prefill, median over interleaved rounds of --steps tokens; bytes held by the cache
  memory   peak resident memory while decoding, each cell in a process of its own
  prefill  time of one forward over the whole prompt
  long     peak resident memory and time of a prefill in pieces, converted model only
  profile  operators that take most of a decode step's time, first dtype and batch, longest context

The source is a plain transformers model with DynamicCache and SDPA. Beyond --source-prefill tokens its cache is filled
by repeating the keys and values of the first ones: how long its attention takes does not depend on what they hold, and
a real prefill would take most of the run. The other two always read every token. They are untrained, which changes
nothing about their speed. All rows of a batch hold the same text.

Writes eval/results/bench-decode-NAME.json after every cell, and at the end a table (.md) and a plot (.png, if
matplotlib is installed) beside it.
"""

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_common import Cell, numbers, some, validation_text
from bench_report import KINDS, claims, write
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import linearize.model.modeling
from linearize.checkpoint.sources import load_source, locate
from linearize.evaluation.clock import PEAK, in_process, read_task, rotated, status, summary, timed
from linearize.evaluation.columns import sharing_copy
from linearize.evaluation.environment import environment
from linearize.evaluation.speed import cache_bytes, decode, prefill, resident_peak, stretch
from linearize.recipe import load as recipes

PARTS = ("decode", "memory", "prefill", "long", "profile")

# --- models and caches ------------------------------------------------------------------------------------------------


def open_model(folder: str, kind: str, dtype: str, mixer: dict[str, Any]) -> PreTrainedModel:
    """One of the three, from the source's folder."""
    return as_kind(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval(), kind, mixer)


def as_kind(source: PreTrainedModel, kind: str, mixer: dict[str, Any]) -> PreTrainedModel:
    """The source itself, or a converted model that shares its weights."""
    if kind == "source":
        return source
    if kind == "window":
        mixer = {"name": "window", "window": mixer["window"], "sinks": mixer["sinks"]}
    return linearize.linearize_(sharing_copy(source), mixer)


def token_ids(tokenizer: PreTrainedTokenizerBase, count: int) -> torch.Tensor:
    """The embedded WikiText-2 text as ids [1, count], from its start again where it is too short."""
    ids = torch.tensor(tokenizer(validation_text(), add_special_tokens=False).input_ids)
    return ids.repeat(-(-count // len(ids)))[None, :count]


def filled(
    model: PreTrainedModel,
    folder: str,
    kind: str,
    ids: torch.Tensor,
    contexts: Iterable[int],
    given: argparse.Namespace,
) -> dict[int, Cache]:
    """A cache of batch 1 per context, all from one pass over the text; kept in the folder for the parts to come."""
    kept = {context: Path(folder) / f"{kind}-{model.dtype}-{context}.pt".replace("torch.", "") for context in contexts}
    if all(path.exists() for path in kept.values()):
        return {context: torch.load(path, weights_only=False) for context, path in kept.items()}
    caches, cache, done = {}, DynamicCache(config=model.config), 0
    for context in sorted(contexts):
        real = min(context, given.source_prefill) if kind == "source" else context
        if real > done:
            prefill(model, cache, ids[:, done:real], given.piece)
            done = real
        caches[context] = stretch(copy.deepcopy(cache), context)
        torch.save(caches[context], kept[context])
    return caches


# --- the parts --------------------------------------------------------------------------------------------------------


def part_decode(folder: str, ids: torch.Tensor, mixer: dict[str, Any], given: argparse.Namespace) -> Iterable[Cell]:
    """Times of all kinds and contexts of a dtype and batch, taken in turns: noise of the machine meets all alike."""
    for dtype in given.dtypes:
        source = open_model(folder, "source", dtype, mixer)
        models = {kind: as_kind(source, kind, mixer) for kind in given.kinds}
        singles = {kind: filled(model, folder, kind, ids, given.contexts, given) for kind, model in models.items()}
        for batch in given.batches:
            for contexts in groups(singles, given.contexts, batch):
                caches = {}
                for kind in models:
                    for context in contexts:
                        cache = caches[kind, context] = copy.deepcopy(singles[kind][context])
                        cache.batch_repeat_interleave(batch)
                seconds: dict[tuple[str, int], list[float]] = {key: [] for key in caches}
                for round_ in range(given.repeats):
                    for key in rotated(list(caches), round_):
                        token = ids[:, :1].expand(batch, 1)
                        seconds[key] += decode(models[key[0]], caches[key], token, given.steps)
                for (kind, context), cache in caches.items():
                    cell = {"part": "decode", "kind": kind, "dtype": dtype, "batch": batch, "context": context}
                    yield cell | summary(seconds[kind, context]) | {"cache_bytes": cache_bytes(cache)}


def groups(singles: dict[str, dict[int, Cache]], contexts: list[int], batch: int) -> list[list[int]]:
    """All contexts together if their caches fit into half of the free memory, else one after the other."""
    needed = batch * sum(cache_bytes(cache) for caches in singles.values() for cache in caches.values())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [contexts] if needed < free / 2 else [[context] for context in contexts]


def part_prefill(folder: str, ids: torch.Tensor, mixer: dict[str, Any], given: argparse.Namespace) -> Iterable[Cell]:
    dtype = given.dtypes[0]
    source = open_model(folder, "source", dtype, mixer)
    models = {kind: as_kind(source, kind, mixer) for kind in given.kinds}
    for context in given.prefill:
        seconds: dict[str, list[float]] = {kind: [] for kind in models}
        for round_ in range(given.prefill_repeats):
            for kind in rotated(list(models), round_):
                cache = DynamicCache(config=models[kind].config)
                read = partial(prefill, models[kind], cache, ids[:, :context], context)
                seconds[kind].append(timed(read, models[kind].device)[1])
        for kind in models:
            cell = {"part": "prefill", "kind": kind, "dtype": dtype, "batch": 1, "context": context}
            yield cell | summary(seconds[kind])


def part_memory(folder: str, mixer: dict[str, Any], given: argparse.Namespace) -> Iterable[Cell]:
    for dtype in given.dtypes:
        for batch in given.batches:
            for context in given.contexts:
                for kind in given.kinds:
                    cell = {"part": "memory", "kind": kind, "dtype": dtype, "batch": batch, "context": context}
                    yield cell | measured(cell, folder, mixer, given)


def part_long(folder: str, mixer: dict[str, Any], given: argparse.Namespace) -> Iterable[Cell]:
    cell = {"part": "long", "kind": "student", "dtype": given.dtypes[0], "batch": 1, "context": given.long}
    yield cell | measured(cell, folder, mixer, given)


def part_profile(folder: str, ids: torch.Tensor, mixer: dict[str, Any], given: argparse.Namespace) -> Iterable[Cell]:
    dtype, batch, context = given.dtypes[0], given.batches[0], max(given.contexts)
    source = open_model(folder, "source", dtype, mixer)
    for kind in given.kinds:
        model = as_kind(source, kind, mixer)
        cache = filled(model, folder, kind, ids, [context], given)[context]
        cache.batch_repeat_interleave(batch)
        with torch.profiler.profile() as profiler:
            decode(model, cache, ids[:, :1].expand(batch, 1), given.steps)
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total, steps = sum(event.self_cpu_time_total for event in events), given.steps + 1
        cell = {"part": "profile", "kind": kind, "dtype": dtype, "batch": batch, "context": context}
        yield cell | {
            "seconds": total / 1e6 / steps,
            "operators": [
                {"name": event.key, "share": event.self_cpu_time_total / total, "calls": event.count / steps}
                for event in events[:15]
            ],
        }


# --- memory: one process per cell -------------------------------------------------------------------------------------


def measured(cell: Cell, folder: str, mixer: dict[str, Any], given: argparse.Namespace) -> Cell:
    return in_process([__file__, "--worker"], {"cell": cell, "folder": folder, "mixer": mixer, "given": given})


def worker(cell: Cell, folder: str, mixer: dict[str, Any], given: argparse.Namespace) -> Cell:
    """Peak resident bytes of one cell, in a process that holds nothing else."""
    torch.set_num_threads(given.threads)
    model = open_model(folder, cell["kind"], cell["dtype"], mixer)
    ids = torch.load(Path(folder) / "ids.pt")
    if cell["part"] == "long":
        cache = DynamicCache(config=model.config)
        _, seconds = timed(lambda: prefill(model, cache, ids[:, : cell["context"]], given.piece), model.device)
        return {"peak_bytes": status(PEAK), "seconds": seconds, "piece": given.piece}
    cache = filled(model, folder, cell["kind"], ids, [cell["context"]], given)[cell["context"]]
    return {
        "peak_bytes": resident_peak(model, cache, cell["batch"], given.steps),
        "cache_bytes": cache_bytes(cache),
    }


# --- the command ------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", default="smollm2-135m", help="names the source and the mixer (default: %(default)s)"
    )
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, e.g. convert.mixer.window=128")
    parser.add_argument("--parts", type=some(PARTS), default=list(PARTS))
    parser.add_argument("--kinds", type=some(KINDS), default=list(KINDS))
    parser.add_argument("--contexts", type=numbers, default=[256, 1024, 8192, 32768])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--dtypes", type=some(("float32", "bfloat16", "float16")), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7, help="rounds over all cells of a group")
    parser.add_argument("--steps", type=int, default=8, help="timed tokens per round")
    parser.add_argument("--prefill", type=numbers, default=[8192, 16384], help="lengths, first dtype, batch 1")
    parser.add_argument("--prefill-repeats", type=int, default=3)
    parser.add_argument("--long", type=int, default=100_000, help="tokens of the prefill in pieces")
    parser.add_argument("--piece", type=int, default=512, help="tokens per piece where a prefill is done in pieces")
    parser.add_argument("--source-prefill", type=int, default=2048, help="see above")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the output (default: the processor's architecture and cores)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "eval" / "results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    given = arguments()
    if given.worker:
        return print(json.dumps(worker(**read_task())))
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    wanted = recipes.load(given.recipe, given.set)
    mixer = dict(wanted.convert.mixer)
    name = given.name or f"{platform.machine()}-{os.cpu_count()}-cores"
    target = given.out / f"bench-decode-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    options = {key: value for key, value in vars(given).items() if key not in ("worker", "out", "name")}
    results: dict[str, Any] = {"schema": 1, "recipe": given.recipe, "source": wanted.source.id, "mixer": mixer}
    results |= {"settings": options, "environment": environment(torch.device("cpu"), given.seed, {}), "cells": []}
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_source(
            locate(wanted.source.id, wanted.source.revision, package=wanted.source.package), "float32"
        )
        model.save_pretrained(folder)
        del model
        ids = token_ids(tokenizer, max(*given.contexts, *given.prefill, given.long))
        torch.save(ids, Path(folder) / "ids.pt")
        parts = {
            "decode": lambda: part_decode(folder, ids, mixer, given),
            "memory": lambda: part_memory(folder, mixer, given),
            "prefill": lambda: part_prefill(folder, ids, mixer, given),
            "long": lambda: part_long(folder, mixer, given),
            "profile": lambda: part_profile(folder, ids, mixer, given),
        }
        for part in given.parts:
            for cell in parts[part]():
                print(json.dumps(cell), file=sys.stderr)
                results["cells"].append(cell)
                results["claims"] = claims(results["cells"])
                target.write_text(json.dumps(results, indent=1) + "\n")
    print(write(results, target))


if __name__ == "__main__":
    main()
