"""Decoding speed and memory by context length: the source, the window control and the converted model, side by side.

    python scripts/bench_decode.py                                          # everything: hours on two cores
    python scripts/bench_decode.py --contexts 256 1024 --batches 1 --dtypes float32 --long 0

The recipe's model is converted and not trained, which changes nothing about its speed, and measured by `linearize
bench`, once per dtype. Then the converted model reads a prompt of --long tokens in pieces, in a process of its own.

Writes eval/results/bench-decode-NAME.json after every dtype, and a table (.md) and a plot (.png) beside it.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from bench_common import Cell, Claim
from transformers import DynamicCache

from linearize.checkpoint.open import load
from linearize.conversion.convert import convert
from linearize.evaluation.clock import PEAK, read_task, status, timed
from linearize.evaluation.evaluate import bench
from linearize.evaluation.speed import COLUMNS, prefill, prompt
from linearize.recipe import load as recipes
from linearize.reporting.plot import Points, draw_speed

DTYPES = ["float32", "bfloat16"]


def part_bench(folder: Path, given: argparse.Namespace) -> Iterator[Cell]:
    """What `linearize bench` measures, one cell per model, dtype, batch and context."""
    for dtype in given.dtypes:
        results = bench(folder, given.contexts, given.batches, given.steps, seed=given.seed, dtype=dtype, device="cpu")
        for kind in COLUMNS:
            for speed in results["columns"][kind].get("speed", []):
                yield {"part": "bench", "kind": kind, "dtype": dtype} | speed


def part_long(folder: Path, given: argparse.Namespace) -> Iterator[Cell]:
    """Peak memory and time of a long prompt in pieces."""
    what = {"dtype": given.dtypes[0], "context": given.long, "piece": given.piece}
    measured = common.in_own_process(__file__, folder=str(folder), threads=given.threads, **what)
    yield {"part": "long", "kind": "student", "batch": 1, **what, **measured}


@torch.inference_mode()
def worker(folder: str, dtype: str, context: int, piece: int, threads: int) -> Cell:
    """Read a prompt in a process that holds nothing but the converted model."""
    torch.set_num_threads(threads)
    model, _ = load(folder, dtype, "cpu")
    cache, ids = DynamicCache(config=model.config), prompt(model, context, 0)
    _, seconds = timed(lambda: prefill(model, cache, ids, piece), model.device)
    return {"peak_bytes": status(PEAK), "seconds": seconds}


def claims(cells: list[Cell]) -> list[Claim]:
    """The numbers that the product promises, where this run has measured what they need (batch 1, fp32)."""
    made: list[Claim] = []

    def compare(name: str, limit: str, key: str, over: tuple[str, int], under: tuple[str, int]) -> None:
        top, bottom = ({"kind": kind, "context": context} for kind, context in (over, under))
        made.extend(common.ratio(cells, name, limit, key, top, bottom, part="bench", dtype="float32", batch=1))

    for n, limit in ((256, "≥ 0.95"), (8192, "≥ 1.6"), (32768, "≥ 4")):
        compare(f"speed over the source at {n}", limit, "token_seconds", ("source", n), ("student", n))
    for n in sorted({cell["context"] for cell in cells if cell["part"] == "bench"}):
        compare(f"time over the window control at {n}", "≤ 1.15", "token_seconds", ("student", n), ("window", n))
        if n > 1024:
            compare(f"time at {n} over 1024", "≤ 1.1", "token_seconds", ("student", n), ("student", 1024))
    for key, limit in (("peak_bytes", "≤ 1.02"), ("cache_bytes", "≤ 1")):
        compare(f"{key} at 32768 over 1024", limit, key, ("student", 32768), ("student", 1024))
    name = "cache bytes over the source's at 32768"
    compare(name, "≤ 0.01", "cache_bytes", ("student", 32768), ("source", 32768))
    name = "prefill time, 16384 over 8192"
    compare(name, "≤ 2.1", "prefill_seconds", ("student", 16384), ("student", 8192))
    name = "prefill time over the source's at 8192"
    compare(name, "≤ 0.7", "prefill_seconds", ("student", 8192), ("source", 8192))
    peak = common.find(cells, "peak_bytes", part="long", context=100_000)
    return made + ([common.claim("bytes of a prefill of 100000 tokens", "≤ 4e9", peak)] if peak else [])


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines: a table by dtype, batch and context, a long prompt, claims."""
    cells, machine = results["cells"], results["environment"]
    rows = []
    keys = {(c["dtype"], c["batch"], c["context"]) for c in cells if c["part"] == "bench"}
    for dtype, batch, context in sorted(keys):
        at = {"dtype": dtype, "batch": batch, "context": context}
        source, _, student = times = [common.find(cells, "token_seconds", **at, kind=kind) for kind in COLUMNS]
        row = [dtype, str(batch), str(context), *(common.shown(time, ".1f", 1e3) for time in times)]
        row.append(common.shown(source / student if source and student else None, ".2f"))
        for key, scale in (("cache_bytes", 2.0**-20), ("peak_bytes", 2.0**-20), ("prefill_seconds", 1)):
            both = (common.find(cells, key, **at, kind=kind) for kind in ("source", "student"))
            row += [common.shown(number, ".1f", scale) for number in both]
        rows.append(row)
    pairs = [f"{what}: {kind}" for what in ("cache", "peak", "prefill, s") for kind in ("source", "student")]
    lines = [
        f"Decoding of {results['recipe']}: {machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}.",
        "Milliseconds per token (median); MiB of the cache and, resident, while decoding; seconds of the prefill.",
        *common.table(("dtype", "batch", "context", *COLUMNS, "source / student", *pairs), rows),
    ]
    for cell in (cell for cell in cells if cell["part"] == "long" and "peak_bytes" in cell):
        size, seconds = cell["peak_bytes"] / 2**30, cell["seconds"]
        lines += ["", f"{cell['context']} tokens in pieces of {cell['piece']}: {size:.2f} GiB, {seconds:.0f} s."]
    return lines + common.claims_table(results["claims"], "batch 1, fp32")


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, "smollm2-135m", f"bench-decode-{platform.machine()}-{os.cpu_count()}-cores")
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 8192, 16384, 32768])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES, "float16"], default=DTYPES)
    parser.add_argument("--steps", type=int, default=24, help="timed tokens of every model, batch and context")
    parser.add_argument("--long", type=int, default=100_000, help="tokens of the prompt in pieces; 0: none")
    parser.add_argument("--piece", type=int, default=512, help="tokens per piece")
    given = parser.parse_args()
    if given.worker:
        return print(json.dumps(worker(**read_task())))
    (results, target), wanted = common.begin(given), recipes.load(given.recipe, given.set)
    results |= {"recipe": given.recipe, "source": wanted.source.id, "mixer": dict(wanted.convert.mixer)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = convert(common.source_of(wanted), wanted, Path(temporary) / "converted")
        for part in (part_bench, part_long) if given.long else (part_bench,):
            common.collect(results, part(folder, given), claims, target)
    common.write_markdown(markdown(results), target)
    panels: dict[str, dict[str, Points]] = {}
    for cell in (cell for cell in results["cells"] if cell["part"] == "bench"):
        points = panels.setdefault(f"{cell['dtype']}, batch {cell['batch']}", {}).setdefault(cell["kind"], [])
        points.append((cell["context"], cell["token_seconds"], cell["cache_bytes"]))
    draw_speed(panels, target.with_suffix(".png"))


if __name__ == "__main__":
    main()
