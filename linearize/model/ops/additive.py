"""The additive recurrence S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ, read as y_t = q_tᵀ S_t.

One family for linear attention (no decay), RetNet (fixed g), Mamba-2 and Lightning (one g per head), GLA and HGRN-2
(one g per channel). Letters: B rows, H query heads, G key/value heads (H = r·G, a group of r queries reads one state),
T tokens, K key width, V value width, C chunk. Shapes: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V], log_decay g ≤ 0
of shape [B, G, T, K], [B, G, T, 1], anything that broadcasts to it, or None; state [B, G, K, V] fp32. All forms compute
in fp32 (fp64 for fp64 inputs) and return (y [B, H, T, V] in q's dtype, state). A token with k = 0 and g = 0 leaves no
trace.

Sources: GLA, arXiv 2312.06635 (chunked form with secondary chunks); SSD, arXiv 2405.21060.
"""

import torch
from torch import Tensor

from .decay import CHUNK, chunk_size, into_chunks, out_of_chunks, pairs, prepare, to_ends, token_by_token

PIECE = 1024
"""Tokens whose intermediate results are made at once: what is larger is a fresh mapping for the allocator every time,
and at 16,384 tokens mapping pages took a third of the time."""


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the chunked form. Arguments and result as of `chunked`."""
    return token_by_token(q, k, v, log_decay, state, lambda S, decayed, k, v, t: decayed + k.mT * v)


def update_state(k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    """Take in one token: k [B, G, 1, K], v [B, G, 1, V], log_decay [B, G, 1, 1 or K]. `state` is updated in place."""
    if log_decay is not None:
        state.mul_(log_decay.to(state.dtype).exp().mT)
    state.flatten(0, 1).baddbmm_(k.to(state.dtype).flatten(0, 1).mT, v.to(state.dtype).flatten(0, 1))


def read_state(q: Tensor, state: Tensor) -> Tensor:
    """What one token q [B, H, 1, K] reads of the state: y [B, H, 1, V] in q's dtype."""
    B, H, _, K = q.shape
    G = state.shape[1]
    y = torch.bmm(q.to(state.dtype).reshape(B * G, H // G, K), state.flatten(0, 1))
    return y.view(B, H, 1, -1).to(q.dtype)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens: quadratic inside, recurrent between them. Linear in T.

    Args:
        q: [B, H, T, K].
        k: [B, G, T, K].
        v: [B, G, T, V].
        log_decay: g ≤ 0, what broadcasts to [B, G, T, 1 or K], or None for no decay.
        state: initial state [B, G, K, V]; None stands for zeros.
        chunk: C, a power of two.

    Returns:
        y [B, H, T, V] in q's dtype, and the final state.
    """
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = prepare(q, k, v, log_decay, state)
    if shape[2] == 0:
        return q.new_zeros(shape).to(dtype), S
    queries, keys, values = (x.split(PIECE, -2) for x in (q, k, v))
    decays = [None] * len(queries) if g is None else g.split(PIECE, -2)
    y = []
    for piece in zip(queries, keys, values, decays, strict=True):
        out, S = _in_chunks(*piece, S, chunk)
        y.append(out)
    return torch.cat(y, dim=2).to(dtype), S


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """One piece of `chunked`, of at least one token, on prepared tensors."""
    T = q.shape[3]
    C = chunk_size(T, chunk)
    q, k, v = (into_chunks(x, C) for x in (q, k, v))
    g = None if g is None else into_chunks(g, C)
    q = q.transpose(2, 3)
    inter, kept, whole = to_ends(q, k, g)
    before = []
    # Not whole[:, :, n]: the gradient of every index would be a tensor of all chunks.
    for decay, update in zip(whole.unbind(2), (kept.mT @ v).unbind(2), strict=True):
        before.append(S)
        S = torch.addcmul(update, S, decay)
    y = torch.tril(pairs(q, k, g)) @ v[:, :, :, None] + inter @ torch.stack(before, dim=2)[:, :, :, None]
    return out_of_chunks(y, T), S
