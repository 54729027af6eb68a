"""The additive recurrence S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ, read as y_t = q_tᵀ S_t.

One family for linear attention (no decay), RetNet (fixed g), Mamba-2 and Lightning (one g per head), GLA and HGRN-2
(one g per channel). Letters: B rows, H query heads, G key/value heads (H = r·G, a group of r queries reads one state),
T tokens, K key width, V value width, C chunk. Shapes: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V], log_decay g ≤ 0
of shape [B, G, T, K], [B, G, T, 1], anything that broadcasts to it, or None; state [B, G, K, V] fp32. All forms compute
in fp32 (fp64 for fp64 inputs) and return (y [B, H, T, V] in q's dtype, state). A token with k = 0 and g = 0 leaves no
trace.

`_prepare`, `_to_ends`, `_pairs`, `_pairs_by_halves`, `_leaf` and what they call are the algebra of decay that the other
families of this folder share.

Sources: GLA, arXiv 2312.06635 (chunked form with secondary chunks); SSD, arXiv 2405.21060.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
PIECE = 1024
"""Tokens whose intermediate results are made at once: what is larger is a fresh mapping for the allocator every time,
and at 16,384 tokens mapping pages took a third of the time."""
LEAF = 8
"""Width of the diagonal blocks that are computed without a reference point."""
STRONG = -60.0
"""Log decay of a block beyond which it is not factorised. Up to there its two factors stay below e^30, and rounding the
exponents costs a pair at most 30 · 2^-23 = 4e-6 of itself."""


def _prepare(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None):
    """Upcast; fold query groups: q -> [B, G, r, T, K]; broadcast the decay to [B, G, T, 1 or K]; make the state."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    B, H, T, K = q.shape
    G, V = k.shape[1], v.shape[-1]
    q = q.to(dtype).view(B, G, H // G, T, K)
    k, v = k.to(dtype), v.to(dtype)
    if log_decay is not None:
        log_decay = log_decay.to(dtype).expand(B, G, T, log_decay.shape[-1])
    state = k.new_zeros(B, G, K, V) if state is None else state.to(dtype)
    return q, k, v, log_decay, state


def naive_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the other forms."""
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    y = []
    for t in range(q.shape[3]):
        if g is not None:
            S = S * g[:, :, t, :, None].exp()
        S = S + k[:, :, t, :, None] * v[:, :, t, None, :]
        y.append(q[:, :, :, t] @ S)
    out = torch.stack(y, dim=3) if y else q.new_zeros(shape)
    return out.reshape(shape).to(dtype), S


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token (T = 1), updating `state` in place: the decoding step."""
    if state is None:
        return naive_recurrent(q, k, v, log_decay)
    absorb(k, v, log_decay, state)
    return look(q, state), state


def absorb(k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    """The writes of one token, into `state`, in place."""
    if log_decay is not None:
        state.mul_(log_decay.to(state.dtype).exp().mT)
    state.flatten(0, 1).baddbmm_(k.to(state.dtype).flatten(0, 1).mT, v.to(state.dtype).flatten(0, 1))


def look(q: Tensor, state: Tensor) -> Tensor:
    """What one token reads: q [B, H, 1, K] -> [B, H, 1, V]."""
    B, H, _, K = q.shape
    G = state.shape[1]
    y = torch.bmm(q.to(state.dtype).reshape(B * G, H // G, K), state.flatten(0, 1))
    return y.view(B, H, 1, -1).to(q.dtype)


def materialise(q: Tensor, k: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The mixer as an explicit matrix A [B, H, T, T], y = A v: every pairwise exponent is ≤ 0, so nothing overflows."""
    dtype = q.dtype
    B, H, T, _ = q.shape
    q, k, _, g, _ = _prepare(q, k, k, log_decay, None)
    return torch.tril(_pairs(q, k, g)).view(B, H, T, T).to(dtype)


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once through the T×T matrix: quadratic, for tests and for distillation."""
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    A = torch.tril(_pairs(q, k, g))
    inter, kept, whole = _to_ends(q, k, g)
    y = A @ v[:, :, None] + inter @ S[:, :, None]
    S = S * whole + kept.mT @ v
    return y.reshape(shape).to(dtype), S


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens: quadratic inside, recurrent between them. Linear in T; no exponent above −STRONG / 2."""
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
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
    C = min(chunk, max(LEAF, 1 << (T - 1).bit_length()))
    pad = -T % C
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        g = None if g is None else F.pad(g, (0, 0, 0, pad))
    N = (T + pad) // C
    q = q.unflatten(3, (N, C)).transpose(2, 3)
    k, v = k.unflatten(2, (N, C)), v.unflatten(2, (N, C))
    g = None if g is None else g.unflatten(2, (N, C))

    inter, kept, whole = _to_ends(q, k, g)
    before = []
    # Not whole[:, :, n]: the gradient of every index would be a tensor of all chunks.
    for decay, update in zip(whole.unbind(2), (kept.mT @ v).unbind(2), strict=True):
        before.append(S)
        S = torch.addcmul(update, S, decay)
    inside = torch.tril(_pairs(q, k, g) if g is None or g.shape[-1] == 1 else _pairs_by_halves(q, k, g))
    y = inside @ v[:, :, :, None] + inter @ torch.stack(before, dim=2)[:, :, :, None]
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :T], S


def _to_ends(q: Tensor, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries decayed from the start of their chunk, keys decayed to its end, and the decay of the whole chunk [..., K,
    1]."""
    if g is None:
        return q, k, k.new_ones(*k.shape[:-2], 1, 1)
    return q * g.cumsum(-2).exp().unsqueeze(-3), k * _after(g).exp(), g.sum(-2, keepdim=True).exp().mT


def _after(g: Tensor) -> Tensor:
    """Σ_{l > j} g_l along the tokens. Summed from the end: a difference of two prefix sums would cancel under strong
    decay."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _between(g: Tensor) -> Tensor:
    """Σ_{j < l ≤ i} g_l for all pairs: g [..., C, K] -> [..., C (i), C (j), K], without cancellation; 0 where j ≥ i."""
    C = g.shape[-2]
    below = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)[:, :, None]
    return torch.where(below, g.unsqueeze(-2), 0.0).cumsum(-3)


def _pairs(q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    """A_ij = Σ_K q_i k_j e^{g_{j+1} + … + g_i} for j ≤ i (what lies above the diagonal is finite and meaningless).

    q [..., r, C, K], k [..., C, K], g [..., C, 1 or K] -> [..., r, C, C].
    """
    if g is None:
        return q @ k.unsqueeze(-3).mT
    decay = _between(g).exp()
    if g.shape[-1] == 1:
        return (q @ k.unsqueeze(-3).mT) * decay.squeeze(-1).unsqueeze(-3)
    return torch.einsum("...rik,...ijk->...rij", q, decay * k.unsqueeze(-3))


def _leaf(g: Tensor) -> int:
    """Width of the largest blocks in which no channel decays by more than e^STRONG; 0 where even LEAF tokens do."""
    if torch.compiler.is_compiling():
        return 0  # a choice by value would break the graph
    leaf, width, total = 0, LEAF, g.detach().unflatten(-2, (-1, LEAF)).sum(-2)
    while float(total.amin()) >= STRONG:
        leaf, width = width, 2 * width
        if width > g.shape[-2]:
            break
        total = total.unflatten(-2, (-1, 2)).sum(-2)
    return leaf


def _centred(g: Tensor) -> Tensor:
    """Σ_{l ≤ i} g_l less half of the whole sum: within ±STRONG / 2 in a mild block."""
    total = g.cumsum(-2)
    return total - total[..., -1:, :] / 2


def _pairs_by_halves(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """`_pairs` with a decay per channel, without the C×C×K tensor.

    The square below the diagonal factorises around the last token of the first half: q decayed from there, k decayed to
    there, both exponents ≤ 0 however strong the decay. The two halves are squares of the same kind. A mild block
    (`_leaf`) factorises as a whole, around half of its decay; elsewhere the blocks of LEAF are direct.
    """
    return _halves(q, k, g, _leaf(g))


def _halves(q: Tensor, k: Tensor, g: Tensor, leaf: int) -> Tensor:
    C = q.shape[-2]
    if leaf >= C:
        G = _centred(g)
        return (q * G.exp().unsqueeze(-3)) @ (k * G.neg().exp()).unsqueeze(-3).mT
    if C <= LEAF:
        return _pairs(q, k, g)
    h = C // 2
    q2, k2, g2 = (x.unflatten(-2, (2, h)) for x in (q, k, g))
    diagonal = _halves(q2.transpose(-4, -3), k2, g2, leaf)
    first = g2[..., 0, :, :]
    into = k2[..., 0, :, :] * _after(first).exp()
    outof = q2[..., 1, :, :] * g2[..., 1, :, :].cumsum(-2).exp().unsqueeze(-3)
    below = outof @ into.unsqueeze(-3).mT
    upper = torch.cat([diagonal[..., 0, :, :, :], below.new_zeros(below.shape)], dim=-1)
    return torch.cat([upper, torch.cat([below, diagonal[..., 1, :, :, :]], dim=-1)], dim=-2)
