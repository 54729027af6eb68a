"""Softmax attention over tokens out of reach, to first order around their mean score.

Let the tokens out of reach have scores a_j = q·k_j (q scaled), n their number and μ = Σ a_j / n their mean for this
query. Then e^{a_j} ≈ e^μ (1 + a_j − μ), so that

    Σ e^{a_j} v_j ≈ e^μ [ (1 − μ) Σ v_j + qᵀ Σ k_j v_jᵀ ],    Σ e^{a_j} ≈ n e^μ,

and everything the query needs is in two sums of fixed size, S = Σ k_j [v_j, 1]ᵀ (K×(V+1)) and m = Σ [v_j, 1] (V+1). The
weight is positive whatever the query, and the output is an average of values plus their covariance with the key along
the query. It is the first-order case of what Taylor feature maps do (arXiv 2402.18668), taken around the mean instead
of zero, where real scores are not. A decay g ≤ 0 per token fades both sums, so that n, μ and the average weigh recent
tokens more.

Shapes as in ops/additive.py; values come with their column of ones.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops import additive, run_additive


def empty_state(batch: int, kv_heads: int, key_width: int, value_width: int, device: torch.device) -> Tensor:
    """S over m, [B, G, K + 1, V + 1], fp32 zeros."""
    return torch.zeros(batch, kv_heads, key_width + 1, value_width + 1, device=device)


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, decoding: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the expansion at every token.

    Args:
        q: [B, H, T, K] scaled queries; k: [B, G, T, K]; v: [B, G, T, V + 1] with ones in the last column (zeros for a
            token that does not exist); log_decay: [B, G, T, 1].
        state: as `empty_state` makes it.
        decoding: T = 1 and the state is updated in place.

    Returns:
        y [B, H, T, V], the log weight n e^μ [B, H, T] (−inf where there is no token), and the new state.
    """
    B, H, T, K = q.shape
    G = k.shape[1]
    if decoding:
        state.mul_(log_decay.exp())
        state.flatten(0, 1).baddbmm_(F.pad(k, (0, 1), value=1.0).flatten(0, 1).mT, v.flatten(0, 1))
        x = q.view(B, G, H // G, K) @ state[:, :, :K]
        sums = state[:, :, K:]
    else:
        x, S = run_additive(q, k, v, log_decay, state[:, :, :K])
        one = torch.ones_like(log_decay)
        sums, m = additive.chunked(one, one, v, log_decay, state[:, :, K:])
        state = torch.cat([S, m], dim=2)
    x, sums = x.view(B, G, H // G, T, -1), sums[:, :, None]
    n = sums[..., -1:]
    count = n.clamp(min=torch.finfo(n.dtype).tiny)
    mean = x[..., -1:] / count
    y = torch.addcmul(x[..., :-1], 1 - mean, sums[..., :-1]) / count
    # Not n.log(): its gradient at zero is 0/0.
    weight = (count.log() + mean).masked_fill(n == 0, float("-inf"))
    return y.view(B, H, T, -1), weight.view(B, H, T), state


def naive(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: the same from explicit T×T scores, for rows that start empty."""
    rep = q.shape[1] // k.shape[1]
    a = q @ k.repeat_interleave(rep, 1).mT
    ones = torch.ones_like(q[..., :1])
    weight = (
        additive.materialise(ones, ones, log_decay.repeat_interleave(rep, 1))
        * v[..., -1].repeat_interleave(rep, 1)[:, :, None, :]
    )
    n = weight.sum(-1, keepdim=True)
    safe = n.clamp(min=torch.finfo(n.dtype).tiny)
    mean = (a * weight).sum(-1, keepdim=True) / safe
    y = (weight * (1 + a - mean) / safe) @ v[..., :-1].repeat_interleave(rep, 1)
    return y, (n.log() + mean).squeeze(-1)
