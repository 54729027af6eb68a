"""The delta rule S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ, read as y_t = q_tᵀ S_t.

One family for DeltaNet (no decay, arXiv 2406.06484; β up to 2 for negative eigenvalues, arXiv 2411.12537), Gated
DeltaNet (one g per head, arXiv 2412.06464) and Kimi Delta Attention (one g per channel, arXiv 2510.26692). Letters and
shapes as in ops/additive.py: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V], beta [B, G, T, 1], log_decay g ≤ 0 of
shape [B, G, T, K], [B, G, T, 1], anything that broadcasts to it, or None; state [B, G, K, V] fp32. All forms compute in
fp32 (fp64 for fp64 inputs) and return (y [B, H, T, V] in q's dtype, state). The caller normalises the keys: the rule is
a contraction where β |k|² ≤ 2 and grows without bound beyond. A token with k or β zero and g = 0 leaves no trace.

In closed form, a token writes k_t u_tᵀ as in the additive recurrence, u_t = β_t (v_t − k_tᵀ diag(e^{g_t}) S_{t-1}), and
the u of a chunk solve one unit lower triangular system (the WY or UT transform of arXiv 2406.06484). So a chunk is
an affine map of the state, S -> M S + R, and only these maps are sequential. `solve_chunks` is this algebra;
ops/dplr.py uses it too.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.additive import CHUNK, LEAF, _pairs, _pairs_by_halves, _prepare, _to_ends, look

SMALLEST = 1e-6
"""Added to a square before its root is divided by: a key of zeros stays one, and its gradient is finite."""


def unit(x: Tensor) -> Tensor:
    """x / |x| over the channels, fp32 (fp64 for fp64 inputs): a key, or query, as the rule needs it."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + SMALLEST).rsqrt()


def naive_recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the other forms."""
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    beta = beta.to(v.dtype)
    y = []
    for t in range(q.shape[3]):
        if g is not None:
            S = S * g[:, :, t, :, None].exp()
        key = k[:, :, t, None]
        S = S + key.mT @ (beta[:, :, t, None] * (v[:, :, t, None] - key @ S))
        y.append(q[:, :, :, t] @ S)
    out = torch.stack(y, dim=3) if y else q.new_zeros(shape)
    return out.reshape(shape).to(dtype), S


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token (T = 1), updating `state` in place: the decoding step."""
    if state is None:
        return naive_recurrent(q, k, v, beta, log_decay)
    absorb(k, v, beta, log_decay, state)
    return look(q, state), state


def absorb(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    """The writes of one token, into `state`, in place. What it reads is `additive.look`."""
    dtype = state.dtype
    if log_decay is not None:
        state.mul_(log_decay.to(dtype).exp().mT)
    k = k.to(dtype)
    u = beta.to(dtype) * (v.to(dtype) - k @ state)
    state.flatten(0, 1).baddbmm_(k.flatten(0, 1).mT, u.flatten(0, 1))


def parallel(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once through T×T matrices, pair by pair: quadratic, for tests and for distillation."""
    return _in_chunks(q, k, v, beta, log_decay, state, q.shape[2], _pairs)


def materialise(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The mixer as an explicit matrix A [B, H, T, T], y = A v: what it makes of the unit vectors."""
    B, G, T, _ = k.shape
    unit = torch.eye(T, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device).expand(B, G, T, T)
    return torch.tril(parallel(q, k, unit, beta, log_decay)[0])


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens: a triangular system inside, a K×K map between them. Linear in T; exponents as in additive."""
    return _in_chunks(q, k, v, beta, log_decay, state, chunk_size(q.shape[2], chunk), pairs_of(log_decay))


def _in_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None, C: int,
    pairs: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype, (B, H, T, _) = q.dtype, q.shape
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    if T == 0:
        return q.new_zeros(B, H, T, v.shape[-1]).to(dtype), S
    q, k, v, beta = (into_chunks(x, C) for x in (q, k, v, beta.to(v.dtype)))
    g = None if g is None else into_chunks(g, C)
    rows = torch.cat([q.transpose(2, 3), k.unsqueeze(3)], dim=3)
    reach, kept, whole = _to_ends(rows, k, g)
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


def chunk_size(T: int, chunk: int) -> int:
    """The chunk for T tokens: no larger than the next power of two."""
    return min(chunk, max(LEAF, 1 << (T - 1).bit_length()))


def pairs_of(log_decay: Tensor | None) -> Callable[..., Tensor]:
    """How a chunk's matrix of read-write products is made: directly unless every channel decays on its own."""
    return _pairs if log_decay is None or log_decay.shape[-1] == 1 else _pairs_by_halves


def into_chunks(x: Tensor, C: int) -> Tensor:
    """[..., T, ·] -> [..., N, C, ·], the last chunk filled with zeros, which leave no trace."""
    pad = -x.shape[-2] % C
    return (F.pad(x, (0, 0, 0, pad)) if pad else x).unflatten(-2, (-1, C))


def out_of_chunks(y: Tensor, T: int) -> Tensor:
    """[B, G, N, r, C, V] -> [B, H, T, V]."""
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :T]


def solve_chunks(
    L: Tensor, x: Tensor, w: Tensor, kept: Tensor, whole: Tensor, reach: Tensor, inside: Tensor, state: Tensor,
    write: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per chunk, U = (I + L)⁻¹ (x − w S), y = reach S + inside U, and S <- whole ∘ S + keptᵀ U + write.

    Args:
        L: [B, G, N, C, C], of which the part below the diagonal is used.
        x: [B, G, N, C, V]; w, kept: [B, G, N, C, K]; whole: broadcasts to [B, G, N, K, 1].
        reach: [B, G, N, r, C, K]; inside: [B, G, N, r, C, C].
        state: [B, G, K, V].
        write: [B, G, N, K, V], what enters the state beside U.

    Returns:
        y [B, G, N, r, C, V] and the last state.
    """
    K, V = w.shape[-1], x.shape[-1]
    U, W = torch.linalg.solve_triangular(L, torch.cat([x, w], -1), upper=False, unitriangular=True).split([V, K], -1)
    added = kept.mT @ U if write is None else kept.mT @ U + write
    moved = torch.diag_embed(whole.squeeze(-1).expand(*W.shape[:3], K)) - kept.mT @ W
    before = []
    for M, R in zip(moved.unbind(2), added.unbind(2), strict=True):
        before.append(state)
        state = R + M @ state
    starts = torch.stack(before, dim=2)
    U = U - W @ starts
    y = reach.flatten(3, 4) @ starts + inside.flatten(3, 4) @ U
    return y.unflatten(3, reach.shape[3:5]), state
