"""The diagonal-plus-low-rank recurrence S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ, read as y_t = q_tᵀ S_t.

The generalised delta rule of RWKV-7 (arXiv 2503.14456): a = −κ̂, the key to remove, and b = η ∘ κ̂ with an in-context
learning rate η per channel. The delta rule is the case a = e^{g} ∘ k, b = −β k with the write β k vᵀ, for which
ops/delta.py needs half of the products. Letters and shapes as in ops/additive.py: q [B, H, T, K],
k, a, b [B, G, T, K], v [B, G, T, V], log_decay g ≤ 0 of shape [B, G, T, K], anything that broadcasts to it, or None;
state [B, G, K, V] fp32. All forms compute in fp32 (fp64 for fp64 inputs) and return (y [B, H, T, V] in q's dtype,
state). a reads the state before it decays. The caller bounds a and b so that the transition does not grow. A token with
k, a (or b) and g zero leaves no trace.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.additive import CHUNK, _pairs, _prepare, _to_ends, look
from ..ops.delta import chunk_size, into_chunks, out_of_chunks, pairs_of, solve_chunks


def naive_recurrent(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the other forms."""
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    a, b = a.to(v.dtype), b.to(v.dtype)
    y = []
    for t in range(q.shape[3]):
        decayed = S if g is None else S * g[:, :, t, :, None].exp()
        S = decayed + b[:, :, t, :, None] * (a[:, :, t, None] @ S) + k[:, :, t, :, None] * v[:, :, t, None]
        y.append(q[:, :, :, t] @ S)
    out = torch.stack(y, dim=3) if y else q.new_zeros(shape)
    return out.reshape(shape).to(dtype), S


def step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token (T = 1), updating `state` in place: the decoding step."""
    if state is None:
        return naive_recurrent(q, k, v, a, b, log_decay)
    absorb(k, v, a, b, log_decay, state)
    return look(q, state), state


def absorb(k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    """The writes of one token, into `state`, in place. What it reads is `additive.look`."""
    dtype = state.dtype
    read = a.to(dtype) @ state
    if log_decay is not None:
        state.mul_(log_decay.to(dtype).exp().mT)
    keys = torch.cat([b.to(dtype), k.to(dtype)], dim=2)
    values = torch.cat([read, v.to(dtype)], dim=2)
    state.flatten(0, 1).baddbmm_(keys.flatten(0, 1).mT, values.flatten(0, 1))


def parallel(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once through T×T matrices, pair by pair: quadratic, for tests and for distillation."""
    return _in_chunks(q, k, v, a, b, log_decay, state, q.shape[2], _pairs)


def materialise(q: Tensor, k: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The mixer as an explicit matrix A [B, H, T, T], y = A v: what it makes of the unit vectors."""
    B, G, T, _ = k.shape
    unit = torch.eye(T, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device).expand(B, G, T, T)
    return torch.tril(parallel(q, k, unit, a, b, log_decay)[0])


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens: a triangular system inside, a K×K map between them. Linear in T; exponents as in additive."""
    return _in_chunks(q, k, v, a, b, log_decay, state, chunk_size(q.shape[2], chunk), pairs_of(log_decay))


def _in_chunks(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None, state: Tensor | None, C: int,
    pairs: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """With z_t = a_tᵀ S_{t-1}: the z of a chunk solve the system, and its tokens write b_t z_tᵀ + k_t v_tᵀ."""
    dtype, (B, H, T, _) = q.dtype, q.shape
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    if T == 0:
        return q.new_zeros(B, H, T, v.shape[-1]).to(dtype), S
    q, k, v, a, b = (into_chunks(x, C) for x in (q, k, v, a.to(v.dtype), b.to(v.dtype)))
    g = None if g is None else into_chunks(g, C)
    # a_t reads what q_{t-1} would read: with a moved up by one token, both are rows of one matrix.
    moved = F.pad(a[..., 1:, :], (0, 0, 0, 1)).unsqueeze(3)
    rows = torch.cat([q.transpose(2, 3), moved], dim=3)
    reach, kept_b, whole = _to_ends(rows, b, g)
    kept_k = _to_ends(rows, k, g)[1]
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
        write=kept_k.mT @ v,
    )
    y = y + (to_k[..., :-1, :, :].flatten(3, 4) @ v).view_as(y)
    return out_of_chunks(y, T).to(dtype), S
