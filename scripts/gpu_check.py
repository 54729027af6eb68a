"""Parity and speed of every recurrence and mixer with fla's Triton kernels: what scripts/gpu_check.sh runs.

    python scripts/gpu_check.py                                 # one GPU, within --minutes
    python scripts/gpu_check.py --backend torch --device cpu --length 64 --parity-length 24 --heads 2,1 --width 8

Parity: outputs, final states and gradients against the naive form in fp64 on the same inputs. What is allowed is twice
the error of the naive form in the tested dtype, plus 1e-3, of the largest number in question. A mixer, window included,
is held to its own PyTorch form in fp32 in the same way. Speed, in bf16: a forward and backward pass beside the same in
PyTorch and beside causal SDPA; a decoding step beside SDPA over 8,192 cached tokens. Where a recurrence has no kernels
(`kernels: false`), PyTorch runs it on the GPU, and that is what is checked.

Writes eval/results/gpu-ops.json after every cell. When the minutes are over, the rest is listed as `left_out`. Exit
codes: 0 all holds, 1 something falls short or was left out, 2 there is no GPU or no kernels.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_common import Cell, numbers
from torch import Tensor
from torch.nn import functional as F

from linearize.conversion.costs import CONTEXT, context, decoder, make
from linearize.evaluation.clock import summary, timed
from linearize.evaluation.environment import environment
from linearize.model import ops
from linearize.model.mixers import MIXERS, Geometry, Mixer
from linearize.model.ops import additive, average, delta, diagonal, dplr, fla_backend, slots

TAU = 16.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = (
    "additive none", "additive head", "additive channel", "delta none", "delta head", "delta channel", "slots", "dplr",
    "diagonal", "average",
)  # fmt: skip

Form = Callable[..., tuple[Any, ...]]


def forms(family: str) -> tuple[Form, Form]:
    """What a mixer would call, and the naive form."""
    return {
        "additive": (ops.run_additive, additive.naive_recurrent),
        "delta": (ops.run_delta, delta.naive_recurrent),
        "slots": (slots.run, slots.naive_recurrent),
        "dplr": (dplr.chunked, dplr.naive_recurrent),
        "diagonal": (diagonal.chunked, diagonal.naive_recurrent),
        "average": (average.chunked, average.naive_recurrent),
    }[family]


def inputs(name: str, T: int, g: Geometry, device: torch.device) -> dict[str, Any]:
    """Arguments of a family's forms in fp64: keys normal, times 3, four channels of them near −50, as real ones are."""
    family, _, decay = name.partition(" ")
    H, G, K, V = g.heads, g.kv_heads, g.key_width, g.value_width
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, device=device)  # noqa: E731
    raw = 3 * normal(2, G, T, K)
    raw[..., :4] -= 50
    channel = F.logsigmoid(raw) / TAU
    q, k, v, state = normal(2, H, T, K), raw.softmax(-1), normal(2, G, T, V), normal(2, G, K, V)
    g_of = {"none": None, "head": channel.mean(-1, keepdim=True)}.get(decay, channel)
    if family == "additive":
        return {"q": q.softmax(-1), "k": k, "v": v, "log_decay": g_of, "state": state}
    key = {"q": F.normalize(q, dim=-1), "k": F.normalize(raw, dim=-1), "v": v, "log_decay": g_of, "state": state}
    if family == "delta":
        return key | {"beta": normal(2, G, T, 1).sigmoid()}
    if family == "dplr":
        removed = F.logsigmoid(raw).mul(0.5).exp() * key["k"]
        return key | {"k": removed, "a": -removed, "b": removed}
    if family == "slots":
        M = min(K, 64)
        g_slots = channel[..., :M]
        return {
            "q": q, "k": k, "v": v, "write": -torch.expm1(g_slots), "log_decay": g_slots,
            "state": (normal(2, G, K, M), normal(2, G, M, V)),
        }  # fmt: skip
    if family == "diagonal":
        decay_v = F.logsigmoid(3 * normal(2, G, T, V)) / TAU
        return {"x": v, "log_decay": decay_v, "state": normal(2, G, V)}
    return {"score": raw.mean(-1, keepdim=True), "v": F.pad(v, (0, 1), value=1.0)}


# --- parity -----------------------------------------------------------------------------------------------------------

EXACT = ("log_decay", "state", "score")
"""What mixers hand over in fp32 whatever the model's dtype."""


def cast(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(name, each) for each in value)
        if value is None:
            return None
        low = torch.promote_types(dtype, torch.float32) if name in EXACT else dtype
        return value.to(low).detach().requires_grad_(name != "state")

    return {name: one(name, value) for name, value in x.items()}


def results(form: Form, x: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Outputs, states and gradients of a weighted sum of the outputs."""
    y, *rest = form(**x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    leaves = [t for t in x.values() if isinstance(t, Tensor) and t.requires_grad]
    last = rest[-1] if isinstance(rest[-1], tuple) else (rest[-1],)
    return {"output": [y], "state": list(last), "gradient": list(torch.autograd.grad((y * weight).sum(), leaves))}


def errors(found: dict[str, list[Tensor]], truth: dict[str, list[Tensor]]) -> dict[str, float]:
    """Largest difference as a share of the largest number, or of 1 where that is smaller."""

    def one(a: Tensor, b: Tensor) -> float:
        a, b = a.detach().double(), b.detach().double()
        worst = float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
        return worst if worst == worst else float("inf")

    return {what: max(map(one, found[what], truth[what])) for what in truth}


def verdict(found: dict[str, float], reference: dict[str, float]) -> Cell:
    limits = {what: 2 * reference[what] + 1e-3 for what in reference}
    return {"error": found, "limit": limits, "holds": all(found[what] <= limits[what] for what in limits)}


def part_family(name: str, given: argparse.Namespace) -> Iterator[Cell]:
    run, naive = forms(name.split(" ")[0])
    x = inputs(name, given.parity_length, given.geometry, given.device)
    truth = results(naive, cast(x, torch.float64))
    for label, dtype in DTYPES.items():
        low = cast(x, dtype)
        kernels = ops.has_kernels(lambda low=low: forced(given.backend, lambda: run(**low)))
        found = forced(given.backend, lambda low=low: results(run, low))
        yield {"part": "parity", "row": name, "dtype": label, "kernels": kernels} | verdict(
            errors(found, truth), errors(results(naive, low), truth)
        )


def forced(backend: str, call: Callable[[], Any]) -> Any:
    """With LINEARIZE_BACKEND set for a while."""
    before = os.environ.get("LINEARIZE_BACKEND")
    os.environ["LINEARIZE_BACKEND"] = backend
    try:
        return call()
    finally:
        del os.environ["LINEARIZE_BACKEND"]
        if before is not None:
            os.environ["LINEARIZE_BACKEND"] = before


def prepared(name: str, T: int, given: argparse.Namespace) -> tuple[Mixer, list[Tensor]]:
    """A mixer with its gate half open, and q, k, v in fp32."""
    g = given.geometry
    mixer = make(name, {"window": min(64, T // 4)}, g).to(given.device)
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    widths = ((g.heads, g.key_width), (g.kv_heads, g.key_width), (g.kv_heads, g.value_width))
    return mixer, [torch.randn(1, heads, T, width, device=given.device) for heads, width in widths]


def part_mixer(name: str, given: argparse.Namespace) -> Iterator[Cell]:
    mixer, qkv = prepared(name, given.parity_length, given)
    run = lambda q, k, v: mixer(q, k, v, context(q))  # noqa: E731

    def whole(dtype: torch.dtype, backend: str) -> dict[str, list[Tensor]]:
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        y = forced(backend, lambda: run(*leaves))
        weight = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
        return {"output": [y], "gradient": list(torch.autograd.grad((y.float() * weight).sum(), leaves))}

    truth = whole(torch.float32, "torch")
    x = [x.detach() for x in qkv]
    kernels = ops.has_kernels(lambda: forced("torch", lambda: run(*x)))
    for label, dtype in DTYPES.items():
        yield {"part": "parity", "row": name, "dtype": label, "kernels": kernels} | verdict(
            errors(whole(dtype, given.backend), truth), errors(whole(dtype, "torch"), truth)
        )


# --- speed ------------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], given: argparse.Namespace) -> dict[str, float]:
    """Median and quartiles after one call that compiles and fills caches."""
    return summary([timed(call, given.device)[1] for _ in range(given.repeats + 1)][1:])


def both_ways(form: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    y = form(*leaves)
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def part_softmax(_: str, given: argparse.Namespace) -> Iterator[Cell]:
    leaves = [x.bfloat16().requires_grad_() for x in prepared("window", given.length, given)[1]]
    row = {"row": "softmax", "dtype": "bfloat16"}
    yield row | {"part": "train"} | seconds(lambda: both_ways(lambda *x: sdpa(*x, causal=True), leaves), given)
    g = given.geometry
    q = leaves[0].detach()[:, :, :1].repeat(given.batch, 1, 1, 1)
    k, v = (
        q.new_zeros(given.batch, g.kv_heads, given.cached, width).normal_() for width in (g.key_width, g.value_width)
    )
    yield row | {"part": "decode"} | seconds(lambda: sdpa(q, k, v, causal=False), given)


def part_speed(name: str, given: argparse.Namespace) -> Iterator[Cell]:
    mixer, qkv = prepared(name, given.length, given)
    leaves = [x.bfloat16().requires_grad_() for x in qkv]
    for backend in dict.fromkeys((given.backend, "torch")):
        run = lambda backend=backend: forced(  # noqa: E731
            backend, lambda: both_ways(lambda q, k, v: mixer(q, k, v, context(q)), leaves)
        )
        yield {"part": "train", "row": name, "dtype": "bfloat16", "backend": backend} | seconds(run, given)
    with torch.no_grad():
        step = decoder(mixer, leaves[0].detach(), given.batch)
        yield {"part": "decode", "row": name, "dtype": "bfloat16"} | seconds(step, given)


# --- the whole --------------------------------------------------------------------------------------------------------


def plan() -> list[tuple[str, str, Callable[[str, argparse.Namespace], Iterator[Cell]]]]:
    """All that is to be done, in order: what matters most first, as time may end before it."""
    mixers = [name for name, cls in MIXERS.items() if cls.recurrent]
    return [
        *(("family", name, part_family) for name in NAMES),
        *(("mixer", name, part_mixer) for name in mixers),
        ("speed", "softmax", part_softmax),
        *(("speed", name, part_speed) for name in ("window", *mixers)),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=ops.BACKENDS, default="fla")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--length", type=int, default=4096, help="tokens of a timed pass")
    parser.add_argument("--parity-length", type=int, default=200, help="tokens of a compared pass: not whole chunks")
    parser.add_argument("--cached", type=int, default=CONTEXT, help="tokens that SDPA has cached when decoding")
    parser.add_argument("--batch", type=int, default=8, help="rows of a decoding step")
    parser.add_argument("--heads", type=numbers, default=[16, 4], help="of queries and of keys")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing is begun after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "eval" / "results" / "gpu-ops.json")
    given = parser.parse_args()
    given.geometry = Geometry(*given.heads, given.width, given.width)
    return given


def impossible(given: argparse.Namespace) -> str | None:
    """Why the kernels cannot be checked here, or None."""
    if given.backend == "torch":
        return None
    if not torch.cuda.is_available():
        return "There is no CUDA device here, so the kernels cannot be checked."
    missing = fla_backend.missing()
    return None if missing is None else f"The kernels cannot be checked: {missing}."


def main() -> int:
    given = arguments()
    why = impossible(given)
    if why:
        print(why, file=sys.stderr)
        return 2
    torch.manual_seed(given.seed)
    options = {
        key: str(value) if isinstance(value, Path | torch.device) else value for key, value in vars(given).items()
    }
    options["geometry"] = vars(given.geometry)
    del options["out"]
    results: dict[str, Any] = {"schema": 1, "settings": options, "cells": [], "left_out": []}
    results["environment"] = environment(given.device, given.seed, {})
    given.out.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    for part, name, run in plan():
        if time.monotonic() > end:
            results["left_out"].append(f"{part} {name}")
            continue
        try:
            cells = list(run(name, given))
        except Exception as error:  # a kernel that does not compile must not hide what the others do
            cells = [{"part": part, "row": name, "holds": False, "raised": f"{type(error).__name__}: {error}"}]
        for cell in cells:
            print(json.dumps(cell), file=sys.stderr)
        results["cells"] += cells
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    results["holds"] = not results["left_out"] and all(cell.get("holds", True) for cell in results["cells"])
    given.out.write_text(json.dumps(results, indent=1) + "\n")
    short = [f"{c['part']} {c['row']} {c.get('dtype', '')}" for c in results["cells"] if not c.get("holds", True)]
    print("all holds" if results["holds"] else f"falls short: {short}; left out: {results['left_out']}")
    return 0 if results["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
