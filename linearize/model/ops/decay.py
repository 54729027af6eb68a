"""The algebra of decay that several families of this folder share: chunks, and products under a decay.

Letters as in ops/additive.py; C tokens of a chunk, N chunks. A log decay g ≤ 0 is [..., C, K], or [..., C, 1] where all
channels share it. No exponent here is above −STRONG / 2, however strong the decay.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import host

CHUNK = 64
LEAF = 8
"""Width of the diagonal blocks that are computed without a reference point."""
STRONG = -60.0
"""Log decay of a block beyond which it is not factorised. Up to there its two factors stay below e^30, and rounding the
exponents costs a pair at most 30 · 2^-23 = 4e-6 of itself."""


def prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Inputs of a recurrence over matrices as its forms compute with them.

    Args and shapes are those of `additive.chunked`. Returned are q [B, G, r, T, K], its heads by group, and the others
    in full shape, all in fp32 (fp64 for fp64 inputs).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    B, H, T, K = q.shape
    G, V = k.shape[1], v.shape[-1]
    q = q.to(dtype).view(B, G, H // G, T, K)
    k, v = k.to(dtype), v.to(dtype)
    if log_decay is not None:
        log_decay = log_decay.to(dtype).expand(B, G, T, log_decay.shape[-1])
    state = k.new_zeros(B, G, K, V) if state is None else state.to(dtype)
    return q, k, v, log_decay, state


def token_by_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, update: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """The recurrent form of a family over matrices, y_t = q_tᵀ S_t; arguments and result as of `additive.chunked`.

    `update` gives S_t from (S_{t-1}, the same decayed, k_t [B, G, 1, K], v_t [B, G, 1, V], t).
    """
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = prepare(q, k, v, log_decay, state)
    y = []
    for t in range(q.shape[3]):
        decayed = S if g is None else S * g[:, :, t, :, None].exp()
        S = update(S, decayed, k[:, :, t, None], v[:, :, t, None], t)
        y.append(q[:, :, :, t] @ S)
    out = torch.stack(y, dim=3) if y else q.new_zeros(shape)
    return out.reshape(shape).to(dtype), S


def chunk_size(T: int, chunk: int) -> int:
    """The chunk for T tokens: no larger than the next power of two."""
    return min(chunk, max(LEAF, 1 << (T - 1).bit_length()))


def into_chunks(x: Tensor, C: int) -> Tensor:
    """[..., T, ·] -> [..., N, C, ·], the last chunk filled with zeros, which leave no trace."""
    pad = -x.shape[-2] % C
    return (F.pad(x, (0, 0, 0, pad)) if pad else x).unflatten(-2, (-1, C))


def out_of_chunks(y: Tensor, T: int) -> Tensor:
    """[B, G, N, r, C, V] -> [B, H, T, V]."""
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :T]


def to_ends(q: Tensor, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [..., r, C, K] decayed from the start of the chunk, k [..., C, K] decayed to its end, and the decay of the
    whole chunk [..., 1 or K, 1]."""
    if g is None:
        return q, k, k.new_ones(*k.shape[:-2], 1, 1)
    return q * g.cumsum(-2).exp().unsqueeze(-3), k * after(g).exp(), g.sum(-2, keepdim=True).exp().mT


def after(g: Tensor) -> Tensor:
    """Σ_{l > j} g_l along the tokens of g [..., C, ·]. Summed from the end: a difference of two prefix sums would
    cancel under strong decay."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def between(g: Tensor) -> Tensor:
    """Σ_{j < l ≤ i} g_l for all pairs: g [..., C, ·] -> [..., C (i), C (j), ·], without cancellation; 0 where j ≥ i."""
    C = g.shape[-2]
    below = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)[:, :, None]
    return torch.where(below, g.unsqueeze(-2), 0.0).cumsum(-3)


def centred(g: Tensor) -> Tensor:
    """Σ_{l ≤ i} g_l less half of the whole sum: within ±STRONG / 2 in a mild block."""
    total = g.cumsum(-2)
    return total - total[..., -1:, :] / 2


def leaf_width(g: Tensor) -> int:
    """Width of the largest blocks in which no channel decays by more than e^STRONG; 0 where even LEAF tokens do, or
    where a choice by value would wait for the device or break a graph."""
    if not host.is_free(g):
        return 0
    leaf, width, total = 0, LEAF, g.detach().unflatten(-2, (-1, LEAF)).sum(-2)
    while float(total.amin()) >= STRONG:
        leaf, width = width, 2 * width
        if width > g.shape[-2]:
            break
        total = total.unflatten(-2, (-1, 2)).sum(-2)
    return leaf


def pairs(q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    """A_ij = Σ_K q_i k_j e^{g_{j+1} + … + g_i} for j ≤ i (what lies above the diagonal is finite and meaningless).

    With a decay per channel, the square below the diagonal factorises around the last token of the first half: q
    decayed from there, k decayed to there, both exponents ≤ 0 however strong the decay. The two halves are squares of
    the same kind. A mild block (`leaf_width`) factorises as a whole, around half of its decay; elsewhere the blocks of
    LEAF are direct. So no C×C×K tensor is made (secondary chunks of GLA, arXiv 2312.06635).

    Args:
        q: [..., r, C, K].
        k: [..., C, K].
        g: [..., C, 1 or K], or None.

    Returns:
        [..., r, C, C].
    """
    if g is None or g.shape[-1] == 1:
        return _direct(q, k, g)
    return _halves(q, k, g, leaf_width(g))


def _direct(q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    if g is None:
        return q @ k.unsqueeze(-3).mT
    decay = between(g).exp()
    if g.shape[-1] == 1:
        return (q @ k.unsqueeze(-3).mT) * decay.squeeze(-1).unsqueeze(-3)
    return torch.einsum("...rik,...ijk->...rij", q, decay * k.unsqueeze(-3))


def _halves(q: Tensor, k: Tensor, g: Tensor, leaf: int) -> Tensor:
    C = q.shape[-2]
    if leaf >= C:
        G = centred(g)
        return (q * G.exp().unsqueeze(-3)) @ (k * G.neg().exp()).unsqueeze(-3).mT
    if C <= LEAF:
        return _direct(q, k, g)
    h = C // 2
    q2, k2, g2 = (x.unflatten(-2, (2, h)) for x in (q, k, g))
    diagonal = _halves(q2.transpose(-4, -3), k2, g2, leaf)
    first = g2[..., 0, :, :]
    into = k2[..., 0, :, :] * after(first).exp()
    outof = q2[..., 1, :, :] * g2[..., 1, :, :].cumsum(-2).exp().unsqueeze(-3)
    below = outof @ into.unsqueeze(-3).mT
    upper = torch.cat([diagonal[..., 0, :, :, :], below.new_zeros(below.shape)], dim=-1)
    return torch.cat([upper, torch.cat([below, diagonal[..., 1, :, :, :]], dim=-1)], dim=-2)
