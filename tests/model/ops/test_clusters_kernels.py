"""Where clusters are merged by Triton kernels. There is no GPU here: PyTorch stands for the kernels, and says what they
were given; scripts/check_kernels.sh runs themselves."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from linearize.errors import InputError
from linearize.model import host, ops
from linearize.model.ops import clusters, clusters_backend, compact

B, H, G, T, K, V, M, C = 2, 4, 2, 40, 6, 5, 12, 3
RULE = clusters.Rule(C, 0.3, 1.0, H // G, 0.4)


class Kernel:
    """`kernel[grid](...)` notes its name and grid, asserts what a kernel that reads memory as it lies relies on, and
    calls a form."""

    def __init__(self, name: str, form, calls: list):
        self.name, self.form, self.calls = name, form, calls

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*given, **constants):
            assert all(x.is_contiguous() for x in given if isinstance(x, Tensor))
            self.calls.append((self.name, grid))
            self.form(*given, **constants)

        return launch


def merge_all(
    every, counts, went, tape, one, metric, centres, goes_on, real, whole, tickets, alpha, first, last, S, G, L,
    **constants,
):  # fmt: skip
    assert (first, last, alpha, L, goes_on.dtype) == (0, S, RULE.expected, S + 1, torch.uint8)
    assert constants["HEADS"] == RULE.heads and constants["M"] == M and constants["C"] == C and constants["WEIGHS"]
    dtype = [None, torch.bfloat16, torch.int8, torch.uint8][constants["DTYPE"]]
    assert constants["GROUP"] == (compact.groups(constants["K"], constants["V"], dtype) or [1])[0]
    centre = centres if dtype == torch.uint8 else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARIZE_BACKEND", "torch")
        made = clusters._merges(every[0], counts[0], tape, one, metric, goes_on > 0, RULE, dtype, centre)
    for x, new in zip((every, counts, went), (*made[:2], torch.stack(made[2])), strict=True):
        x.copy_(new)


def merge_gradient(given, counts, went, scratch, out, tape, S, **constants):
    ctx = SimpleNamespace(saved_tensors=(counts,), to=list(went.long()), chunk=C)
    first, _, rest, *_ = clusters._Merges.backward(ctx, given, None)
    out.copy_(first), tape.copy_(rest)


def state_of(kept, scales, units, sizes, queries, centres):
    """The state of which a kernel was given these parts, and others in the place of those that it does not have."""
    more = {torch.int8: [scales], torch.uint8: [scales, units, centres]}.get(kept.dtype, [])
    return kept, sizes, queries, *more


def take_in(kept, scales, units, sizes, queries, centres, keys, values, exists, *scratch, **constants):
    state = state_of(kept, scales, units, sizes, queries, centres)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARIZE_BACKEND", "torch")
        clusters.update_state(keys, values, exists, state, RULE)


def read_token(
    q, kept, scales, units, sizes, queries, centres, mass, same, y, weight, scaling, softcap, G, **constants
):
    assert (same, scaling, constants["OWN"], constants["CAPPED"]) == (RULE.mass, RULE.scaling, False, False)
    state = state_of(kept, scales, units, sizes, queries, centres)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARIZE_BACKEND", "torch")
        for x, new in zip((y, weight), clusters.read_state(q, state, RULE), strict=True):
            x.copy_(new)


FORMS = (merge_all, merge_gradient, take_in, read_token)


@pytest.fixture
def calls(monkeypatch) -> list:
    """What was launched, with CPU tensors as CUDA ones."""
    calls: list = []
    forms = {form.__name__: Kernel(form.__name__, form, calls) for form in FORMS}
    monkeypatch.delenv("LINEARIZE_BACKEND", raising=False)
    monkeypatch.setattr(clusters_backend, "_kernels", lambda: SimpleNamespace(**forms))
    monkeypatch.setattr(clusters_backend, "PROGRAMS", 1)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    monkeypatch.setattr(host, "is_free", lambda x: False)
    clusters_backend.missing.cache_clear()
    yield calls
    clusters_backend.missing.cache_clear()


def made(dtype: torch.dtype | None) -> list[Tensor]:
    """Of a block, its gradients, and a few steps."""
    torch.manual_seed(0)
    exists = (torch.rand(B, 1, T, 1) > 0.2).float().expand(-1, G, -1, -1)
    width = K if dtype == torch.uint8 else V
    q, k, v = (torch.randn(B, n, T, w, requires_grad=True) for n, w in ((H, K), (G, K), (G, width)))
    state = clusters.initial_state(B, G, K, width, M, q.device, dtype)
    y, weight, state = clusters.run(q, k * exists, v * exists, exists, state, RULE)
    out = [y, weight.exp(), *torch.autograd.grad(y.square().sum() + weight.exp().sum(), (q, k, v)), *state]
    state = tuple(x.detach().clone() for x in state)
    for i in range(8):
        at, here = slice(i, i + 1), exists[:, :, i : i + 1]
        clusters.update_state(k[:, :, at].detach() * here, v[:, :, at].detach() * here, here, state, RULE)
        out += clusters.read_state(q[:, :, at].detach(), state, RULE)
    return [x.detach().clone() for x in (*out, *state)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8, torch.uint8], ids=str)
def test_merging_goes_to_the_kernels(dtype, calls, monkeypatch):
    by_kernels = made(dtype)
    block = [("merge_all", (B * G,)), ("merge_gradient", (B * G, 1))]
    assert calls == block + 8 * [("take_in", (B * G,)), ("read_token", (B * H,))]
    monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
    for a, b in zip(by_kernels, made(dtype), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(calls) == 18


def test_several_programs_share_a_head_up_to_those_that_run_at_once(calls, monkeypatch):
    monkeypatch.setattr(clusters_backend, "PROGRAMS", 8)
    monkeypatch.setattr(clusters_backend, "_at_once", lambda device: 5 * B * G)
    made(None)
    assert calls[0] == ("merge_all", (5 * B * G,))


def test_a_step_with_a_gradient_is_not_sent_to_a_kernel_that_has_none(calls):
    k, v, exists = (torch.ones(B, G, 1, w) for w in (K, V, 1))
    state = clusters.initial_state(B, G, K, V, M, k.device)
    clusters.update_state(k.requires_grad_(), v, exists, state, RULE)
    y, _ = clusters.read_state(torch.ones(B, H, 1, K, requires_grad=True), state, RULE)
    assert not calls and y.requires_grad
    state[0].sum().backward()
    assert bool((k.grad == 1).all())


def test_what_the_kernels_cannot_do_runs_by_pytorch_and_is_said(calls):
    assert "float64" in str(clusters_backend.restriction(torch.zeros(1, 1, 8, 2, dtype=torch.float64), 8, 8, None))
    assert "2048" in str(clusters_backend.restriction(torch.zeros(1, 1, 2048, 2), 8, 8, torch.int8))
    assert "272" in str(clusters_backend.restriction(torch.zeros(1, 1, 8, 2), 272, 8, None))
    assert "int4" in str(clusters_backend.restriction(torch.zeros(1, 1, 8, 2), 16, 32, torch.uint8))
    ops._warn.cache_clear()
    x = torch.randn(1, 1, 30, 272)
    state = clusters.initial_state(1, 1, 272, 272, M, x.device)
    with pytest.warns(UserWarning, match="272"):
        clusters.run(x, x, x, x[..., :1] * 0 + 1, state, RULE)
    assert not calls


def test_without_triton_it_runs_by_pytorch_unless_kernels_are_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "linearize.model.ops.clusters_triton", None)
    monkeypatch.setattr(clusters_backend, "PROGRAMS", 1)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    clusters_backend.missing.cache_clear()
    monkeypatch.delenv("LINEARIZE_BACKEND", raising=False)
    assert bool(made(None)[0].isfinite().all())
    monkeypatch.setenv("LINEARIZE_BACKEND", "fla")
    with pytest.raises(InputError, match="Triton kernels of clusters cannot be imported"):
        made(None)
    clusters_backend.missing.cache_clear()


def test_triton_is_not_looked_for_on_a_cpu(monkeypatch):
    monkeypatch.delenv("LINEARIZE_BACKEND", raising=False)
    monkeypatch.setattr(clusters_backend, "missing", lambda: pytest.fail("looked for"))
    made(None)
