"""The delta and diagonal mixers against their formulas, written out here token by token."""

import math

import pytest
import torch
from helpers.mixers import G, H, S, W, context, mixer
from helpers.oracles import naive_window_attention
from torch import Tensor

from linearize.model.mixers import channels
from linearize.model.tokens import Tokens

B, T, K, V = 2, 30, 8, 8
TAU, HALF = 5.0, 7.0
NUMBERS = {
    "delta_net": {},
    "gated_deltanet": {"gate_normalizer": TAU},
    "kda": {"gate_normalizer": TAU, "negative_eigenvalues": True},
    "gated_deltanet2": {"gate_normalizer": TAU},
    "pkda": {"gate_normalizer": TAU, "curvature_normalizer": 2.0, "squash": 1.9, "center": 0.1},
    "rwkv7": {"gate_normalizer": 1.0},
    "rg_lru": {"half_life": HALF},
    "hgrn": {"half_life": HALF},
    "min_gru": {"gate_normalizer": TAU},
    "min_lstm": {"gate_normalizer": TAU},
    "lru": {"r_min": 0.5, "r_max": 0.9},
    "aaren": {"strength": 0.3},
}
every = pytest.mark.parametrize("name", NUMBERS)


def unrotate(x: Tensor) -> Tensor:
    """Stands for RoPE run backwards: any map of single tokens will do."""
    return x.float().flip(-1)


def qkv():
    return torch.randn(B, H, T, K), 2 * torch.randn(B, G, T, K), torch.randn(B, G, T, V)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


# --- one token: state S, key k as rotated, raw key r, value v, each a vector; and what query q (raw p) reads ---


def delta_rule(S, k, v, beta, decay):
    k = k / k.norm()
    S = torch.diag(decay) @ S
    return S - beta * torch.outer(k, k @ S) + beta * torch.outer(k, v)


def write_delta_net(S, k, r, v):
    return delta_rule(S, k, v, sigmoid(r.mean()), torch.ones(K))


def write_gated_deltanet(S, k, r, v):
    return delta_rule(S, k, v, sigmoid(r.mean()), sigmoid(r.mean()) ** (1 / TAU) * torch.ones(K))


def write_kda(S, k, r, v):
    return delta_rule(S, r, v, 2 * sigmoid(r.mean()), sigmoid(r) ** (1 / TAU))


def write_gated_deltanet2(S, k, r, v):
    key, S = sigmoid(r).sqrt() * r / r.norm(), torch.diag(sigmoid(r) ** (1 / TAU)) @ S
    return S - torch.outer(key, key @ S) + torch.outer(key, sigmoid(r) * v)


def write_pkda(state, k, r, v):
    S, a = state
    key, beta = r / r.norm(), sigmoid(r.mean())
    a = sigmoid(r.mean()) ** (1 / 2) * a + beta * key**2
    above = (a + 1e-6).log() - 0.1
    written = beta * 1.9 ** (-above / (1 + above.abs())) * key
    S = torch.diag(sigmoid(r) ** (1 / TAU)) @ S
    return S + torch.outer(written, v - key @ S), a


def write_rwkv7(S, k, r, v):
    key = sigmoid(r).sqrt() * r / r.norm()
    w = (-math.exp(-0.5) * sigmoid(-r)).exp()
    return (torch.diag(w) - torch.outer(key, key)) @ S + torch.outer(key, v)


def write_rg_lru(h, k, r, v):
    a = (0.5 ** (1 / HALF)) ** sigmoid(r)
    return a * h + (1 - a**2).sqrt() * sigmoid(r) * v


def mean(state, f, v, new):
    h, n = state
    return torch.stack([f * h + new * v, f * n + new])


def write_hgrn(state, k, r, v):
    gamma = 0.5 ** (1 / HALF)
    f = gamma + (1 - gamma) * sigmoid(r)
    return mean(state, f, v, 1 - f)


def write_min_gru(state, k, r, v):
    z = 1 - sigmoid(-r) ** (1 / TAU)
    return mean(state, 1 - z, v, z)


def write_min_lstm(state, k, r, v):
    f, i = TAU * sigmoid(r.mean()), sigmoid(r)
    return mean(state, f / (f + i), v, i / (f + i))


def write_lru(h, k, r, v):
    i = torch.arange(V)
    size = (0.25 + (0.81 - 0.25) * (i + 0.5) / V).sqrt()
    angle = math.pi / 10 * ((math.sqrt(5) - 1) / 2 * i % 1)
    return torch.polar(size, angle) * h + (1 - size**2).sqrt() * sigmoid(r) * v


def write_aaren(rows, k, r, v):
    return [*rows, (r.sum() / K**0.5, k, v)]


def read_matrix(S, q, p):
    return S.T @ (q / q.norm())


def read_raw_matrix(S, q, p):
    return S.T @ (p / p.norm())


def read_first_matrix(state, q, p):
    return read_raw_matrix(state[0], q, p)


def read_mean(state, q, p):
    h, n = state
    return sigmoid(p) * h / n if n.any() else torch.zeros(V)


def read_channels(h, q, p):
    return sigmoid(p) * h.real if h.is_complex() else sigmoid(p) * h


def read_average(rows, q, p):
    if not rows:
        return torch.zeros(V)
    scores, _, values = (torch.stack(x) for x in zip(*rows, strict=True))
    return sigmoid(p) * (scores.softmax(0) @ values)


MATRIX, TWO, ONE = torch.zeros(K, V), torch.zeros(2, V), torch.zeros(V)
FORMULAS = {
    "delta_net": (MATRIX, write_delta_net, read_matrix),
    "gated_deltanet": (MATRIX, write_gated_deltanet, read_matrix),
    "kda": (MATRIX, write_kda, read_raw_matrix),
    "gated_deltanet2": (MATRIX, write_gated_deltanet2, read_raw_matrix),
    "pkda": ((MATRIX, torch.zeros(K)), write_pkda, read_first_matrix),
    "rwkv7": (MATRIX, write_rwkv7, read_raw_matrix),
    "rg_lru": (ONE, write_rg_lru, read_channels),
    "hgrn": (TWO, write_hgrn, read_mean),
    "min_gru": (TWO, write_min_gru, read_mean),
    "min_lstm": (TWO, write_min_lstm, read_mean),
    "lru": (ONE.to(torch.complex64), write_lru, read_channels),
    "aaren": ([], write_aaren, read_average),
}


def by_formula(name: str, q: Tensor, k: Tensor, v: Tensor, memory: bool) -> Tensor:
    """The recurrence's part of the output, token by token."""
    start, write, read = FORMULAS[name]
    p, r = unrotate(q), unrotate(k)
    y = torch.zeros(B, H, T, V)
    for b in range(B):
        for h in range(H):
            state, g = start, h // (H // G)
            for t in range(T):
                token = t - W if memory else t
                if token >= (S if memory else 0):
                    state = write(state, k[b, g, token], r[b, g, token], v[b, g, token])
                y[b, h, t] = read(state, q[b, h, t], p[b, h, t])
    return y


@every
def test_alone_it_is_its_formula(name):
    q, k, v = qkv()
    got = mixer(name=name, combine="none", **NUMBERS[name])(q, k, v, context(unrotate))
    torch.testing.assert_close(got, by_formula(name, q, k, v, memory=False), rtol=1e-4, atol=1e-5)


@every
def test_as_memory_it_sees_what_left_the_window(name):
    q, k, v = qkv()
    made = mixer(name=name, combine="memory", **NUMBERS[name])
    near, lse = naive_window_attention(q, k, v, window=W, sinks=S, scaling=0.4)
    if name == "aaren":
        expected = near.clone()
        for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(W + S, T)):
            g = h // (H // G)
            keys, values = k[b, g, S : t - W + 1], v[b, g, S : t - W + 1]
            p = (unrotate(keys).sum(-1) / K**0.5).softmax(0)
            weight = p @ (0.4 * keys @ q[b, h, t]) - (p * p.log()).sum() + 0.3
            share = sigmoid(weight - lse[b, h, t])
            expected[b, h, t] = (1 - share) * near[b, h, t] + share * (p @ values)
    else:
        torch.testing.assert_close(made(q, k, v, context(unrotate)), near, rtol=1e-4, atol=1e-5)
        made.gate.data = torch.randn(H)
        expected = near + made.gate.tanh()[:, None, None] * by_formula(name, q, k, v, memory=True)
    torch.testing.assert_close(made(q, k, v, context(unrotate)), expected, rtol=1e-4, atol=1e-5)


def parts(name: str, combine: str = "memory", scale: float = 1.0, absent: tuple[int, ...] = ()):
    """A mixer, its reads and writes for random tokens, and its empty state."""
    q, k, v = (scale * x for x in qkv())
    made = mixer(name=name, combine=combine, **NUMBERS[name])
    one = torch.ones(B, G, T, 1)
    tokens = Tokens.join(k, v, made.kept_features(k, unrotate), one, made.geometry)
    tokens.x[:, :, list(absent)] = 0
    return made, made.query(q, context(unrotate)), tokens, made.initial_state(B, torch.device("cpu"))


def cut(tokens: Tokens, made, start: int, stop: int):
    return made.updates(Tokens(tokens.x[:, :, start:stop], made.geometry))


@pytest.mark.parametrize("combine", ["memory", "none"])
@every
def test_blocks_pieces_and_steps_agree(name, combine):
    made, read, tokens, empty = parts(name, combine, absent=(0, 1, 11, 29))
    y, weight, final = made.scan(read, made.updates(tokens), empty, context())
    assert all(x.dtype == torch.float32 for x in final)

    y1, weight1, middle = made.scan(read[:, :, :13], cut(tokens, made, 0, 13), empty, context())
    y2, weight2, end = made.scan(read[:, :, 13:], cut(tokens, made, 13, T), middle, context())
    pairs = [(torch.cat([y1, y2], 2), y), *zip(end, final, strict=True)]
    if weight is not None and weight1 is not None and weight2 is not None:
        pairs.append((torch.cat([weight1, weight2], 2), weight))

    state, found = tuple(x.clone() for x in empty), []
    for t in range(T):
        made.update_state(cut(tokens, made, t, t + 1), state)
        found.append(made.read_state(read[:, :, t : t + 1], state, context()))
    stepped = torch.cat(found, 2)
    expected = y if weight is None else torch.cat([y, weight.unsqueeze(-1)], -1)
    pairs += [(stepped, expected), *zip(state, final, strict=True)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kda", "gated_deltanet2", "pkda", "rwkv7"])
def test_blocks_are_single_tokens_in_double_precision_with_their_gradients(name):
    made, read, tokens, empty = parts(name)
    inputs = [x.detach().double().requires_grad_() for x in (read, *made.updates(tokens), *empty)]
    query, updates, state = inputs[0], tuple(inputs[1 : -len(empty)]), tuple(inputs[-len(empty) :])

    def graded(y: Tensor, final: tuple[Tensor, ...]) -> list[Tensor]:
        loss = y.square().sum() + sum(x.sin().sum() for x in final)
        return [y, *final, *torch.autograd.grad(loss, inputs)]

    y, _, final = made.scan(query, updates, state, context())
    ys, at = [], state
    for t in range(T):
        one, _, at = made.scan(query[:, :, t : t + 1], tuple(x[:, :, t : t + 1] for x in updates), at, context())
        ys.append(one)
    for got, expected in zip(graded(y, final), graded(torch.cat(ys, 2), at), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@every
def test_an_absent_token_changes_no_bit_of_the_state(name):
    made, read, tokens, empty = parts(name, absent=tuple(range(20, T)))
    _, _, seen = made.scan(read[:, :, :20], cut(tokens, made, 0, 20), empty, context())
    for before in (empty, seen):
        _, _, after = made.scan(read[:, :, 20:], cut(tokens, made, 20, T), before, context())
        in_place = tuple(x.clone() for x in before)
        made.update_state(cut(tokens, made, 20, 21), in_place)
        for a, b, c in zip(before, after, in_place, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("numbers", ["default", "strong"])
@every
def test_keys_at_fifty_stay_finite_with_their_gradients(name, numbers, shift):
    values = NUMBERS[name] if numbers == "strong" else {}
    for combine in ("memory", "none"):
        made = mixer(name=name, combine=combine, **values)
        if "gate" in dict(made.named_parameters()):
            made.gate.data.fill_(1.0)
        inputs = [x.requires_grad_() for x in (50 * x.sign() for x in qkv())]
        with torch.no_grad():
            if shift:
                inputs[1].fill_(shift)
        y = made(*inputs, context(unrotate))
        y.square().sum().backward()
        assert y.isfinite().all()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("name", ["delta_net", "kda", "gated_deltanet2", "pkda", "rwkv7"])
def test_a_long_skewed_stream_stays_on_the_scale_of_its_values(name):
    """No transition makes the state longer, whatever the keys: RWKV-7 as published leaves fp32 on such keys."""
    made = mixer(name=name, combine="none", **NUMBERS[name])
    q, k, v = (torch.randn(1, heads, 4096, K) for heads in (H, G, G))
    y = made(q, 3 * k - 2, v, context())
    assert float(y.square().mean().sqrt()) < 3


@pytest.mark.parametrize("name", ["hgrn", "min_gru", "min_lstm", "rg_lru", "lru", "gated_deltanet2", "pkda"])
def test_values_may_be_wider_or_narrower_than_keys(name):
    from linearize.model.mixers import MIXERS, Geometry, build_config

    for width in (4, 12):
        made = MIXERS[name](build_config({"name": name, "window": W}), Geometry(H, G, K, width))
        q, k, _ = qkv()
        v = torch.randn(B, G, T, width)
        assert made(q, k, v, context(unrotate)).shape == (B, H, T, width)


@every
def test_the_only_new_weight_is_a_closed_gate_that_learns(name):
    made = mixer(name=name, **NUMBERS[name])
    if name == "aaren":
        assert list(made.parameters()) == []
        return
    q, k, v = qkv()
    made(q, k, v, context(unrotate)).square().sum().backward()
    ((parameter, gate),) = made.named_parameters()
    assert parameter == "gate" and not gate.any()
    assert gate.grad is not None and float(gate.grad.abs().min()) > 0


def test_half_lives_are_as_long_as_the_window_or_longer():
    """By default, for keys as wide as real ones: what enters a memory is still there when it matters."""
    key = torch.linspace(-8, 8, 33).view(1, 1, 33, 1).expand(1, G, 33, K)
    for name in ("rg_lru", "hgrn", "min_gru", "min_lstm", "lru"):
        made = mixer(name=name)
        assert isinstance(made, channels.Mixer)
        log_decay, _ = made.gates(key)
        assert (math.log(0.5) / log_decay.clamp(max=-1e-9) >= 64).all(), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "gated_deltanet", "gate_normalizer": 0.0}, "gate_normalizer: found 0.0; expected above 0"),
        ({"name": "pkda", "squash": 2.5}, "squash: found 2.5; expected between 1 and 2"),
        ({"name": "rwkv7", "gate_normalizer": -1.0}, "gate_normalizer: found -1.0"),
        ({"name": "rg_lru", "half_life": 0.0}, "half_life: found 0.0; expected above 0"),
        ({"name": "hgrn", "half_life": 0.0}, "half_life: found 0.0"),
        ({"name": "min_gru", "gate_normalizer": 0.0}, "gate_normalizer: found 0.0"),
        ({"name": "min_lstm", "gate_normalizer": 0.0}, "gate_normalizer: found 0.0"),
        ({"name": "lru", "r_min": 0.9, "r_max": 0.5}, "expected 0 ≤ r_min ≤ r_max ≤ 1"),
        ({"name": "lru", "max_phase": 7.0}, "max_phase: found 7.0; expected between 0 and 2π"),
    ],
)
def test_wrong_numbers_are_named(values, message):
    from linearize.errors import InputError
    from linearize.model.mixers import build_config

    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        build_config(values)
