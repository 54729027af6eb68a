"""Training speed and memory of the recurrences by length, against causal softmax attention in the same run.

    python scripts/bench_ops.py                                              # four minutes on two cores
    python scripts/bench_ops.py --lengths 256,512 --naive 256 --repeats 2 --rows softmax,"additive channel"

Every number is one forward and backward pass, fp32, batch 1. Times are medians over rounds in which all rows take
turns, so that noise of the machine meets all alike; the naive recurrence runs in every round at the lengths of --naive
and once at --naive-once. Memory is what a pass adds to the peak of a process of its own.

Keys are standard normal times 3, four channels of them shifted by −50, and a decay is σ(key)^(1/16): as real models
have them. Families that a checkout lacks are left out.

Writes eval/results/bench-ops.json after every length, and a table (.md) beside it at the end.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bench_common import LIVE, Cell, claim, claims_table, find, numbers, some
from torch import Tensor
from torch.nn import functional as F

from linearize.evaluation.clock import PEAK, forget_peak, in_process, read_task, rotated, status, summary, timed
from linearize.evaluation.environment import environment
from linearize.model.ops import additive
from linearize.model.ops.window import window_attention

HEADS, WIDTH, WINDOW, SINKS = 9, 64, 64, 4
TAU = 16.0
FAMILIES = {"delta none": "delta", "delta scalar": "delta", "diagonal": "diagonal"}
ROWS = ("softmax", "window", "additive none", "additive scalar", "additive channel", *FAMILIES, "naive")
"""naive is the token-by-token form of `additive channel`."""

LIMITS = {
    ("additive channel", 4096): "≤ 0.5",
    ("additive channel", 16384): "≤ 0.15",
    ("delta none", 4096): "≤ 1",
    ("delta none", 16384): "≤ 0.3",
    ("delta scalar", 4096): "≤ 1",
    ("delta scalar", 16384): "≤ 0.3",
    ("diagonal", 4096): "≤ 0.25",
    ("diagonal", 16384): "≤ 0.05",
}
"""Of the time of causal softmax attention at that length."""

# --- the rows ---------------------------------------------------------------------------------------------------------


def prepare(row: str, length: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of leaves that returns y, and the leaves."""
    shape = (1, HEADS, length, WIDTH)
    q, k, v = (torch.randn(shape) for _ in range(3))
    raw = torch.randn(shape) * 3
    raw[..., :4] -= 50
    channel = F.logsigmoid(raw) / TAU
    scalar = channel.mean(-1, keepdim=True)
    kind = row.split(" ")[-1]
    decay = {"scalar": [scalar], "channel": [channel], "naive": [channel]}.get(kind, [])
    if row == "softmax":
        form, leaves = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]
    elif row == "window":
        form, leaves = window, [q, k, v]
    elif row == "diagonal":
        chunked = importlib.import_module("linearize.model.ops.diagonal").chunked
        form, leaves = lambda *x: chunked(*x)[0], [v, channel]
    elif row.startswith("delta"):
        chunked = importlib.import_module("linearize.model.ops.delta").chunked
        form, leaves = (
            lambda *x: chunked(*x)[0],
            [q, F.normalize(k, dim=-1), v, torch.rand(1, HEADS, length, 1), *decay],
        )
    else:
        recurrence = additive.naive_recurrent if row == "naive" else additive.chunked
        form, leaves = lambda *x: recurrence(*x)[0], [q.softmax(-1), k.softmax(-1), v, *decay]
    return form, [leaf.requires_grad_() for leaf in leaves]


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    local = (F.pad(x, (0, 0, WINDOW, 0)) for x in (k, v))
    sinks = (x[:, :, :SINKS] for x in (k, v))
    return window_attention(q, *local, *sinks, seen=0, window=WINDOW, scaling=WIDTH**-0.5)[0]


def one_pass(form: Callable[..., Tensor], leaves: list[Tensor]) -> float:
    """Seconds of a forward and a backward pass."""

    def both() -> None:
        y = form(*leaves)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return timed(both, leaves[0].device)[1]


# --- the parts --------------------------------------------------------------------------------------------------------


def part_time(length: int, given: argparse.Namespace) -> Iterable[Cell]:
    every = [row for row in given.rows if row != "naive" or length in given.naive]
    passes = {row: prepare(row, length) for row in every}
    for row in every:
        one_pass(*passes[row])
    seconds: dict[str, list[float]] = {row: [] for row in every}
    for round_ in range(given.repeats):
        for row in rotated(every, round_):
            seconds[row].append(one_pass(*passes[row]))
    if "naive" in given.rows and "naive" not in every and length == given.naive_once:
        seconds["naive"] = [one_pass(*prepare("naive", length))]
    for row, times in seconds.items():
        yield {"part": "time", "row": row, "length": length} | summary(times)


def part_memory(length: int, given: argparse.Namespace) -> Iterable[Cell]:
    """One process per row: the peak of a pass less what the process held before it."""
    for row in given.rows:
        if row == "naive" and length not in given.naive:
            continue
        task = {"row": row, "length": length, "threads": given.threads}
        yield {"part": "memory", "row": row, "length": length} | in_process([__file__, "--worker"], task, LIVE)


def worker(task: dict[str, Any]) -> Cell:
    torch.set_num_threads(task["threads"])
    one_pass(*prepare(task["row"], 128))  # libraries that load on first use are no memory of the pass
    form, leaves = prepare(task["row"], task["length"])
    before = forget_peak()
    one_pass(form, leaves)
    return {"peak_bytes": status(PEAK) - before}


# --- the report -------------------------------------------------------------------------------------------------------


def claims(cells: list[Cell]) -> list[dict[str, Any]]:
    """The promised numbers, where this run has measured what they need."""
    found = []

    def ratio(name: str, limit: str, key: str, over: dict[str, Any], under: dict[str, Any]) -> None:
        top, bottom = find(cells, key, **over), find(cells, key, **under)
        if top and bottom:
            found.append(claim(name, limit, top / bottom))

    for (row, length), limit in LIMITS.items():
        at = {"part": "time", "length": length}
        ratio(f"{row}: time over softmax's at {length}", limit, "seconds", at | {"row": row}, at | {"row": "softmax"})
    at = {"part": "time", "length": 4096}
    ratio(
        "naive: time over additive channel's at 4096",
        "≥ 20",
        "seconds",
        at | {"row": "naive"},
        at | {"row": "additive channel"},
    )
    lengths = sorted({cell["length"] for cell in cells})
    for row in ROWS:
        if row not in ("softmax", "naive") and len(lengths) > 1:
            # The longest two: shorter passes partly fit into what the process holds before them. A tenth is for what
            # rounds up.
            short, long = lengths[-2:]
            over, under = ({"part": "memory", "row": row, "length": length} for length in (long, short))
            ratio(f"{row}: memory at {long} over {short}", f"≤ {1.1 * long / short:.4g}", "peak_bytes", over, under)
    return found


def markdown(results: dict[str, Any]) -> str:
    cells, machine = results["cells"], results["environment"]
    lengths = sorted({cell["length"] for cell in cells})
    head = " | ".join(f"{length}: ms | of softmax | MiB" for length in lengths)
    lines = [
        f"Recurrences: {machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}.",
        f"Forward and backward, fp32, batch 1, {HEADS} heads of {WIDTH}: median time, and memory that a pass adds.",
        "",
        f"| | {head} |",
        f"|---|{'---:|' * 3 * len(lengths)}",
    ]
    for row in dict.fromkeys(cell["row"] for cell in cells):
        columns = []
        for length in lengths:
            seconds, memory = (
                find(cells, key, part=part, row=row, length=length)
                for part, key in (("time", "seconds"), ("memory", "peak_bytes"))
            )
            softmax = find(cells, "seconds", part="time", row="softmax", length=length)
            columns += [
                f"{1e3 * seconds:.1f}" if seconds else "",
                f"{seconds / softmax:.3f}" if seconds and softmax else "",
            ]
            columns.append(f"{memory / 2**20:.0f}" if memory else "")
        lines.append(f"| {row} | {' | '.join(columns)} |")
    return "\n".join([*lines, *claims_table(results["claims"], "batch 1, fp32")]) + "\n"


def arguments() -> argparse.Namespace:
    there = [row for row in ROWS if row not in FAMILIES or find_spec(f"linearize.ops.{FAMILIES[row]}")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=some(there), default=there)
    parser.add_argument("--lengths", type=numbers, default=[1024, 4096, 16384])
    parser.add_argument("--naive", type=numbers, default=[1024], help="lengths at which the naive form takes its turns")
    parser.add_argument("--naive-once", type=int, default=4096, help="a length at which it is timed once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--name", default="bench-ops", help="of the output (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "eval" / "results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.worker:
        return print(json.dumps(worker(read_task())))
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    target = given.out / f"{given.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    options = {key: value for key, value in vars(given).items() if key not in ("worker", "out", "name")}
    results: dict[str, Any] = {"schema": 1, "settings": options, "cells": []}
    results["environment"] = environment(torch.device("cpu"), given.seed, {})
    for length in given.lengths:
        for part in (part_time,) if given.no_memory else (part_time, part_memory):
            for cell in part(length, given):
                print(json.dumps(cell), file=sys.stderr)
                results["cells"].append(cell)
        results["claims"] = claims(results["cells"])
        target.write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    target.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
