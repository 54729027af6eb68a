"""Softmax attention over tokens out of reach, to first order around their mean score.

Let the tokens out of reach have scores a_j = q·k_j (q scaled), n their number and μ = Σ a_j / n their mean for this
query. Then e^{a_j} ≈ e^μ (1 + a_j − μ), so that

    Σ e^{a_j} v_j ≈ e^μ [ (1 − μ) Σ v_j + qᵀ Σ k_j v_jᵀ ],    Σ e^{a_j} ≈ n e^μ,

and everything the query needs is in two sums of fixed size, S = Σ k_j [v_j, 1]ᵀ (K×(V+1)) and m = Σ [v_j, 1] (V+1). The
weight is positive whatever the query, and the output is an average of values plus their covariance with the key along
the query. It is the first-order case of what Taylor feature maps do (arXiv 2402.18668), taken around the mean instead
of zero, where real scores are not. A decay g ≤ 0 lets the keys in S fade; m counts every token in full.

Shapes as in ops/additive.py; values come with their column of ones.
"""

import torch
from torch import Tensor

from linearize.ops import additive


def empty_state(
    batch: int, kv_heads: int, key_width: int, value_width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """S [B, G, K, V + 1] and m [B, G, 1, V + 1], fp32 zeros."""
    shape = (batch, kv_heads, key_width, value_width + 1)
    return torch.zeros(shape, device=device), torch.zeros(*shape[:2], 1, shape[3], device=device)


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: tuple[Tensor, ...], decoding: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Read the expansion at every token.

    Args:
        q: [B, H, T, K] scaled queries; k: [B, G, T, K]; v: [B, G, T, V + 1] with ones in the last column (zeros for a
            token that does not exist, whose k is zero too); log_decay: [B, G, T, K or 1] or None.
        state: S and m as `empty_state` makes them.
        decoding: T = 1 and the state is updated in place.

    Returns:
        y [B, H, T, V], the log weight n e^μ [B, H, T] (−inf where there is no token), and the new state.
    """
    S, m = state
    B, H, T, _ = q.shape
    x, S = (additive.step if decoding else additive.chunked)(q, k, v, log_decay, S)
    sums = m.add_(v) if decoding else m + v.cumsum(2)
    m = sums[:, :, -1:] if T else m
    sums = sums.repeat_interleave(H // k.shape[1], dim=1)
    n = sums[..., -1:]
    count = n.clamp(min=1)
    mean = x[..., -1:] / count
    y = (x[..., :-1] + (1 - mean) * sums[..., :-1]) / count
    return y, (n.log() + mean).squeeze(-1), (S, m)


def naive(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """The oracle: the same from explicit T×T scores, for rows that start empty."""
    rep = q.shape[1] // k.shape[1]
    a = additive.materialise(q, k, log_decay)
    exists = v[..., -1].repeat_interleave(rep, 1)[:, :, None, :]
    mask = torch.ones(a.shape[-2:], device=a.device).tril() * exists
    n = mask.sum(-1, keepdim=True)
    mean = (a * mask).sum(-1, keepdim=True) / n.clamp(min=1)
    weights = mask * (1 + a - mean) / n.clamp(min=1)
    return weights @ v[..., :-1].repeat_interleave(rep, 1), (n.log() + mean).squeeze(-1)
