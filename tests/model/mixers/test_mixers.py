"""Each mixer against its formula, written out here another way; and the numbers a user reads about it."""

import torch
from helpers.mixers import B, G, H, K, S, T, W, context, mixer
from helpers.oracles import expanded
from torch.nn import functional as F

from linearize.model.mixers import build_config
from linearize.model.ops import expansion


def qkv():
    return torch.randn(B, H, T, K), torch.randn(B, G, T, K), torch.randn(B, G, T, K)


def with_one(x):
    return F.pad(x, (0, 1), value=1.0)


def test_liger_is_as_published():
    """0.5·window + 0.5·GLA over all tokens: σ(k)^{1/16}, softmax features before RoPE, no denominator."""
    q, k, v = qkv()
    raw_q, raw_k = torch.randn_like(q), torch.randn_like(k)
    config = build_config({"name": "gla", "combine": "liger"})
    assert (config.window, config.sinks, config.gate_normalizer, config.features) == (64, 0, 16.0, "softmax")
    got = mixer(name="gla", combine="liger", sinks=0)(q, k, v, context(lambda x: raw_q if x is q else raw_k))

    expected = torch.zeros_like(got)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            state = torch.zeros(K, K)
            for t in range(T):
                state = state * torch.sigmoid(raw_k[b, g, t])[:, None] ** (1 / 16)
                state = state + raw_k[b, g, t].softmax(0)[:, None] * v[b, g, t]
                first = max(0, t - W + 1)
                weights = (0.4 * k[b, g, first : t + 1] @ q[b, h, t]).softmax(0)
                expected[b, h, t] = 0.5 * weights @ v[b, g, first : t + 1] + 0.5 * raw_q[b, h, t].softmax(0) @ state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_memory_is_one_softmax_over_window_and_expansion():
    """Every token out of reach gets the weight e^μ (1 + a − μ), every other its own e^a, under one normaliser."""
    q, k, v = qkv()
    got = mixer(name="gla", gate_normalizer=1e9, strength=0.3)(q, k, v, context())
    a = 0.4 * q @ k.repeat_interleave(H // G, 1).mT
    t = torch.arange(T)
    distance = t[:, None] - t
    near = (distance >= 0) & ((distance < W) | (t < S))
    far = (distance >= W) & (t >= S)
    mean = (a * far).sum(-1, keepdim=True) / far.sum(-1, keepdim=True).clamp(min=1)
    weights = near * a.exp() + far * (mean + 0.3).exp() * (1 + a - mean)
    expected = (weights @ v.repeat_interleave(H // G, 1)) / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_expansion_is_exact_where_scores_are_equal():
    """Equal keys: the average of values, and the log weight of an exact softmax."""
    q, v = torch.randn(1, 1, 6, 4), with_one(torch.randn(1, 1, 6, 5))
    k = torch.randn(4).expand(1, 1, 6, 4)
    empty = expansion.initial_state(1, 1, 4, 5, torch.device("cpu"))
    y, weight, _ = expansion.run(q, with_one(k), v, torch.zeros(1, 1, 6, 1), empty)
    a = (q @ k.mT).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(y, a.softmax(-1) @ v[..., :-1])
    torch.testing.assert_close(weight, a.logsumexp(-1))


def test_expansion_forms_agree():
    q, k, v = qkv()
    k1, v1 = with_one(k), with_one(v)
    k1[:, :, ::7], v1[:, :, ::7] = 0, 0  # tokens that do not exist
    g = F.logsigmoid(torch.randn(B, G, T, 1)) * k1[..., -1:]
    empty = expansion.initial_state(B, G, K, K, torch.device("cpu"))
    y, weight, state = expansion.run(q, k1, v1, g, empty, scaling=0.5, strength=0.7)
    expected = expanded(0.5 * q, k1[..., :-1], v1, g)
    torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight, expected[1] + 0.7, rtol=1e-4, atol=1e-5)
    running = expansion.initial_state(B, G, K, K, torch.device("cpu"))
    for t in range(T):
        one = slice(t, t + 1)
        expansion.update_state(k1[:, :, one], v1[:, :, one], g[:, :, one], running, strength=0.7)
        yt, wt = expansion.read_state(q[:, :, one], running, scaling=0.5).split([K, 1], -1)
        torch.testing.assert_close(yt, y[:, :, one], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(wt[..., 0], weight[:, :, one], rtol=1e-4, atol=1e-5)
    for a, b in zip(running, state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    cut = 20
    _, _, middle = expansion.run(*(x[:, :, :cut] for x in (q, k1, v1, g)), empty, scaling=0.5, strength=0.7)
    y2, weight2, end = expansion.run(*(x[:, :, cut:] for x in (q, k1, v1, g)), middle, scaling=0.5, strength=0.7)
    for a, b in ((y2, y[:, :, cut:]), (weight2, weight[:, :, cut:]), *zip(end, state, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_hundred_thousand_tokens_neither_overflow_nor_drift():
    """Pieces of a prefill, then single tokens, against fp64 in one go; scores up to ±20, a gate that hardly fades."""
    T, steps = 100_000, 3000
    q, k, v = torch.randn(1, 2, T, 4) * 2, torch.randn(1, 1, T, 4) * 2, torch.randn(1, 1, T, 4)
    inputs = (q, with_one(k), with_one(v), F.logsigmoid(torch.randn(1, 1, T, 1)) / 1e5)
    empty = expansion.initial_state(1, 1, 4, 4, torch.device("cpu"))
    exact, exact_weight, final = expansion.run(*(x.double() for x in inputs), tuple(x.double() for x in empty))
    state, prefill = empty, T - steps
    for start in range(0, prefill, 9700):
        piece = slice(start, min(start + 9700, prefill))
        y, weight, state = expansion.run(*(x[:, :, piece] for x in inputs), state)
        torch.testing.assert_close(y.double(), exact[:, :, piece], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(weight.double(), exact_weight[:, :, piece], rtol=1e-4, atol=1e-4)
    for t in range(prefill, T):
        one, *updates = (x[:, :, t : t + 1] for x in inputs)
        expansion.update_state(*updates, state)
    got = expansion.read_state(one, state)
    torch.testing.assert_close(got[..., :-1].double(), exact[:, :, -1:], rtol=1e-4, atol=1e-4)
    for a, b in zip(state, final, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_keys_at_fifty_stay_finite_with_their_gradients():
    q, k, v = (50 * x.sign() for x in qkv())
    for values in ({"combine": "memory"}, {"combine": "memory", "gate_normalizer": 1.0}, {"combine": "liger"}):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = mixer(name="gla", **values)(*inputs, context())
        y.square().sum().backward()
        assert y.isfinite().all()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


def test_soft_caps_scaling_and_logits_without_values_are_the_sources():
    """gemma2 caps scores, gpt_oss adds a logit per head: in reach of the window the mixer must do both."""
    q, k, v = (x[:, :, : W + S] for x in qkv())
    extra = torch.randn(H)
    got = mixer(name="gla")(q, k, v, context(softcap=2.0, extra=extra))
    a = 2 * torch.tanh(0.4 * q @ k.repeat_interleave(H // G, 1).mT / 2)
    a = a.masked_fill(torch.ones(W + S, W + S).triu(1).bool(), float("-inf"))
    a = torch.cat([a, extra.view(H, 1, 1).expand(B, H, W + S, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(got, a @ v.repeat_interleave(H // G, 1), rtol=1e-4, atol=1e-5)
