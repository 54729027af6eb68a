"""Our forms against those of flash-linear-attention, which somebody else wrote: fp32, relative error at most 1e-4.

fla scales queries by K^-½ unless told otherwise and takes [B, T, H, ·], except where a test says [B, H, T, ·].
"""

import math

import pytest
import torch
from helpers.oracles import fla_naive
from torch import Tensor
from torch.nn import functional as F

from linearize.model.ops import additive, bonus, gates, run_additive, slots

B, H, T, K, V, M = 2, 3, 100, 8, 6, 5
# Two fp32 implementations that sum in different orders; measured below 2e-6.
LIMIT = 1e-4


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, T, K), torch.randn(B, H, T, K), torch.randn(B, H, T, V)


def gate(width: int) -> Tensor:
    return F.logsigmoid(torch.randn(B, H, T, width)) / 4


def turned(*tensors: Tensor) -> list[Tensor]:
    """[B, H, T, ·] <-> [B, T, H, ·]"""
    return [x.transpose(1, 2) for x in tensors]


def assert_near(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm() / b.norm()) <= LIMIT


def test_gla():
    q, k, v = inputs()
    g, state = gate(K), torch.randn(B, H, K, V)
    y, final = fla_naive("gla").naive_recurrent_gla(*turned(q, k, v, g), state, output_final_state=True)
    assert_near(run_additive(q * K**-0.5, k, v, g, state), (y.transpose(1, 2), final))


@pytest.mark.parametrize("form", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_one_decay_per_head(form):
    q, k, v = inputs()
    g, state = gate(1), torch.randn(B, H, K, V)
    reference = getattr(fla_naive("simple_gla"), form)
    y, final = reference(
        *turned(q, k, v), g.squeeze(-1).transpose(1, 2), scale=1.0, initial_state=state, output_final_state=True
    )
    assert_near(run_additive(q, k, v, g, state), (y.transpose(1, 2), final))


def test_mamba2_of_transformers():
    """The scan inside its module: Δ = softplus, decay e^{A Δ} of a rate per head, Δ as the weight of the value."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    q, k, v = inputs()
    dt, rate = torch.randn(B, H, T, 1), -torch.rand(H) / 3
    values, steps, keys, queries = turned(v, dt, k, q)
    y, final = mamba2_chunk_scan(
        values, steps.squeeze(-1), rate, keys, queries, chunk_size=16, dt_softplus=True, return_final_states=True
    )
    delta = F.softplus(dt)
    got, state = run_additive(q, k, delta * v, rate[:, None, None] * delta)
    assert_near((got, state), (y.transpose(1, 2), final.mT))


def test_retention():
    q, k, v = inputs()
    y = fla_naive("retention").naive_retention(q, k, v)  # [B, H, T, ·]
    assert_near(run_additive(q * K**-0.5, k, v, gates.retention(H))[:1], (y,))


@pytest.mark.parametrize("rep", [1, 3])
def test_gated_slots(rep):
    _, k, v = inputs()
    q, g = torch.randn(B, H * rep, T, K), gate(M)
    input_gate, state = -torch.expm1(g), (torch.randn(B, H, K, M), torch.randn(B, H, M, V))
    y, final = fla_naive("gsa").naive_recurrent_gsa(
        *turned(q, k, v, input_gate, g), scale=1.0, initial_state=state, output_final_state=True
    )
    got, last = slots.run(q, k, v, input_gate, g, state)
    assert_near((got, *last), (y.transpose(1, 2), *final))


def test_rwkv6():
    q, k, v = inputs()
    g, u, state = gate(K), torch.randn(H, K), torch.randn(B, H, K, V)
    # [B, H, T, ·]
    y, final = fla_naive("rwkv6", "recurrent_naive").naive_recurrent_rwkv6(
        q, k, v, g, u, scale=1.0, initial_state=state, output_final_state=True
    )
    empty = bonus.initial_state(B, H, K, V, q.device)[1:]
    got, (S, last_k, last_v, last_g) = bonus.run(q, k, v, g, torch.ones(B, H, T, 1), u, (state, *empty))
    assert_near((got, S * last_g.exp().mT + last_k.mT @ last_v), (y, final))


def test_hgrn2():
    """The matrix form of HGRN-2 is GLA with tied gates; with V = 1 and v = 1 its state is HGRN's vector."""
    q, _, v = inputs()
    g, k = gates.forget(torch.randn(B, H, T, K) * 3, lower=0.2)
    y, final = fla_naive("gla").naive_recurrent_gla(*turned(q, k, v, g), output_final_state=True)
    assert_near(run_additive(q * K**-0.5, k, v, g), (y.transpose(1, 2), final))
    x = k[:, 0]
    states, last = fla_naive("hgrn").naive_recurrent_hgrn(x, g[:, 0], output_final_state=True)
    one = torch.ones(B, 1, T, 1)
    _, S = additive.chunked(q[:, :1], k[:, :1], one, g[:, :1])
    assert_near((S[:, 0, :, 0],), (last,))
    assert_near((states[:, -1],), (last,))


def test_running_softmax():
    """What fla's slot reference does without gates (its `g is None`) is LightNet's additive decay."""
    q, k, v = inputs()
    logits = torch.randn(B, H, T, M)
    y, _ = fla_naive("gsa").naive_recurrent_gsa(*turned(q, k, v, logits), scale=1.0)
    empty = torch.zeros(B, H, 1, M), torch.zeros(B, H, 1, 1)
    input_gate, g, z, _ = gates.running_softmax(logits, torch.ones(B, H, T, 1), *empty)
    state = slots.initial_state(B, H, K, V, M, q.device)
    assert_near(slots.run(q, k, v, input_gate, g, state)[:1], (y.transpose(1, 2),))
    assert_near((z[:, :, 0],), (logits.logsumexp(2),))
    assert math.isfinite(float(g.min()))
