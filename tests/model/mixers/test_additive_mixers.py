"""The additive mixers against their formulas as explicit sums over tokens, which no recurrence is used for."""

import math

import pytest
import torch
from helpers.mixers import context
from torch import Tensor
from torch.nn import functional as F

from linearize.errors import InputError
from linearize.model.mixers import MIXERS, Geometry, build_config
from linearize.model.mixers.additive import FEATURES

H, G, T, K = 4, 2, 24, 8
W, S, SCALING, STRENGTH = 5, 2, 0.4, 0.3
TAU, LIVES = 3.0, (4.0, 20.0)

# Name -> numbers that make every part of the formula visible in 24 tokens.
SETTINGS = {
    "linear": {},
    "hedgehog": {},
    "gla": {"gate_normalizer": TAU},
    "hgrn2": {"gate_normalizer": TAU},
    "gsa": {"slots": 5, "temperature": 2.0},
    "retnet": {"schedule": "geometric", "half_life_min": LIVES[0], "half_life_max": LIVES[1]},
    "mamba2": {"half_life_min": LIVES[0], "half_life_max": LIVES[1]},
    "lightnet": {"temperature": 2.0},
    "gateloop": {"gate_normalizer": TAU, "angle_normalizer": 2.0},
    "rwkv6": {"gate_normalizer": TAU, "bonus": 1.7},
}
EXPANDING = ("linear", "gla", "retnet", "mamba2")
CASES = [
    *((name, "expansion" if name in EXPANDING else None, "memory") for name in SETTINGS),
    *((name, "softmax", "memory") for name in EXPANDING),
    *((name, None, combine) for name in SETTINGS for combine in ("none", "liger")),
]


def features(name: str, x: Tensor) -> Tensor:
    both = torch.cat([x, -x], -1)
    return {
        "softmax": lambda: x.exp() / x.exp().sum(-1, keepdim=True),
        "softmax+-": lambda: torch.cat([x.softmax(-1), (-x).softmax(-1)], -1),
        "exp+-": lambda: (both / K**0.25).exp(),
        "relu": lambda: x * (x > 0),
        "elu+1": lambda: F.elu(x) + 1,
        "identity": lambda: x,
        "l2": lambda: x / x.norm(dim=-1, keepdim=True),
    }[name]()


def after(g: Tensor) -> Tensor:
    """Σ of what comes after each token: g [n, ·]."""
    return torch.stack([g[j + 1 :].sum(0) for j in range(len(g))])


def log_decay(name: str, raw_k: Tensor, group: int) -> Tensor:
    """Of n tokens, [n, K] or [n, 1]."""
    if name in ("gla", "hgrn2", "gateloop"):
        return raw_k.sigmoid().log() / TAU
    if name == "rwkv6":
        return -math.log(2) * raw_k.exp() / TAU
    one = torch.ones_like(raw_k[:, :1])
    if name == "retnet":
        return one * math.log(0.5 ** (1 / LIVES[group]))
    if name == "mamba2":
        return -F.softplus(raw_k.mean(-1, keepdim=True)) / LIVES[group]
    return one * 0


def read(config, maps, q: Tensor, k: Tensor, v: Tensor, raw_q: Tensor, raw_k: Tensor, group: int):
    """Σ w v, Σ w (None where the first is divided already) and the log weight, over n tokens, for one query [K]."""
    name, g = config.name, log_decay(config.name, raw_k, group)
    if name == "gsa":
        A = (raw_k[:, : config.slots] / config.temperature).softmax(0)
        scores = SCALING * (A.T @ k) @ q
        return scores.softmax(0) @ (A.T @ v), None, scores.logsumexp(0) + math.log(len(v) / config.slots)
    if config.features == "expansion":
        count = after(g.mean(-1, keepdim=True)).exp().squeeze(-1)
        a = SCALING * k @ q
        mean = count @ a / count.sum()
        return (count * (1 + a - mean)) @ v / count.sum(), None, count.sum().log() + mean
    if name == "hedgehog":
        raw_q, raw_k = raw_q @ maps[0], raw_k @ maps[1]
    query, key = (features(config.features, x) for x in (raw_q, raw_k))
    if name == "lightnet":
        return (raw_k / config.temperature).softmax(0) @ query @ v, None, torch.tensor(math.log(len(v)))
    if name == "hgrn2":
        key = 1 - raw_k.sigmoid() ** (1 / TAU)
    if name == "mamba2":
        key = key * F.softplus(raw_k.mean(-1, keepdim=True))
    decay = after(g).exp()
    if name == "gateloop":
        decay = decay * after(raw_k / config.angle_normalizer).cos()
    if name == "rwkv6":
        decay = torch.cat([after(g[:-1]).exp() if len(g) > 1 else g[:0], torch.full_like(g[:1], config.bonus)])
    w = (key * decay) @ query
    return w @ v, w.sum(), w.sum().log()


@pytest.mark.parametrize(("name", "kind", "combine"), CASES)
@torch.no_grad()
def test_formula(name, kind, combine):
    values = {"name": name, "combine": combine, "window": W, "sinks": S, **SETTINGS[name], "strength": STRENGTH}
    config = build_config(values | ({"features": kind} if kind else {}))
    mixer = MIXERS[name](config, Geometry(H, G, K, K))
    for parameter in mixer.parameters():
        parameter.add_(0.4 * torch.randn_like(parameter))
    q, raw_q = torch.randn(2, 1, H, T, K)
    k, raw_k, v = torch.randn(3, 1, G, T, K)
    got = mixer(q, k, v, context(lambda x: raw_q if x is q else raw_k, scaling=SCALING))[0]

    for h in range(H):
        group = h // (H // G)
        maps = (mixer.query_map[h], mixer.key_map[group]) if name == "hedgehog" else None
        for t in range(T):
            seen = range(S, t - W + 1) if combine == "memory" else range(t + 1)
            near = [j for j in range(t + 1) if t - j < W or j < S]
            a = SCALING * k[0, group, near] @ q[0, h, t]
            window = a.softmax(0) @ v[0, group, near]
            y = torch.zeros(K)
            if len(seen):
                now = (x[0, group, list(seen)] for x in (k, v, raw_k))
                far_k, far_v, far_raw = now
                y, total, weight = read(config, maps, q[0, h, t], far_k, far_v, raw_q[0, h, t], far_raw, group)
                if total is not None and (mixer.weighted or name in ("linear", "hedgehog")):
                    y = y / total
                if mixer.weighted:
                    y = torch.lerp(window, y, (weight + STRENGTH - a.logsumexp(0)).sigmoid())
            if mixer.weighted and not len(seen):
                y = window
            elif combine == "memory" and not mixer.weighted:
                y = window + mixer.gate[h].tanh() * y
            elif combine == "liger":
                y = 0.5 * (window + y)
            torch.testing.assert_close(got[h, t], y, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", FEATURES)
def test_features_by_formula(kind):
    x = torch.randn(5, K) * 2
    torch.testing.assert_close(FEATURES[kind].apply(x), features(kind, x), rtol=1e-5, atol=1e-6)
    for size in (0.0, 50.0):
        y = FEATURES[kind].apply(torch.full((1, K), size).requires_grad_())
        (y @ y.mT * T).square().sum().backward()
        assert (y @ y.mT * T).isfinite().all()
    assert FEATURES[kind].positive == bool((FEATURES[kind].apply(-x.abs()) >= 0).all())


@pytest.mark.parametrize("kind", FEATURES)
def test_features_decide_how_a_memory_joins(kind):
    """Under the window's normaliser where no weight can be negative, else through a gate that starts closed."""
    config = build_config({"name": "linear", "features": kind, "window": W, "sinks": S})
    mixer = MIXERS["linear"](config, Geometry(H, G, K, K))
    q, (k, v) = torch.randn(1, H, T, K), torch.randn(2, 1, G, T, K)
    window = mixer(q, k, v, context(branch="window"))
    y = mixer(q, k, v, context())
    assert y.isfinite().all()
    assert torch.equal(y[:, :, : W + S], window[:, :, : W + S])
    assert mixer.weighted == (kind not in ("identity", "l2")) == (not (mixer.gate is not None))
    assert torch.equal(y, window) == (not mixer.weighted)


def test_published_settings():
    """Liger's: window 64, no sinks, σ(k)^{1/16}, softmax features; RetNet's: 1 − 2^{−5−h}."""
    liger = build_config({"name": "gla", "combine": "liger"})
    assert (liger.window, liger.sinks, liger.gate_normalizer, liger.features) == (64, 0, 16.0, "softmax")
    retnet = MIXERS["retnet"](build_config({"name": "retnet", "combine": "none"}), Geometry(H, G, K, K))
    decay = retnet.log_decay(torch.zeros(1, G, 1, K)).exp().flatten()
    torch.testing.assert_close(decay, torch.tensor([1 - 1 / 32, 1 - 1 / 64]))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "rwkv6", "features": "expansion"}, "features: found 'expansion'; expected one of softmax"),
        ({"name": "linear", "combine": "liger", "features": "expansion"}, "liger's fixed half cannot use"),
        ({"name": "gla", "combine": "none", "features": "exp+-"}, "needs the normaliser of combine: memory"),
        ({"name": "retnet", "schedule": "even", "half_life_min": 0.0}, "half_life_min: found 0.0.*schedule: found"),
        ({"name": "gla", "gate_normalizer": -1}, "gate_normalizer: found -1.0; expected above 0"),
        ({"name": "rwkv6", "bonus": -0.5}, "bonus: found -0.5; expected at least 0"),
        ({"name": "gsa", "slots": 0, "temperature": 0}, "slots: found 0.*temperature: found 0.0"),
    ],
)
def test_bad_numbers_are_named(values, says):
    with pytest.raises(InputError, match=says):
        build_config(values)
