"""Softmax attention over tokens out of reach, to first order around their mean score.

Let the tokens out of reach have scores a_j = q·k_j (q scaled), n their number and μ = Σ a_j / n their mean for this
query. Then e^{a_j} ≈ e^μ (1 + a_j − μ), so that

    Σ e^{a_j} v_j ≈ e^μ [ (1 − μ) Σ v_j + qᵀ Σ k_j v_jᵀ ],    Σ e^{a_j} ≈ n e^μ,

and everything the query needs is in two sums of fixed size, S = Σ k_j [v_j, 1]ᵀ (K×(V+1)) and m = Σ [v_j, 1] (V+1). The
weight is positive whatever the query, and the output is an average of values plus their covariance with the key along
the query. It is the first-order case of what Taylor feature maps do (arXiv 2402.18668), taken around the mean instead
of zero, where real scores are not. A decay g ≤ 0 per token fades both sums, so that n, μ and the average weigh recent
tokens more.

Kept from token to token are n, the covariance beside the mean key, S = [Σ k vᵀ / n − k̄ v̄ᵀ, k̄], and m = [v̄, log n]: for
one query, qᵀ S + m is then the output and its log weight at once. Shapes as in ops/additive.py; keys and values come
with their column of ones.

(1 − μ) Σ v + qᵀ S takes two numbers from each other, both as large as the score that all keys have in common. fp32 has
the digits, but kernels multiply in 16 bits or TF32: there the mean key c of the block is taken from all keys, which
leaves the output as it is and the log weight too small by q·c.
"""

import torch
from torch import Tensor

from . import chooses_fla, fla_backend, run_additive

State = tuple[Tensor, ...]
"""S, m and n of `initial_state`."""


def initial_state(batch: int, kv_heads: int, key_width: int, value_width: int, device: torch.device) -> State:
    """S [B, G, K, V + 1], m [B, G, 1, V + 1] and n [B, G, 1, 1], fp32 zeros; `update_state` sets log n."""
    S = torch.zeros(batch, kv_heads, key_width, value_width + 1, device=device)
    return S, S.new_zeros(batch, kv_heads, 1, value_width + 1), S.new_zeros(batch, kv_heads, 1, 1)


def run(
    q: Tensor, k1: Tensor, v1: Tensor, log_decay: Tensor, state: State, *, scaling: float = 1.0, strength: float = 0.0
) -> tuple[Tensor, Tensor, State]:
    """Read and take in a block of tokens.

    Args:
        q: [B, H, T, K].
        k1: [B, G, T, K + 1], its last column 1, or all 0 for a token that does not exist.
        v1: [B, G, T, V + 1], the same.
        log_decay: g ≤ 0 [B, G, T, 1].
        state: as `initial_state` makes it.
        scaling: of the scores q·k.
        strength: added to the log weight.

    Returns:
        y [B, H, T, V], the log weight n e^μ [B, H, T] (−inf where there is no token), both at least
        fp32, and the final state.
    """
    B, H, T, K = q.shape
    G = k1.shape[1]
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    S, m, n = state
    q, k = q * scaling, k1[..., :K]
    mean_k, mean_v, centre = S[..., -1:], m[..., :-1], None
    if chooses_fla(q, fla_backend.restriction(q, v1)):
        centre = _mean_key(k1)
        k, mean_k = k - centre * k1[..., K:].detach(), mean_k - centre.mT
    whole = torch.cat([S[..., :-1] + mean_k * mean_v, mean_k], -1) * n
    part = torch.cat([mean_v, torch.ones_like(n)], -1) * n
    x, S = run_additive(q, k, v1, log_decay, whole)
    one = torch.ones_like(log_decay, dtype=q.dtype)
    sums, m = run_additive(one, one, v1.to(q.dtype), log_decay, part)  # not in 16 bits, which cannot count to 300
    x, sums = x.view(B, G, H // G, T, -1), sums[:, :, None]
    n, count = _count(sums)
    mean = x[..., -1:] / count
    y = torch.addcmul(x[..., :-1], 1 - mean, sums[..., :-1]) / count
    # Not n.log(): its gradient at zero is 0/0.
    weight = count.log() + mean + strength
    if centre is not None:
        weight = weight + q.view(B, G, H // G, T, K) @ centre.mT.unsqueeze(2)
    weight = weight.masked_fill(n == 0, float("-inf"))

    n, count = _count(m)
    S, mean_v = S / count, m[..., :-1] / count
    mean_k = S[..., -1:]
    S = torch.cat([S[..., :-1] - mean_k * mean_v, mean_k if centre is None else mean_k + centre.mT], -1)
    m = torch.cat([mean_v, n.log() + strength], -1)
    return y.view(B, H, T, -1), weight.view(B, H, T), (S, m, n)


def _mean_key(k1: Tensor) -> Tensor:
    """fp32 [B, G, 1, K] of k1 [B, G, T, K + 1]. Without a gradient: the output does not depend on it."""
    total = k1.detach().sum(-2, keepdim=True, dtype=torch.float32)
    return total[..., :-1] / total[..., -1:].clamp(min=1)


def _count(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The last column, and the same safe to divide by."""
    n = sums[..., -1:]
    return n, n.clamp(min=torch.finfo(n.dtype).tiny)


def update_state(k1: Tensor, v1: Tensor, log_decay: Tensor, state: State, *, strength: float = 0.0) -> None:
    """Take in one token (T = 1; shapes as of `run`), in place: means and covariance, updated as Welford does."""
    S, m, n = state
    k1, v1 = k1.float(), v1.float()
    n.mul_(log_decay.float().exp()).add_(v1[..., -1:])
    part = v1[..., -1:] / n.clamp(min=torch.finfo(n.dtype).tiny)
    rest = 1 - part
    dk, dv = k1[..., :-1] - S[..., -1:].mT, v1[..., :-1] - m[..., :-1]
    one = torch.ones_like(n)
    # Whole tensors: a graph for onnxruntime turns a write into some columns into two transpositions.
    S.mul_(torch.cat([rest.expand_as(dv), one], -1)).addcmul_((part * dk).mT, torch.cat([rest * dv, one], -1))
    m.copy_(torch.cat([m[..., :-1] + part * dv, n.log() + strength], -1))


def read_state(q: Tensor, state: State, *, scaling: float = 1.0) -> Tensor:
    """What one token q [B, H, 1, K] reads: [B, H, 1, V + 1] fp32, y with its log weight in the last column."""
    B, H, _, K = q.shape
    S, m = state[0].flatten(0, 1), state[1].flatten(0, 1)
    grouped = q.float().reshape(S.shape[0], -1, K)
    return torch.baddbmm(m, grouped, S, alpha=scaling).view(B, H, 1, -1)
