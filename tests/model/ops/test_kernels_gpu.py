"""Every recurrence and mixer on fla's Triton kernels against PyTorch; on a machine without a GPU, the same comparison
of the chunked forms on a CPU at a small size.

A recurrence is held to its token-by-token form in fp64 on the same inputs: outputs, final states and gradients. What is
allowed is twice the error of that form in the tested dtype, plus a share (`SLACK`) of the largest number in question. A
mixer is held to its own PyTorch form in fp32 in the same way. Where a recurrence has no kernels, PyTorch runs it on the
GPU.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.conversion.costs import context, make
from linearize.model import ops
from linearize.model.mixers import MIXERS, Geometry
from linearize.model.ops import additive, average, clusters, clusters_backend, delta, diagonal, dplr, fla_backend, slots

TAU = 16.0
SLACK = {
    ("torch", "float32"): 1e-3,
    ("torch", "bfloat16"): 1e-3,
    # Kernels multiply in TF32, with 10 bits of mantissa: 1.9e-3 in gradients.
    ("fla", "float32"): 5e-3,
    # They round what goes from chunk to chunk, too: 1.5e-2 in the gradients of slots and of the delta rule.
    ("fla", "bfloat16"): 2.5e-2,
}
"""By backend and dtype. Those of fla are from fla's kernels in Triton's interpreter (eval/results/check-kernels.md)."""
CONFIGURATIONS = 2
"""Of each kernel that are tried: a cold machine would take half an hour to compile all 2,000, and numbers do not depend
on which one is the fastest. Not 1: on some devices the first has no room."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = {
    "additive": (ops.run_additive, additive.recurrent),
    "delta": (ops.run_delta, delta.recurrent),
    "slots": (slots.run, slots.recurrent),
    "dplr": (dplr.chunked, dplr.recurrent),
    "diagonal": (diagonal.chunked, diagonal.recurrent),
    "average": (average.chunked, average.recurrent),
}
"""Family -> what a mixer calls, and the definition."""
NAMES = (
    "additive none", "additive head", "additive channel", "delta none", "delta head", "delta channel", "slots", "dplr",
    "diagonal", "average",
)  # fmt: skip
HAVE_KERNELS = [name for name in NAMES if name.split()[0] in ("additive", "delta", "slots")]
missing = "no CUDA device" if not torch.cuda.is_available() else fla_backend.missing()
merging_missing = "no CUDA device" if not torch.cuda.is_available() else clusters_backend.missing()

Made = dict[str, list[Tensor]]
"""Outputs, states and gradients."""


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu", 24, Geometry(2, 1, 8, 8)), id="torch"),
        pytest.param(
            ("fla", "cuda", 200, Geometry(16, 4, 64, 64)),  # 200 tokens: not whole chunks
            id="fla",
            marks=pytest.mark.skipif(missing is not None, reason=f"the kernels cannot run here: {missing}"),
        ),
    ]
)
def setting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int, Geometry]:
    """Device, tokens and heads, with the backend forced."""
    backend, *rest = request.param
    monkeypatch.setenv("LINEARIZE_BACKEND", backend)
    if backend == "fla":
        tuner = import_module("triton.runtime.autotuner").Autotuner
        prune = tuner.prune_configs
        monkeypatch.setattr(tuner, "prune_configs", lambda *args: prune(*args)[:CONFIGURATIONS])
    return tuple(rest)


def inputs(name: str, device: str, T: int, g: Geometry) -> list[Any]:
    """Arguments of a family's forms in fp64: keys normal, times 3, four channels of them near −50, as real ones are."""
    family, _, decay = name.partition(" ")
    H, G, K, V = g.heads, g.kv_heads, g.key_width, g.value_width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    raw = 3 * normal(2, G, T, K)
    raw[..., :4] -= 50
    channel = F.logsigmoid(raw) / TAU
    q, v, state = normal(2, H, T, K), normal(2, G, T, V), Exact(normal(2, G, K, V), leaf=False)
    log_decay = {"none": None, "head": Exact(channel.mean(-1, keepdim=True))}.get(decay, Exact(channel))
    if family == "additive":
        return [q.softmax(-1), raw.softmax(-1), v, log_decay, state]
    if family == "diagonal":
        return [v, Exact(F.logsigmoid(3 * normal(2, G, T, V)) / TAU), None, Exact(normal(2, G, V), leaf=False)]
    if family == "average":
        return [Exact(raw.mean(-1, keepdim=True)), F.pad(v, (0, 1), value=1.0)]
    if family == "slots":
        g_slots = channel[..., : min(K, 64)]
        M = g_slots.shape[-1]
        states = Exact(normal(2, G, K, M), leaf=False), Exact(normal(2, G, M, V), leaf=False)
        return [q, raw.softmax(-1), v, -torch.expm1(g_slots), Exact(g_slots), states]
    q, k = F.normalize(q, dim=-1), F.normalize(raw, dim=-1)
    if family == "delta":
        return [q, k, v, normal(2, G, T, 1).sigmoid(), log_decay, state]
    removed = F.logsigmoid(raw).mul(0.5).exp() * k
    return [q, removed, v, -removed, removed, log_decay, state]


class Exact:
    """A tensor that mixers hand over in fp32 whatever the model's dtype: a decay, a score, a state.

    Args:
        value: in fp64.
        leaf: whether its gradient is compared; not that of a state, which training never asks for.
    """

    def __init__(self, value: Tensor, leaf: bool = True):
        self.value, self.leaf = value, leaf


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Leaves in a dtype."""
    if isinstance(x, list | tuple):
        return type(x)(cast(each, dtype) for each in x)
    if x is None:
        return None
    if isinstance(x, Exact):
        return x.value.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_(x.leaf)
    return x.to(dtype).detach().requires_grad_()


def results(form: Callable[..., tuple], x: list[Any]) -> Made:
    """What a form gives, and the gradients of a weighted sum of its outputs."""
    y, *rest = form(*x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    leaves = [leaf for leaf in x if isinstance(leaf, Tensor) and leaf.requires_grad]
    last = rest[-1] if isinstance(rest[-1], tuple) else (rest[-1],)
    gradients = torch.autograd.grad((y * weight).sum(), leaves)
    return {"output": [y], "state": list(last), "gradient": list(gradients)}


def errors(made: Made, truth: Made) -> dict[str, float]:
    """Largest difference as a share of the largest number, or of 1 where that is smaller."""

    def one(a: Tensor, b: Tensor) -> float:
        a, b = a.detach().double(), b.detach().double()
        worst = float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
        return worst if worst == worst else float("inf")

    return {what: max(map(one, made[what], truth[what])) for what in truth}


def check(made: Made, reference: Made, truth: Made, slack: float) -> None:
    """The module's docstring says what is allowed."""
    error, usual = errors(made, truth), errors(reference, truth)
    limit = {what: 2 * usual[what] + slack for what in error}
    short = {what: (error[what], limit[what]) for what in error if error[what] > limit[what]}
    assert not short, f"error, limit: {short}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_recurrence_is_its_definition(name: str, dtype: str, setting: tuple[str, int, Geometry]) -> None:
    run, definition = FORMS[name.split()[0]]
    x = inputs(name, *setting)
    low = cast(x, DTYPES[dtype])
    assert ops.has_kernels(lambda: run(*low)) == (name in HAVE_KERNELS)
    slack = SLACK[os.environ["LINEARIZE_BACKEND"], dtype]
    check(results(run, low), results(definition, low), results(definition, cast(x, torch.float64)), slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["window", *(name for name, cls in MIXERS.items() if cls.recurrent)])
def test_a_mixer_is_its_pytorch_form(
    name: str, dtype: str, setting: tuple[str, int, Geometry], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, T, g = setting
    mixer = make(name, {"window": T // 4}, g).to(device)
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    widths = ((g.heads, g.key_width), (g.kv_heads, g.key_width), (g.kv_heads, g.value_width))
    qkv = [torch.randn(1, heads, T, width, device=device) for heads, width in widths]

    def whole(dtype: torch.dtype) -> Made:
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        y = mixer(*leaves, context(leaves[0]))
        weight = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
        return {"output": [y], "gradient": list(torch.autograd.grad((y.float() * weight).sum(), leaves))}

    made, slack = whole(DTYPES[dtype]), SLACK[os.environ["LINEARIZE_BACKEND"], dtype]
    monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
    check(made, whole(DTYPES[dtype]), whole(torch.float32), slack)


@pytest.mark.skipif(merging_missing is not None, reason=f"the kernels cannot run here: {merging_missing}")
@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize(("M", "C", "K"), [(32, 4, 16), (128, 16, 64), (464, 58, 64), (256, 32, 128)])
def test_clusters_merge_on_a_gpu_as_by_pytorch(
    M: int, C: int, K: int, dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters_backend, "PROGRAMS", programs)
    torch.manual_seed(0)
    B, G, S = 2, 2, 3
    rule = clusters.Rule(C, mass=0.3, expected=1.0, heads=2)
    given = [None if x is None else x.cuda() for x in clustered_block(B, G, M, C, K, S, dtype)]
    made = {}
    for backend in ("torch", "fla"):
        monkeypatch.setenv("LINEARIZE_BACKEND", backend)
        means, tape = (given[i].detach().requires_grad_() for i in (0, 2))
        every, sizes = clusters._Merges.apply(means, given[1], tape, *given[3:-1], rule, dtype, given[-1])  # type: ignore[misc]
        weight = torch.linspace(-1, 1, every.numel(), device="cuda").view_as(every)
        gradients = torch.autograd.grad((every * weight).sum(), (means, tape))
        went = clusters._merges(*given[:-1], rule, dtype, given[-1])[2]
        made[backend] = every.detach(), sizes, torch.stack(list(went)).long(), *gradients
    every, sizes, went, *gradients = zip(made["fla"], made["torch"], strict=True)
    assert torch.equal(*went)
    # Where means are rounded, sums in two orders may fall on two sides.
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.int8: 0.05, torch.uint8: 0.6}[dtype]
    torch.testing.assert_close(*every, rtol=0, atol=step)
    torch.testing.assert_close(*sizes, rtol=1e-4, atol=max(step, 1e-3) * K)
    for each in gradients:
        torch.testing.assert_close(*each, rtol=0, atol=1e-4)


@pytest.mark.skipif(merging_missing is not None, reason=f"the kernels cannot run here: {merging_missing}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8], ids=str)
def test_clusters_take_in_and_read_tokens_in_a_graph_as_by_pytorch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    B, H, G, K, M, C, T = 2, 4, 2, 64, 128, 16, 180
    rule = clusters.Rule(C, mass=torch.full((H,), 0.3, device="cuda"), expected=1.0, heads=H // G, scaling=K**-0.5)
    q, k, v = (torch.randn(B, n, T, K, device="cuda") for n in (H, G, G))
    exists = (torch.rand(B, 1, T, 1, device="cuda") > 0.1).float().expand(-1, G, -1, -1).contiguous()
    k, v = k * exists, v * exists

    def step(q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        clusters.update_state(k, v, exists, state, rule)
        y, weight = clusters.read_state(q, state, rule)
        return torch.cat([y, weight.unsqueeze(-1)], -1)

    def fresh() -> tuple[Tensor, ...]:
        return clusters.initial_state(B, G, K, K, M, q.device, None if dtype == torch.float32 else dtype)

    with torch.no_grad():
        monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
        state = fresh()
        expected = [step(*(x[:, :, i : i + 1] for x in (q, k, v, exists)), state) for i in range(T)]
        monkeypatch.setenv("LINEARIZE_BACKEND", "fla")
        given, kept = [x[:, :, :1].clone() for x in (q, k, v, exists)], fresh()
        step(*given, fresh())  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(*given, kept)
        for i, wanted in enumerate(expected):
            for x, token in zip(given, (q, k, v, exists), strict=True):
                x.copy_(token[:, :, i : i + 1])
            graph.replay()
            torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_the_block_that_kernels_are_held_to_stops_where_it_says(dtype: torch.dtype) -> None:
    *given, centre = clustered_block(2, 2, 32, 4, 16, 3, dtype)
    every, sizes, _ = clusters._merges(*given, clusters.Rule(4, 0.3, 1.0, 2), dtype, centre)
    assert torch.equal(every[-1][0], every[-2][0]) and not torch.equal(every[-1][1], every[-2][1])
    assert (sizes[-1][1, ..., 0].sum(-1) == sizes[0][1, ..., 0].sum(-1) + 3 * 4).all()


def clustered_block(
    B: int, G: int, M: int, C: int, K: int, S: int, dtype: torch.dtype
) -> list[Tensor | None]:  # fmt: skip
    """What `clusters._merges` takes, without rule and dtype: the first row stops before the last merge."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(B, G, *shape)

    centre = normal(1, 2 * K) if dtype == torch.uint8 else None
    there = torch.ones(1, dtype=torch.bool)
    means, tape = (clusters._rounded(normal(rows, 2 * K), there, K, dtype, centre) for rows in (M, S * C))
    sizes = torch.stack([torch.randint(1, 9, (B, G, M)).float(), normal(M).square()], -1)
    one = torch.tensor([1.0, 0.0]).repeat(B, G, S * C, 1)
    queries = 0.3 * normal(S + 1, K)
    metric = torch.cat([5 * M * (queries.square() + 0.5), 5 * M * queries], -1).cumsum(2)
    goes_on = torch.ones(B, S, dtype=torch.bool)
    goes_on[0, -1] = False
    tape[0, :, -C:], one[0, :, -C:] = 0, 0
    return [means, sizes, tape, one, metric, goes_on, centre]


def test_a_wrong_recurrence_and_a_nan_are_noticed() -> None:
    truth: Made = {"output": [torch.ones(3)]}
    for wrong in (torch.full((3,), 1.01), torch.tensor([1.0, float("nan"), 1.0])):
        with pytest.raises(AssertionError, match="error, limit: .*'output'"):
            check({"output": [wrong]}, truth, truth, 1e-3)
