"""Speed and memory of the recurrences by length, against causal softmax attention in the same run.

    python scripts/bench_ops.py                                              # four minutes on two cores
    python scripts/bench_ops.py --lengths 256 512 --naive 256 --repeats 2 --rows softmax "additive channel"
    python scripts/bench_ops.py --rows softmax "mixer clusters 352" "mixer clusters 704" --name bench-ops-clusters
    python scripts/bench_ops.py --device cuda --name gpu-ops                 # every mixer, with kernels and without

Every number is one forward and backward pass, batch 1, in fp32; on a GPU in bf16, where rows are whole mixers, by
default, and decoding is timed too: one step of --batch rows, beside softmax over 8,192 cached tokens. Times are medians
over interleaved rounds, so that noise of the machine meets all alike; the naive recurrence runs in every round at the
lengths of --naive and once at --naive-once. Memory, on a CPU, is what a pass adds to the peak of a process of its own.

Keys are standard normal times 3, four channels of them shifted by −50, and a decay is σ(key)^(1/16): as real models
have them.

Writes eval/results/NAME.json after every cell, and a table (.md) beside it at the end.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import bench_common as common
import torch
from bench_common import Cell, Claim
from torch import Tensor
from torch.nn import functional as F

from linearize.conversion.costs import CONTEXT, context, decoder, make
from linearize.evaluation.clock import PEAK, forget_peak, read_task, status, summary
from linearize.model.mixers import MIXERS, Geometry
from linearize.model.ops import BACKENDS, additive, delta, diagonal
from linearize.model.ops.window import window_attention

WINDOW, SINKS = 64, 4
TAU = 16.0
ROWS = (
    "softmax", "window", "additive none", "additive scalar", "additive channel", "delta none", "delta scalar",
    "diagonal", "naive",
)  # fmt: skip
"""naive is the token-by-token form of `additive channel`."""
MIXER_ROWS = tuple(f"mixer {name}" for name, cls in MIXERS.items() if cls.recurrent or name == "window")
GPU_ROWS = ("softmax", *MIXER_ROWS)
CLUSTER_ROWS = tuple(f"mixer clusters {count}" for count in (176, 352, 704, 1408))
"""Time against the number of clusters, kept in int4."""
LIMITS = {
    "additive channel": ("≤ 0.5", "≤ 0.15"), "delta none": ("≤ 1", "≤ 0.3"), "delta scalar": ("≤ 1", "≤ 0.3"),
    "diagonal": ("≤ 0.25", "≤ 0.05"),
}  # fmt: skip
"""Of the time of causal softmax attention at 4096 and at 16384 tokens."""


def prepare(row: str, length: int, given: argparse.Namespace) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of leaves that returns y, and the leaves: q [1, H, T, K], k and v [1, G, T, K], decays in fp32."""
    (heads, groups), width, device = given.heads, given.width, given.device
    shape = (1, groups, length, width)
    low = {"device": device, "dtype": getattr(torch, given.dtype)}
    q, k, v = torch.randn(1, heads, length, width, **low), torch.randn(shape, **low), torch.randn(shape, **low)
    raw = torch.randn(shape, device=device) * 3
    raw[..., :4] -= 50
    channel = F.logsigmoid(raw) / TAU
    decays = {"scalar": [channel.mean(-1, keepdim=True)], "channel": [channel], "naive": [channel]}
    family, _, kind = row.partition(" ")
    decay = decays.get(kind or row, [])
    if family == "mixer":
        mixer = mixer_of(kind, given)
        form, leaves = lambda q, k, v: mixer(q, k, v, context(q)), [q, k, v]
    elif row == "softmax":
        form, leaves = lambda q, k, v: softmax(q, k, v, causal=True), [q, k, v]
    elif row == "window":
        form, leaves = window, [q, k, v]
    elif row == "diagonal":
        form, leaves = lambda *x: diagonal.chunked(*x)[0], [v, channel]
    elif family == "delta":
        beta = torch.rand(1, groups, length, 1, **low)
        form, leaves = lambda *x: delta.chunked(*x)[0], [q, F.normalize(k, dim=-1), v, beta, *decay]
    else:
        recurrence: Callable[..., Any] = additive.recurrent if row == "naive" else additive.chunked
        form, leaves = lambda *x: recurrence(*x)[0], [q.softmax(-1), k.softmax(-1), v, *decay]
    return form, [leaf.requires_grad_() for leaf in leaves]


def mixer_of(name: str, given: argparse.Namespace) -> Any:
    """A mixer with its gate half open."""
    geometry = Geometry(*given.heads, given.width, given.width)
    name, _, count = name.partition(" ")
    own = {"name": name, "clusters": int(count), "state_dtype": "int4"} if count else {}
    mixer = make(name, {"window": WINDOW, "sinks": SINKS, **own}, geometry).to(given.device)
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    return mixer


def softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's attention, with fewer heads of keys than of queries."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention to the last tokens and the first ones."""
    local_k, local_v = (F.pad(x, (0, 0, WINDOW, 0)) for x in (k, v))
    sinks_k, sinks_v = (x[:, :, :SINKS] for x in (k, v))
    y, *_ = window_attention(q, local_k, local_v, sinks_k, sinks_v, seen=0, window=WINDOW, scaling=q.shape[-1] ** -0.5)
    return y


def one_pass(form: Callable[..., Tensor], leaves: list[Tensor], backend: str = "") -> None:
    """A forward and a backward pass, with LINEARIZE_BACKEND set if a backend is named."""
    with mock.patch.dict(os.environ, {"LINEARIZE_BACKEND": backend}):
        y = form(*leaves)
        torch.autograd.grad(y, leaves, torch.ones_like(y))


def part_time(length: int, given: argparse.Namespace) -> Iterator[Cell]:
    """Seconds of a pass, all rows interleaved; a mixer is a row for each backend."""
    passes = {}
    for row in (row for row in given.rows if row != "naive" or length in given.naive):
        form, leaves = prepare(row, length, given)
        for backend in given.backends if row.startswith("mixer") else [""]:
            call = passes[f"{row}, {backend}" if backend else row] = partial(one_pass, form, leaves, backend)
            call()
    seconds = common.interleaved(passes, given.repeats, given.device)
    if "naive" in given.rows and length == given.naive_once and length not in given.naive:
        seconds |= common.interleaved({"naive": partial(one_pass, *prepare("naive", length, given))}, 1, given.device)
    for row, times in seconds.items():
        yield {"part": "time", "row": row, "length": length} | summary(times)


def part_memory(length: int, given: argparse.Namespace) -> Iterator[Cell]:
    """One process per row: the peak of a pass less what the process held before it."""
    for row in given.rows:
        if row != "naive" or length in given.naive:
            what = {"row": row, "length": length}
            yield {"part": "memory"} | what | common.in_own_process(__file__, **what, given=given)


def worker(row: str, length: int, given: argparse.Namespace) -> Cell:
    """Bytes that a pass adds to what this process holds."""
    torch.set_num_threads(given.threads)
    one_pass(*prepare(row, 128, given))  # libraries that load on first use are no memory of the pass
    form, leaves = prepare(row, length, given)
    before = forget_peak()
    one_pass(form, leaves)
    return {"peak_bytes": status(PEAK) - before}


@torch.inference_mode()
def part_decode(given: argparse.Namespace) -> Iterator[Cell]:
    """Seconds of one decoding step of a mixer, and of softmax over CONTEXT cached tokens."""
    heads, groups = given.heads
    like = torch.zeros((), device=given.device, dtype=getattr(torch, given.dtype))
    q, k = (like.new_ones(given.batch, *size, given.width) for size in ((heads, 1), (groups, CONTEXT)))
    steps = {"softmax": lambda: softmax(q, k, k, causal=False)}
    mixers = [row for row in given.rows if row.startswith("mixer")]
    steps |= {row: decoder(mixer_of(row.partition(" ")[2], given), like, given.batch) for row in mixers}
    if mixers:
        for step in steps.values():
            step()
        for row, times in common.interleaved(steps, given.repeats, given.device).items():
            yield {"part": "decode", "row": row, "batch": given.batch} | summary(times)


def claims(cells: list[Cell]) -> list[Claim]:
    """The promised numbers, where this run has measured what they need."""
    made: list[Claim] = []
    for (row, pair), (index, length) in product(LIMITS.items(), enumerate((4096, 16384))):
        name, over = f"{row}: time over softmax's at {length}", {"row": row}
        made += common.ratio(cells, name, pair[index], "seconds", over, {"row": "softmax"}, part="time", length=length)
    name, over, under = "naive: time over additive channel's at 4096", {"row": "naive"}, {"row": "additive channel"}
    made += common.ratio(cells, name, "≥ 20", "seconds", over, under, part="time", length=4096)
    lengths = sorted({cell["length"] for cell in cells if "length" in cell})
    for row in ROWS[1:-1] if len(lengths) > 1 else ():
        # The longest two: shorter passes partly fit into what the process holds before them. A tenth is for what
        # rounds up.
        short, long = lengths[-2:]
        name, limit = f"{row}: memory at {long} over {short}", f"≤ {1.1 * long / short:.4g}"
        over, under = {"length": long}, {"length": short}
        made += common.ratio(cells, name, limit, "peak_bytes", over, under, part="memory", row=row)
    return made


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines: a table by row and length, decoding, and the claims."""
    cells, machine, settings = results["cells"], results["environment"], results["settings"]
    (heads, groups), dtype = settings["heads"], settings["dtype"]
    decoding = [(c["row"], f"{1e3 * c['seconds']:.3f}") for c in cells if c["part"] == "decode"]
    return [
        f"Recurrences: {machine['cpu']}, {machine['threads']} threads, {machine['device']}, commit "
        f"{machine['commit']}.",
        f"Forward and backward, {dtype}, batch 1, {heads} heads of {settings['width']}, {groups} of keys: median time, "
        "and memory that a pass adds.",
        *common.rows_by_length(cells, "softmax", ms=True, scale=2.0**-20, unit="MiB"),
        *(common.table((f"decoding, batch {settings['batch']}", "ms"), decoding) if decoding else []),
        *common.claims_table(results["claims"], f"batch 1, {dtype}"),
    ]


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, name="bench-ops")
    gpu = "cuda" in sys.argv
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--rows", nargs="+", choices=(*ROWS, *MIXER_ROWS, *CLUSTER_ROWS), default=GPU_ROWS if gpu else ROWS
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS if gpu else ["torch"])
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--heads", nargs=2, type=int, default=[16, 4] if gpu else [9, 9], help="of queries, of keys")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096] if gpu else [1024, 4096, 16384])
    parser.add_argument("--naive", nargs="+", type=int, default=[1024], help="lengths at which the naive form runs too")
    parser.add_argument("--naive-once", type=int, default=4096, help="a length at which it is timed once")
    parser.add_argument("--batch", type=int, default=8, help="rows of a decoding step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    given = parser.parse_args()
    if given.worker:
        return print(json.dumps(worker(**read_task())))
    results, target = common.begin(given, given.device)
    for length in given.lengths:
        common.collect(results, part_time(length, given), claims, target)
        if not given.no_memory and not gpu:
            common.collect(results, part_memory(length, given), claims, target)
    common.collect(results, part_decode(given), claims, target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
