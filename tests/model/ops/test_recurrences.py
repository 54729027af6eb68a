"""What is built on the additive recurrence (slots, bonus, rotation, gates) agrees with its own naive form."""

import math

import pytest
import torch
from helpers import oracles
from torch import Tensor
from torch.nn import functional as F

from linearize.model.ops import additive, bonus, decay, gates, rotation, run_additive, slots

B, H, G, K, V, M = 2, 4, 2, 6, 5, 7
# fp32 over a few chunks; algebra leaves fp64 no room.
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}
# Mild: blocks of 64 factorise. Uneven: some channels need blocks of 16. Strong: keys near ±50, no block factorises.
STRENGTHS = {"mild": (0.5, 0.1), "uneven": (10.0, 0.1), "strong": (50.0, 1.0)}


def assert_close(got, expected, limit: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.isfinite().all()
        assert float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))


def decays(T: int, width: int, strength: str, dtype: torch.dtype) -> Tensor:
    scale, share = STRENGTHS[strength]
    return F.logsigmoid(torch.randn(B, G, T, width, dtype=dtype) * scale) * share


def inputs(T: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "q": torch.randn(B, H, T, K, dtype=dtype),
        "k": torch.randn(B, G, T, K, dtype=dtype),
        "v": torch.randn(B, G, T, V, dtype=dtype),
    }


def slot_inputs(T: int, strength: str = "mild", dtype: torch.dtype = torch.float32):
    x = inputs(T, dtype)
    g = decays(T, M, strength, dtype)
    state = torch.randn(B, G, K, M, dtype=dtype), torch.randn(B, G, M, V, dtype=dtype)
    return x | {"input_gate": -torch.expm1(g), "log_decay": g}, state


@pytest.mark.parametrize("total", [-59.0, -61.0])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_blocks_at_the_edge_of_factorising(total, width):
    """One channel spends nearly all that a block may, evenly or in one token; the choice is the block's width."""
    T = 128
    x = inputs(T)
    for even in (True, False):
        g = torch.full((B, G, T, K), -1e-3)
        g[..., 0] = total / width if even else 0
        if not even:
            g[:, :, width // 2 :: width, 0] = total
        leaf = width if total > decay.STRONG else width // 2 if even and width > 8 else 0
        assert decay.leaf_width(g.unflatten(2, (2, 64))[:, :, :1]) == leaf
        double = {n: t.double() for n, t in x.items()}
        exact = additive.recurrent(**double, log_decay=g.double())
        got = additive.chunked(**x, log_decay=g)
        # Rounding of exponents up to 30 and of sums over 64 tokens.
        assert_close([t.double() for t in got], exact, 1e-5)


@pytest.mark.parametrize("width", [0, 1, K])
def test_pieces_make_one_sequence(width, monkeypatch):
    """Cut where no chunk ends, and with a decay that only broadcasts over the tokens."""
    x, state = inputs(150, torch.float64), torch.randn(B, G, K, V, dtype=torch.float64)
    g = -torch.rand(G, 1, width, dtype=torch.float64) if width else None
    monkeypatch.setattr(additive, "PIECE", 70)
    got = additive.chunked(**x, log_decay=g, state=state)
    assert_close(got, additive.recurrent(**x, log_decay=g, state=state), 1e-10)


def test_a_compiled_graph_takes_the_form_that_is_safe_for_all_values(monkeypatch):
    x, g = inputs(100), decays(100, K, "mild", torch.float32)
    expected = additive.chunked(**x, log_decay=g)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert decay.leaf_width(g) == 0
    assert_close(additive.chunked(**x, log_decay=g), expected, 1e-5)


@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "fp64"])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("T", [1, 7, 64, 150])
def test_slots_in_chunks(T, strength, dtype):
    x, state = slot_inputs(T, strength, dtype)
    y, final = slots.run(**x, state=state)
    expected, last = slots.recurrent(**x, state=state)
    assert_close((y, *final), (expected, *last), LIMIT[dtype])


@pytest.mark.parametrize("strength", STRENGTHS)
def test_gradients_of_slots(strength):
    x, state = slot_inputs(70, strength)
    leaves = [t.requires_grad_() for t in (*x.values(), *state) if t.is_leaf or t.retain_grad() is None]
    weight = torch.randn(B, H, 70, V)

    def gradients(form):
        y, final = form(**x, state=state)
        return torch.autograd.grad((y * weight).sum() + sum(s.square().sum() for s in final), leaves)

    assert_close(gradients(slots.run), gradients(slots.recurrent), 1e-4)


def test_slots_step_in_place():
    x, state = slot_inputs(12)
    expected, last = slots.recurrent(**x, state=state)
    kept = tuple(s.clone() for s in state)
    for t in range(12):
        now = {n: v[:, :, t : t + 1] for n, v in x.items()}
        q = now.pop("q")
        slots.update_state(**now, state=kept)
        assert_close(slots.read_state(q, kept)[:1], (expected[:, :, t : t + 1],), 1e-5)
    assert_close(kept, last, 1e-5)


@pytest.mark.parametrize("T", [1, 2, 64, 130])
def test_bonus(T):
    x = inputs(T, torch.float64) | {"log_decay": decays(T, K, "uneven", torch.float64)}
    u, state = torch.randn(H, K, dtype=torch.float64), torch.randn(B, G, K, V, dtype=torch.float64)
    expected, last = oracles.with_bonus(**x, bonus=u, state=state)
    empty = tuple(s.double() for s in bonus.initial_state(B, G, K, V, x["q"].device)[1:])
    y, (S, k, v, g) = bonus.run(**x, exists=torch.ones(B, G, T, 1), bonus=u, state=(state, *empty))
    assert_close((y, S * g.exp().mT + k.mT @ v), (expected, last), 1e-10)
    kept = state.clone(), *empty
    for t in range(min(T, 5)):
        now = {n: v[:, :, t : t + 1] for n, v in x.items()}
        q = now.pop("q")
        bonus.update_state(**now, exists=torch.ones(B, G, 1, 1), state=kept)
        assert_close((bonus.read_state(q, u, kept),), (expected[:, :, t : t + 1],), 1e-10)


@pytest.mark.parametrize("width", [1, K])
def test_rotation(width):
    T = 100
    x = inputs(T, torch.float64) | {"log_decay": decays(T, width, "mild", torch.float64)}
    x["angle"] = torch.randn(B, G, T, K, dtype=torch.float64) * 3
    state = torch.zeros(B, G, 2 * K, V, dtype=torch.float64), torch.zeros(B, G, 1, K, dtype=torch.float64)
    y, last = oracles.rotated(**x, state=torch.zeros(B, G, K, V, dtype=torch.complex128))
    got, (S, phase) = rotation.run(**x, state=state)
    assert_close((got,), (y,), 1e-10)
    turned = torch.polar(torch.ones_like(phase), phase).mT * torch.complex(S[:, :, :K], -S[:, :, K:])
    assert_close((turned.real, turned.imag), (last.real, last.imag), 1e-10)
    kept = tuple(s.clone() for s in state)
    cut = 40
    first = {n: v[:, :, :cut] for n, v in x.items()}
    _, kept = rotation.run(**first, state=kept)
    for t in range(cut, cut + 5):
        now = {n: v[:, :, t : t + 1] for n, v in x.items()}
        q = now.pop("q")
        rotation.update_state(**now, state=kept)
        assert_close((rotation.read_state(q, kept),), (y[:, :, t : t + 1],), 1e-10)


def test_phase_does_not_drift():
    """16K tokens of angle 3: fp32 output equals fp64 within fp32's rounding of one phase."""
    T = 16_384
    one = torch.ones(1, 1, T, 1)
    x = {"q": one, "k": one, "v": one, "log_decay": one * -0.01, "angle": one * 3}
    y, _ = rotation.run(**x, state=(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 1, 1)))
    double = {n: t.double() for n, t in x.items()}
    state = torch.zeros(1, 1, 2, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    assert_close((y.double(),), rotation.run(**double, state=state)[:1], 1e-5)


def test_running_softmax():
    T = 90
    x = torch.randn(B, G, T, K) * 10
    exists = torch.ones(B, G, T, 1)
    exists[0, :, :3] = 0
    exists[1, :, 70:] = 0
    start = torch.zeros(B, G, 1, K), torch.zeros(B, G, 1, 1)
    key, g, z, count = gates.running_softmax(x, exists, *start)
    assert (g <= 0).all() and not key[exists.expand_as(key) == 0].any() and not g[exists.expand_as(g) == 0].any()
    assert torch.equal(count, exists.cumsum(2))
    v = torch.randn(B, G, T, V) * exists
    _, S = run_additive(torch.randn(B, H, T, K), key, v, g)
    weight = x.masked_fill(exists == 0, -math.inf).softmax(2)
    assert_close((S,), (weight.mT @ v,), 1e-5)
    for cut in (2, 50):  # the first row has seen nothing after two tokens
        first = gates.running_softmax(x[:, :, :cut], exists[:, :, :cut], *start)
        second = gates.running_softmax(x[:, :, cut:], exists[:, :, cut:], first[2], first[3][:, :, -1:])
        joined = (torch.cat([a, b], 2) for a, b in zip(first[:2], second[:2], strict=True))
        assert_close((*joined, second[2]), (key, g, z), 1e-5)


def test_running_softmax_has_finite_gradients_before_the_first_token():
    x = torch.randn(1, 1, 4, K, requires_grad=True)
    exists = torch.tensor([0.0, 0, 1, 1]).view(1, 1, 4, 1)
    key, g, z, _ = gates.running_softmax(x, exists, torch.zeros(1, 1, 1, K), torch.zeros(1, 1, 1, 1))
    (grad,) = torch.autograd.grad(key.square().sum() + g.square().sum() + z.sum(), x)
    assert grad.isfinite().all() and not grad[:, :, :2].any() and grad[:, :, 2:].any()


def test_gates_by_formula():
    assert_close((gates.retention(3).exp().flatten(),), (1 - torch.tensor([1 / 32, 1 / 64, 1 / 128]),), 1e-6)
    x = torch.randn(50, dtype=torch.float64) * 20
    f = 0.3 + 0.7 * x.sigmoid()
    g, key = gates.forget(x.float(), 0.3)
    assert_close((g.double().exp(), key.double()), (f, 1 - f), 1e-6)


def test_zero_writes_leave_no_trace():
    """The contract of every family: k = v = g = 0 (and the family's own write) keeps the state bit for bit."""
    T = 9
    q, none = torch.randn(B, H, T, K), torch.zeros(B, G, T, K)
    v, s = torch.zeros(B, G, T, V), torch.zeros(B, G, T, M)
    state = torch.randn(B, G, K, V)
    assert torch.equal(run_additive(q, none, v, none, state)[1], state)
    waiting = state, torch.randn(B, G, 1, K), torch.randn(B, G, 1, V), -torch.rand(B, G, 1, K)
    after = bonus.run(q, none, v, none, none[..., :1], torch.randn(H, K), waiting)[1]
    assert all(torch.equal(a, b) for a, b in zip(after, waiting, strict=True))
    slot_state = torch.randn(B, G, K, M), torch.randn(B, G, M, V)
    after = slots.run(q, none, v, s, s, slot_state)[1]
    assert all(torch.equal(a, b) for a, b in zip(after, slot_state, strict=True))
    turned = torch.randn(B, G, 2 * K, V), torch.rand(B, G, 1, K)
    after = rotation.run(q, none, v, none, none, turned)[1]
    assert all(torch.equal(a, b) for a, b in zip(after, turned, strict=True))


@pytest.mark.parametrize("family", ["additive", "bonus", "rotation", "slots"])
def test_no_tokens(family):
    x = inputs(0) | {"log_decay": torch.zeros(B, G, 0, K)}
    state = torch.randn(B, G, K, V)
    if family == "additive":
        y, after = run_additive(**x, state=state)
    elif family == "bonus":
        empty = bonus.initial_state(B, G, K, V, state.device)[1:]
        y, (after, *_) = bonus.run(**x, exists=torch.ones(B, G, 0, 1), bonus=torch.randn(H, K), state=(state, *empty))
    elif family == "rotation":
        state = torch.randn(B, G, 2 * K, V)
        y, (after, _) = rotation.run(**x, angle=x["log_decay"], state=(state, torch.zeros(B, G, 1, K)))
    else:
        x, (state, values) = slot_inputs(0)
        y, (after, _) = slots.run(**x, state=(state, values))
    assert y.shape == (B, H, 0, V) and torch.equal(after, state)
