"""The delta rule S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ, read as y_t = q_tᵀ S_t.

One family for DeltaNet (no decay, arXiv 2406.06484; β up to 2 for negative eigenvalues, arXiv 2411.12537), Gated
DeltaNet (one g per head, arXiv 2412.06464) and Kimi Delta Attention (one g per channel, arXiv 2510.26692). Letters,
shapes and dtypes as in ops/additive.py; beta [B, G, T, 1]. The caller normalises the keys: the rule is a contraction
where β |k|² ≤ 2 and grows without bound beyond. A token with k or β zero and g = 0 leaves no trace.

In closed form, a token writes k_t u_tᵀ as in the additive recurrence, u_t = β_t (v_t − k_tᵀ diag(e^{g_t}) S_{t-1}), and
the u of a chunk solve one unit lower triangular system (the WY or UT transform of arXiv 2406.06484). So a chunk is
an affine map of the state, S -> M S + R, and only these maps are sequential. `solve_chunks` is this algebra;
ops/dplr.py uses it too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .decay import CHUNK, chunk_size, into_chunks, out_of_chunks, pairs, prepare, to_ends, token_by_token

SMALLEST = 1e-6
"""Added to a square before its root is divided by: a key of zeros stays one, and its gradient is finite."""


def unit(x: Tensor) -> Tensor:
    """x / |x| over the channels, fp32 (fp64 for fp64 inputs): a key, or query, as the rule needs it."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + SMALLEST).rsqrt()


def rooted(k: Tensor) -> Tensor:
    """√σ(k) ∘ k̂ of fp32 keys, the learning rate of each channel shared out to both sides of k̂ k̂ᵀ; 0 for a key of 0."""
    # Halved inside: √σ(k) has no gradient where σ(k) rounds to 0.
    return F.logsigmoid(k).mul(0.5).exp() * unit(k)


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the chunked form. Arguments and result as of `chunked`."""
    beta = beta.to(torch.promote_types(v.dtype, torch.float32))

    def update(S: Tensor, decayed: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
        return decayed + k.mT @ (beta[:, :, t, None] * (v - k @ decayed))

    return token_by_token(q, k, v, log_decay, state, update)


def update_state(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    """Take in one token (T = 1; shapes as of `chunked`). Updates `state`; `additive.read_state` reads it."""
    dtype = state.dtype
    if log_decay is not None:
        state.mul_(log_decay.to(dtype).exp().mT)
    k = k.to(dtype)
    u = beta.to(dtype) * (v.to(dtype) - k @ state)
    state.flatten(0, 1).baddbmm_(k.flatten(0, 1).mT, u.flatten(0, 1))


def chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunks of C tokens: a triangular system inside, a K×K map between them. Linear in T; exponents as in decay.py.

    Arguments and result as of `additive.chunked`, keys of length 1, and beta [B, G, T, 1].
    """
    dtype, (B, H, T, _) = q.dtype, q.shape
    q, k, v, g, S = prepare(q, k, v, log_decay, state)
    if T == 0:
        return q.new_zeros(B, H, T, v.shape[-1]).to(dtype), S
    C = chunk_size(T, chunk)
    q, k, v, beta = (into_chunks(x, C) for x in (q, k, v, beta.to(v.dtype)))
    g = None if g is None else into_chunks(g, C)
    rows = torch.cat([q.transpose(2, 3), k.unsqueeze(3)], dim=3)
    reach, kept, whole = to_ends(rows, k, g)
    matrix = pairs(rows, k, g)
    y, S = solve_chunks(
        beta * matrix[..., -1, :, :],
        beta * v,
        beta * reach[..., -1, :, :],
        kept,
        whole,
        reach[..., :-1, :, :],
        torch.tril(matrix[..., :-1, :, :]),
        S,
    )
    return out_of_chunks(y, T).to(dtype), S


def solve_chunks(
    L: Tensor, x: Tensor, w: Tensor, kept: Tensor, whole: Tensor, reach: Tensor, inside: Tensor, state: Tensor,
    update: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per chunk, U = (I + L)⁻¹ (x − w S), y = reach S + inside U, and S <- whole ∘ S + keptᵀ U + update.

    Args:
        L: [B, G, N, C, C], of which the part below the diagonal is used.
        x: [B, G, N, C, V].
        w: [B, G, N, C, K].
        kept: [B, G, N, C, K].
        whole: what broadcasts to [B, G, N, K, 1].
        reach: [B, G, N, r, C, K].
        inside: [B, G, N, r, C, C].
        state: [B, G, K, V].
        update: [B, G, N, K, V], what enters the state beside U.

    Returns:
        y [B, G, N, r, C, V] and the final state.
    """
    K, V = w.shape[-1], x.shape[-1]
    U, W = torch.linalg.solve_triangular(L, torch.cat([x, w], -1), upper=False, unitriangular=True).split([V, K], -1)
    added = kept.mT @ U if update is None else kept.mT @ U + update
    moved = torch.diag_embed(whole.squeeze(-1).expand(*W.shape[:3], K)) - kept.mT @ W
    before = []
    for M, R in zip(moved.unbind(2), added.unbind(2), strict=True):
        before.append(state)
        state = R + M @ state
    starts = torch.stack(before, dim=2)
    U = U - W @ starts
    y = reach.flatten(3, 4) @ starts + inside.flatten(3, 4) @ U
    return y.unflatten(3, reach.shape[3:5]), state
