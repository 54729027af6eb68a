"""Every recurrence that linearize sends to flash-linear-attention, on fla's own Triton kernels, without a GPU.

    bash scripts/check_kernels.sh                          # all, about ten minutes
    bash scripts/check_kernels.sh --only "delta head"      # operations whose name contains it

Calls go through linearize's own dispatch, to kernels that Triton's interpreter runs (triton_on_cpu.py says what that
does not cover); of linearize, only the question whether a tensor lies on a GPU is answered with yes. A cell is the
largest difference from the definition of the recurrence in fp64, as a share of the largest number: of outputs, final
states, and the gradients of all inputs and initial states. Mixers, which read packed texts, are held to their own
PyTorch form in fp32, and so is the merging of clusters, whose kernels are our own.

Writes eval/results/NAME.json after every cell, and a table (.md) beside it at the end.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any
from unittest import mock

import triton_on_cpu

triton_on_cpu.load()

import bench_common as common  # noqa: E402
import torch  # noqa: E402
from bench_common import Cell  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from linearize.conversion.costs import context, make  # noqa: E402
from linearize.model import host, ops  # noqa: E402
from linearize.model.mixers import Geometry  # noqa: E402
from linearize.model.ops import (  # noqa: E402
    additive,
    bonus,
    clusters,
    clusters_backend,
    delta,
    expansion,
    fla_backend,
    rotation,
    slots,
)
from linearize.model.ops.rows import Rows  # noqa: E402

KINDS = ("none", "head", "fixed", "channel")
"""Of decays: of a head and token, of a head whatever the token, of a channel."""
MEANS = (0, 8, -30)
"""Mean scores of the tokens in an expansion; its keys have a common part, as real ones have."""
FP32 = ("log_decay", "beta", "input_gate", "state", "angle", "exists", "bonus")
"""What mixers hand over in fp32 whatever the model's dtype."""
TEXTS = (3, 17, 1, 25)
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """Sizes, and what is allowed: fp32 sums in another order 2e-5; TF32 has 10 bits of mantissa, bf16 has 7.

    Attributes:
        limit: of the error.
        sizes: that differ from those of `inputs`.
        dtype: of queries, keys and values.
        tf32: whether products of fp32 are as on an NVIDIA GPU.
    """

    limit: float = 2e-5
    sizes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tf32: bool = False


CHECKS = {
    "fp32": Check(),
    "4:2 heads, 2 rows, odd widths, no state": Check(
        sizes={"B": 2, "H": 4, "T": 65, "K": 20, "V": 17, "state": False, "absent": True}
    ),
    "1 token": Check(sizes={"T": 1, "H": 4}),
    "widest": Check(sizes={"T": 20, "H": 1, "G": 1, "wide": True}),
    "decay to -41,000": Check(5e-5, {"strong": 41000.0}),
    "bf16, odd widths": Check(2.5e-2, {"G": 1, "V": 17}, torch.bfloat16),
    "TF32": Check(5e-3, tf32=True),
    "packed texts": Check(1e-4),
}


def inputs(
    family: str, kind: str, *, B: int = 1, H: int = 2, G: int = 2, T: int = 70, K: int = 16, V: int = 16,
    state: bool = True, absent: bool = False, wide: bool = False, strong: float = 0.0,
) -> Inputs:  # fmt: skip
    """Arguments of a family's forms in fp64."""
    if wide:
        K, V = fla_backend.WIDEST.get(family, fla_backend.WIDEST["additive"]), 272

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    x: Inputs = {"q": normal(B, H, T, K), "k": normal(B, G, T, K), "v": normal(B, G, T, V)}
    there = (torch.rand(B, 1, T, 1) > 0.3 * absent).double()
    there[:, :, 0] = 1.0  # an average of no tokens has no value, and no gradient
    x["k"], x["v"] = x["k"] * there, x["v"] * there
    M = min(K, 12)
    shape = {"none": None, "head": (B, G, T, 1), "fixed": (G, 1, 1), "channel": (B, G, T, K), "slots": (B, G, T, M)}
    if (size := shape[kind]) is not None:
        decay = F.logsigmoid(normal(*size) + 2)
        harsh = torch.rand(size) < 0.15 * bool(strong)  # mostly mild, some wipe the state out
        decay = torch.where(harsh, -strong * torch.rand(size, dtype=torch.float64), decay)
        x["log_decay"] = decay if kind == "fixed" else decay * there
    if state:
        x["state"] = normal(B, G, K, V)
    if family == "delta":
        x["q"], x["k"] = F.normalize(x["q"], dim=-1), F.normalize(x["k"], dim=-1)
        x["beta"] = torch.rand(B, G, T, 1, dtype=torch.float64) * there
    elif family == "slots":
        x["input_gate"] = -torch.expm1(x["log_decay"])
        x["state"] = normal(B, G, K, M), normal(B, G, M, V)
    elif family == "bonus":
        x |= {"exists": there.expand(B, G, T, 1), "bonus": torch.rand(H, K, dtype=torch.float64)}
        x["state"] = normal(B, G, K, V), *(torch.zeros(B, G, 1, n, dtype=torch.float64) for n in (K, V, K))
    elif family == "rotation":
        x |= {"angle": normal(B, G, T, K) * there, "state": (normal(B, G, 2 * K, V), normal(B, G, 1, K))}
    return x


def expansion_inputs(mean: float, **sizes: Any) -> Inputs:
    """The same for the expansion, with q·k about `mean` after scaling."""
    x = inputs("expansion", "head", **sizes)
    k, there = x.pop("k"), (x["v"] != 0).any(-1, keepdim=True).double()
    common_key = torch.randn(k.shape[-1], dtype=torch.float64)
    x["q"] = x["q"] + common_key
    k = k + common_key * (mean / SCALING / float(common_key @ common_key)) * there
    x |= {"k1": torch.cat([k, there], -1), "v1": torch.cat([x.pop("v"), there], -1)}
    start = expansion.initial_state(*k.shape[:2], k.shape[-1], x["v1"].shape[-1] - 1, k.device)
    start = tuple(each.double() for each in start)
    if x.pop("state", None) is not None:
        with torch.no_grad():
            start = run_expansion(**{name: each.flip(-2) for name, each in x.items()}, state=start)[2]
    return x | {"state": start}


SCALING, STRENGTH = 0.25, 1.5


def run_expansion(k1: Tensor, v1: Tensor, **x: Any) -> tuple:
    there = k1[..., -1:].detach()  # as mixers have it, what does not exist has no gradient
    return expansion.run(k1=k1 * there, v1=v1 * there, **x, scaling=SCALING, strength=STRENGTH)


FORMS: dict[str, tuple[Callable[..., tuple], Callable[..., tuple]]] = {
    "additive": (ops.run_additive, additive.recurrent),
    "delta": (ops.run_delta, delta.recurrent),
    "slots": (slots.run, slots.recurrent),
    "expansion": (run_expansion, run_expansion),
    "bonus": (bonus.run, bonus.run),
    "rotation": (rotation.run, rotation.run),
}
"""Family -> what mixers call, and the definition; in fp64 nothing goes to a kernel."""


def outcome(form: Callable[..., tuple], x: Inputs) -> dict[str, Tensor]:
    """Outputs, final states, and by argument the gradients of a weighted sum of both."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(f"{name} {i}", each) for i, each in enumerate(value))
        # A fixed decay and a bonus are constants in all mixers; only what has tokens or is a state has a gradient.
        leaves[name] = value.detach().clone().requires_grad_(name != "exists" and value.ndim == 4)
        return leaves[name]

    made = [each for part in form(**{name: leaf(name, value) for name, value in x.items()}) for each in flat(part)]
    # A log weight of −inf stands for no token.
    total = sum((shape(each) * each.double().nan_to_num(neginf=0.0)).sum() for each in made)
    wanted = [each for each in leaves.values() if each.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    names = [f"output {i}" for i in range(len(made))] + [f"d {n}" for n, each in leaves.items() if each.requires_grad]
    return dict(zip(names, (each.detach() for each in (*made, *gradients)), strict=True))


def flat(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def shape(x: Tensor) -> Tensor:
    """Weights of x's elements, all different."""
    return torch.linspace(-40, 40, x.numel(), dtype=torch.float64).sin().view_as(x)


def cast(x: Inputs, dtype: torch.dtype) -> Inputs:
    def one(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(name, each) for each in value)
        return value.to(torch.promote_types(dtype, torch.float32) if name in FP32 else dtype)

    return {name: one(name, value) for name, value in x.items()}


def error(made: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """The largest, and what has it; infinite where a number is not one."""

    def one(a: Tensor, b: Tensor) -> float:
        a, b = a.double(), b.double()
        if not torch.equal(a.isinf(), b.isinf()) or bool(a.isnan().any()):
            return float("inf")
        a, b = a.nan_to_num(neginf=0.0), b.nan_to_num(neginf=0.0)
        return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if a.numel() and b.any() else float(a.any())

    return max((one(made[name], truth[name]), name) for name in truth)


# --- what is checked


def operations() -> Iterator[tuple[str, str, Callable[..., Inputs]]]:
    """Name, family, and what makes its inputs."""
    for family in ("additive", "delta"):
        for kind in KINDS:
            yield f"{family} {kind}", family, lambda family=family, kind=kind, **sizes: inputs(family, kind, **sizes)
    yield "slots", "slots", lambda **sizes: inputs("slots", "slots", **sizes)
    for family in ("bonus", "rotation"):
        yield family, family, lambda family=family, **sizes: inputs(family, "channel", **sizes)
    for mean in MEANS:
        yield f"expansion {mean}", "expansion", lambda mean=mean, **sizes: expansion_inputs(mean, **sizes)


MIXERS = {
    "mixer gla": {}, "mixer gla liger": {"combine": "liger"}, "mixer linear": {}, "mixer kda": {},
    "mixer delta_net": {}, "mixer gated_deltanet": {}, "mixer rwkv6": {}, "mixer gsa none": {"combine": "none"},
}  # fmt: skip


def cells(given: Any) -> Iterator[Cell]:
    for name, family, make_inputs in operations():
        for check, how in CHECKS.items():
            has_decay = name not in ("additive none", "delta none")
            fits = {"decay to -41,000": has_decay, "packed texts": False, "widest": family not in ("bonus", "rotation")}
            if given.only in name and fits.get(check, True):
                torch.manual_seed(given.seed)
                low = cast(make_inputs(**how.sizes), how.dtype)
                run, definition = FORMS[family]
                exact = cast(low, torch.float64)
                yield compared(name, check, partial(outcome, run, low), partial(outcome, definition, exact))
    for name, options in MIXERS.items():
        if given.only in name:
            torch.manual_seed(given.seed)
            yield compared(name, "packed texts", *packed_mixer(name.split()[1], options))
    for name, sizes in CLUSTERS.items():
        if given.only in name:
            torch.manual_seed(given.seed)
            yield compared(name, "fp32", *merged_clusters(**sizes))


def packed_mixer(name: str, options: dict[str, Any]) -> list[Callable[[], dict[str, Tensor]]]:
    """A mixer with its window over packed texts, by kernels and by PyTorch."""
    g = Geometry(4, 2, 16, 16)
    mixer = make(name, {"window": 8, "sinks": 2} | options, g)
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    rows = Rows.from_positions(torch.cat([torch.arange(n) for n in TEXTS])[None])
    x = {n: torch.randn(1, heads, sum(TEXTS), 16) for n, heads in (("q", 4), ("k", 2), ("v", 2))}

    def form(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        where = context(q)
        where.rows = rows
        return (mixer(q, k, v, where),)

    def by_pytorch() -> dict[str, Tensor]:
        with mock.patch.dict("os.environ", LINEARIZE_BACKEND="torch"):
            return outcome(form, x)

    return [lambda: outcome(form, x), by_pytorch]


CLUSTERS = {
    "clusters 32:4": {"M": 32, "C": 4, "dtype": None}, "clusters 128:16 bf16": {"dtype": torch.bfloat16},
    "clusters 40:5 int8": {"M": 40, "C": 5, "K": 12, "V": 20, "dtype": torch.int8},
    "clusters 40:5 int4": {"M": 40, "C": 5, "V": 16, "dtype": torch.uint8},
    "clusters 736:92 int4": {"M": 736, "C": 92, "K": 64, "V": 64, "B": 1, "G": 1, "dtype": torch.uint8, "steps": 0},
    "clusters 40:5 int4, odd widths": {"M": 40, "C": 5, "K": 20, "V": 20, "dtype": torch.uint8, "split": True},
    "clusters 40:5 plain": {"M": 40, "C": 5, "dtype": None, "mass": 0.0, "expected": 0.0},
    "clusters 464:58": {"M": 464, "C": 58, "K": 64, "V": 64, "B": 1, "G": 1, "dtype": None, "steps": 0},
    "clusters 40:5 split": {"M": 40, "C": 5, "dtype": torch.int8, "split": True},
    "clusters 40:5 capped": {"M": 40, "C": 5, "mass": torch.rand(4), "softcap": 5.0},
}  # fmt: skip


def merged_clusters(
    M: int = 128, C: int = 16, K: int = 16, V: int = 32, B: int = 2, G: int = 2, dtype: torch.dtype | None = None,
    mass: float | Tensor = 0.3, expected: float = 1.0, steps: int = 3, split: bool = False,
    softcap: float | None = None,
) -> list[Callable[[], dict[str, Tensor]]]:  # fmt: skip
    """A block in which clusters are merged twice, tokens are absent, and rows end apart; its gradients; and a few
    tokens after it, one by one; by kernels and by PyTorch. Where each cluster went is part of it."""
    T, rule = M + 2 * C - C // 2, clusters.Rule(C, mass, expected, heads=2, scaling=K**-0.5, softcap=softcap)
    q, k, v = (torch.randn(B, n, T, w) for n, w in ((2 * G, K), (G, K), (G, V)))
    there = (torch.rand(B, 1, T, 1) > 0.02).float()
    there[1:, :, M + C :] = 0  # rows that merge only once
    there = there.expand(-1, G, -1, -1)

    def form(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        state = clusters.initial_state(B, G, K, V, M, q.device, dtype)
        with mock.patch.multiple(clusters_backend, SPLIT=split, PROGRAMS=3 if split else 1):
            y, weight, state = clusters.run(q, k * there, v * there, there, state, rule)
        after, read = tuple(x.detach().clone() for x in state), []
        for i in range(steps * C):
            query, *token = (x[:, :, i : i + 1].detach() for x in (q, k, v))
            clusters.update_state(*token, torch.ones(B, G, 1, 1), after, rule)
            read.append(torch.cat([x.flatten() for x in clusters.read_state(query, after, rule)]))
        return y, weight, *(x.float() for x in (*state, *after, *read))

    x = {"q": q, "k": k, "v": v}

    def by_pytorch() -> dict[str, Tensor]:
        with mock.patch.dict("os.environ", LINEARIZE_BACKEND="torch"):
            return outcome(form, x)

    return [lambda: outcome(form, x), by_pytorch]


def compared(
    name: str, check: str, run: Callable[[], dict[str, Tensor]], truth: Callable[[], dict[str, Tensor]]
) -> Cell:
    """One cell of the table: the largest error, the kernels that were called, and whether it holds."""
    how, called, start = CHECKS[check], [], time.monotonic()
    cell: Cell = {"operation": name, "check": check, "limit": how.limit}
    kernel, ours = fla_backend.kernel, clusters_backend._kernels

    def of_clusters() -> Any:
        called.append("clusters_triton")
        return ours()

    def noted(module: str, name: str) -> Callable[..., Any]:
        called.append(name)
        return kernel(module, name)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ops, "on_gpu", lambda x: x.dtype != torch.float64))
        stack.enter_context(mock.patch.object(host, "is_free", lambda x: x.dtype == torch.float64))
        stack.enter_context(mock.patch.object(fla_backend, "kernel", noted))
        stack.enter_context(mock.patch.object(clusters_backend, "_kernels", of_clusters))
        stack.enter_context(triton_on_cpu.tf32() if how.tf32 else nullcontext())
        try:
            worst, what = error(run(), truth())
        except Exception as failed:
            return cell | {"holds": False, "why": f"{type(failed).__name__}: {failed}"[:300]}
    cell |= {"error": float(f"{worst:.1e}"), "of": what, "kernels": sorted(set(called))}
    return cell | {"holds": bool(called) and worst <= how.limit, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = common.options(__doc__, name="check-kernels")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    given = parser.parse_args()
    given.threads = 1
    results, target = common.begin(given)
    results["packages"] = {name: version(name) for name in ("triton", "fla-core")}
    common.collect(results, cells(given), lambda _: [], target)
    made = results.get("cells", [])
    rows = []
    for name in dict.fromkeys(cell["operation"] for cell in made):
        own = {cell["check"]: cell for cell in made if cell["operation"] == name}
        kernels = sorted({kernel for cell in own.values() for kernel in cell.get("kernels", [])})
        rows.append([name, ", ".join(kernels), *(shown(own.get(check)) for check in CHECKS)])
    failed = [cell for cell in made if not cell["holds"]]
    limits = ("allowed", "", *(f"{how.limit:.0e}" for how in CHECKS.values()))
    lines = ["# Kernels, without a GPU", "", *(__doc__ or "").split("\n\n")[2].splitlines()]
    versions = ", ".join(f"{name} {number}" for name, number in results["packages"].items())
    lines += ["", f"{len(made) - len(failed)} of {len(made)} cells hold; {versions}."]
    lines += common.table(("operation", "kernels", *CHECKS), [limits, *rows], left=2)
    common.write_markdown(lines, target)
    return int(bool(failed) or not made)


def shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    number = f"{cell['error']:.0e}" if "error" in cell else "raises"
    return number if cell["holds"] else f"**{number}**"


if __name__ == "__main__":
    sys.exit(main())
