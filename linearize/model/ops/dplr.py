"""The diagonal-plus-low-rank recurrence S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ, read as y_t = q_tᵀ S_t.

The generalised delta rule of RWKV-7 (arXiv 2503.14456): a = −κ̂, the key to remove, and b = η ∘ κ̂ with an in-context
learning rate η per channel. The delta rule is the case a = e^{g} ∘ k, b = −β k with the update β k vᵀ, for which
ops/delta.py needs half of the products. Letters, shapes and dtypes as in ops/additive.py; a, b [B, G, T, K]. a reads
the state before it decays. The caller bounds a and b so that the transition does not grow. A token with k, a (or b) and
g zero leaves no trace.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .decay import CHUNK, chunk_size, into_chunks, out_of_chunks, pairs, prepare, to_ends, token_by_token
from .delta import solve_chunks


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the chunked form. Arguments and result as of `chunked`."""
    a, b = (x.to(torch.promote_types(v.dtype, torch.float32)) for x in (a, b))

    def update(S: Tensor, decayed: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
        return decayed + b[:, :, t, :, None] * (a[:, :, t, None] @ S) + k.mT * v

    return token_by_token(q, k, v, log_decay, state, update)


def update_state(k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    """Take in one token (T = 1; shapes as of `chunked`). Updates `state`; `additive.read_state` reads it."""
    dtype = state.dtype
    removed = a.to(dtype) @ state
    if log_decay is not None:
        state.mul_(log_decay.to(dtype).exp().mT)
    keys = torch.cat([b.to(dtype), k.to(dtype)], dim=2)
    values = torch.cat([removed, v.to(dtype)], dim=2)
    state.flatten(0, 1).baddbmm_(keys.flatten(0, 1).mT, values.flatten(0, 1))


def chunked(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None = None,
    state: Tensor | None = None, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunks of C tokens: a triangular system inside, a K×K map between them. Linear in T; exponents as in decay.py.

    With z_t = a_tᵀ S_{t-1}: the z of a chunk solve the system, and its tokens write b_t z_tᵀ + k_t v_tᵀ. Arguments and
    result as of `additive.chunked`, and a, b [B, G, T, K].
    """
    dtype, (B, H, T, _) = q.dtype, q.shape
    q, k, v, g, S = prepare(q, k, v, log_decay, state)
    if T == 0:
        return q.new_zeros(B, H, T, v.shape[-1]).to(dtype), S
    C = chunk_size(T, chunk)
    q, k, v, a, b = (into_chunks(x, C) for x in (q, k, v, a.to(v.dtype), b.to(v.dtype)))
    g = None if g is None else into_chunks(g, C)
    # a_t reads what q_{t-1} would read: with a moved up by one token, both are rows of one matrix.
    moved = F.pad(a[..., 1:, :], (0, 0, 0, 1)).unsqueeze(3)
    rows = torch.cat([q.transpose(2, 3), moved], dim=3)
    reach, kept_b, whole = to_ends(rows, b, g)
    kept_k = to_ends(rows, k, g)[1]
    to_b, to_k = torch.tril(pairs(rows, b, g)), torch.tril(pairs(rows, k, g))
    moved_back = lambda x: F.pad(x[..., -1, :-1, :], (0, 0, 1, 0))  # noqa: E731
    reach_a = torch.cat([a[..., :1, :], reach[..., -1, :-1, :]], dim=-2)
    y, S = solve_chunks(
        -moved_back(to_b),
        moved_back(to_k) @ v,
        -reach_a,
        kept_b,
        whole,
        reach[..., :-1, :, :],
        to_b[..., :-1, :, :],
        S,
        update=kept_k.mT @ v,
    )
    y = y + (to_k[..., :-1, :, :].flatten(3, 4) @ v).view_as(y)
    return out_of_chunks(y, T).to(dtype), S
