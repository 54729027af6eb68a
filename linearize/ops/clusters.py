"""Softmax attention over at most M clusters of keys: what has left the window is merged, never dropped.

A cluster holds the mean key k̄ and mean value v̄ of n tokens, and a query sees it as n equal ones:

    y_t = Σ_m p_m v̄_m,  p = softmax_m(a(q_t, k̄_m) + ln n_m),  log weight ln Σ_m e^{a(q_t, k̄_m) + ln n_m},

a being the source's own score: exact while no more than M tokens were taken in. A token that finds all M taken makes
room for C: each cluster finds the earlier one that it costs least to join, and the C cheapest do (after ToMe, arXiv
2210.09461, which joins tokens of an image; clusters of keys are in SubGen, arXiv 2402.06082). Joining i and j changes
an output by about its share times the change of score times the difference of the values, so that its cost is

    n_i n_j / (n_i + n_j) · Σ_d w_d (k̄_i − k̄_j)_d² · |v̄_i − v̄_j|²,

with w_d the mean square of channel d over the queries that have read so far. Which pairs join is decided without
gradient; the means have theirs.

Letters and shapes as in ops/additive.py: q [B, H, T, K], k and v [B, G, T, ·], exists [B, G, T, 1]. State, fp32 and all
zeros at first: keys [B, G, M, K], values [B, G, M, V], n [B, G, M, 1], and [B, G, 1, K + 1] the sums of squares of the
queries, with a last column that says whether the last token existed. Taken clusters come before free ones.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.window import scores

State = tuple[Tensor, Tensor, Tensor, Tensor]
EMPTY = -1e30
"""Log weight of a free cluster: finite, so that a softmax over free ones alone is not NaN."""


def empty_state(
    batch: int, kv_heads: int, key_width: int, value_width: int, clusters: int, device: torch.device
) -> State:
    """fp32 zeros."""
    keys = torch.zeros(batch, kv_heads, clusters, key_width, device=device)
    values = keys.new_zeros(batch, kv_heads, clusters, value_width)
    return keys, values, keys.new_zeros(batch, kv_heads, clusters, 1), keys.new_zeros(batch, kv_heads, 1, key_width + 1)


def naive_recurrent(
    q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: State, *, chunk: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor, State]:
    """Token by token: the definition, and the oracle of `run`."""
    y, weight = [], []
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        keys, values, n, squares = (x.clone() for x in state)
        state = keys, values, n, squares
        absorb(k[:, :, now], v[:, :, now], exists[:, :, now], state, chunk=chunk)
        for parts, x in zip((y, weight), look(q[:, :, now], state, scaling=scaling, softcap=softcap), strict=True):
            parts.append(x)
    return torch.cat(y, 2), torch.cat(weight, 2), state


def absorb(k: Tensor, v: Tensor, exists: Tensor, state: State, *, chunk: int) -> None:
    """One token per row, in place."""
    keys, values, n, squares = state
    here = exists > 0
    full = (n[:, :, -1:] > 0) & here
    # Compiled code has no branches: it merges at every step and keeps what it needs.
    if torch.compiler.is_compiling() or bool(full.any()):
        # Of copies: what autograd keeps must not change below.
        kept = _merge(keys.clone(), values.clone(), n.clone(), squares, chunk)
        for x, merged in zip((keys, values, n), kept, strict=True):
            x.copy_(torch.where(full, merged, x))
    place = (n > 0).sum(2, keepdim=True).clamp(max=n.shape[2] - 1)
    for x, new in zip((keys, values, n), (k, v, exists), strict=True):  # free clusters are zeros
        x.scatter_add_(2, place.expand(-1, -1, 1, x.shape[-1]), new.to(x.dtype) * here)
    squares[..., -1:] = here.to(squares.dtype)


def look(q: Tensor, state: State, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """What one token per row reads: y [B, H, 1, V] and its log weight [B, H, 1], both fp32. Adds its squares."""
    keys, values, n, squares = state
    y, weight = _read(q, keys, values, n, None, scaling, softcap)
    with torch.no_grad():
        squares[..., :-1] += _squares(q.to(keys.dtype), keys.shape[1]).sum(2, keepdim=True) * squares[..., -1:]
    return y, weight


def run(
    q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: State, *, chunk: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor, State]:
    """A block of tokens, C at a time: between two merges, clusters only fill up, so that what a query reads is causal
    attention over them. Time O(T·M) and one merge per C tokens.

    Returns:
        y [B, H, T, V] and log weight [B, H, T], fp32 (those of a token that does not exist mean nothing); the state.
    """
    keys, values, n, squares = state
    B, H, T, K = q.shape
    G, M = keys.shape[1:3]
    real = exists[:, 0, :, 0] > 0
    if T == 0:
        return q.new_zeros(B, H, 0, values.shape[-1], dtype=values.dtype), q.new_zeros(B, H, 0), state
    # All rows on one tape: where token i of a row that holds f clusters lies at f + i, rows merge at the same places.
    taken, count = (n[:, 0, :, 0] > 0).sum(1, keepdim=True), real.sum(1, keepdim=True)
    used = int((taken + count).max())
    merges = -(-max(used - M, 0) // chunk)
    length = M + merges * chunk if merges else max(used, 1)
    at = torch.arange(length, device=q.device)
    on = ((at >= taken) & (at < taken + count))[:, None, :, None]
    order = real.logical_not().sort(dim=1, stable=True).indices
    token = order.gather(1, (at - taken).clamp(0, T - 1))[:, None, :, None]

    def lay(x: Tensor) -> Tensor:
        x = x.gather(2, token.expand(-1, x.shape[1], -1, x.shape[-1])).to(keys.dtype)
        return torch.where(on, x, 0)

    new = lay(k), lay(v), on.to(n.dtype).expand(-1, G, -1, -1)
    q, square = lay(q), _squares(lay(q.detach()), G)
    start = min(M, length)
    old = at[:start, None] < taken[:, None, None]
    first = [torch.where(old, x[:, :, :start], tape[:, :, :start]) for x, tape in zip(state, new, strict=False)]
    keys, values, n = (F.pad(x, (0, 0, 0, M - start)) for x in first)
    squares = torch.cat([squares[..., :-1], real[:, -1:, None, None].to(squares).expand(-1, G, -1, -1)], -1)
    slots = torch.arange(M, device=q.device)
    y, weight = [], []
    begin, end = 0, start
    while True:
        newest = at[begin:end] if begin == 0 else M - chunk + at[:chunk]
        part = _read(q[:, :, begin:end], keys, values, n, slots <= newest[:, None], scaling, softcap)
        y.append(part[0])
        weight.append(part[1])
        squares = F.pad(square[:, :, begin:end].sum(2, keepdim=True), (0, 1)) + squares
        begin, end = end, end + chunk
        if begin >= length:
            break
        merged = _merge(keys, values, n, squares, chunk)
        filled = [
            torch.cat([x[:, :, : M - chunk], tape[:, :, begin:end]], 2) for x, tape in zip(merged, new, strict=True)
        ]
        more = (taken + count > begin)[:, None, :, None]
        keys, values, n = (torch.where(more, a, b) for a, b in zip(filled, (keys, values, n), strict=True))
    place = taken + real.cumsum(1) - 1
    none = (place < 0)[:, None]
    place = place.clamp(min=0)[:, None].expand(-1, H, -1)
    weight = torch.cat(weight, 2).gather(2, place).masked_fill(none, float("-inf"))
    y = torch.cat(y, 2).gather(2, place.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1]))
    return y.masked_fill(none.unsqueeze(-1), 0), weight, (keys, values, n, squares)


def _squares(q: Tensor, groups: int) -> Tensor:
    """[B, H, T, K] -> sums over the heads of a group [B, G, T, K]."""
    return q.square().unflatten(1, (groups, -1)).sum(2)


def _read(
    q: Tensor, keys: Tensor, values: Tensor, n: Tensor, seen: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, L, K] over the clusters, those of `seen` [L, M]."""
    B, H, L, K = q.shape
    G, M = keys.shape[1:3]
    a = scores(q.to(keys.dtype).reshape(B, G, -1, K), keys, scaling, softcap).view(B, G, -1, L, M)
    a = a + n.clamp(min=1).log().masked_fill(n == 0, EMPTY).mT.unsqueeze(2)
    if seen is not None:
        a = a.masked_fill(~seen, EMPTY)
    weight = a.logsumexp(-1)
    y = a.softmax(-1).view(B, G, -1, M) @ values
    weight = weight.masked_fill(weight < EMPTY / 2, float("-inf"))
    return y.view(B, H, L, -1), weight.view(B, H, L)


def _merge(keys: Tensor, values: Tensor, n: Tensor, squares: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """M taken clusters -> M − C taken ones, in their order, and C free ones."""
    M = n.shape[2]
    with torch.no_grad():
        cost = _distances(keys * squares[..., :-1].sqrt()) * _distances(values) * (n * n.mT / (n + n.mT).clamp(min=1))
        earlier = torch.ones(M, M, dtype=torch.bool, device=n.device).tril(-1)
        best, partner = cost.masked_fill(~earlier, float("inf")).min(-1, keepdim=True)
        gone = best.topk(chunk, dim=2, largest=False, sorted=False).indices
        at = torch.arange(M, device=n.device).view(1, 1, M, 1).expand_as(n)
        into = at.scatter(2, gone, partner.gather(2, gone))
        for _ in range((chunk - 1).bit_length()):  # where a partner goes too, to where it goes
            into = into.gather(2, into)
        into = into.gather(2, gone)
        stays = at.scatter(2, gone, M).sort(2).values[:, :, : M - chunk]

    def joined(x: Tensor) -> Tensor:
        wide = (-1, -1, -1, x.shape[-1])
        x = x.scatter_add(2, into.expand(wide), x.gather(2, gone.expand(wide)))
        return x.gather(2, stays.expand(wide))

    total = joined(n)
    keys, values = joined(keys * n) / total.clamp(min=1), joined(values * n) / total.clamp(min=1)
    free = 0, 0, 0, chunk
    return F.pad(keys, free), F.pad(values, free), F.pad(total, free)


def _distances(x: Tensor) -> Tensor:
    """Squares of the distances between all: [B, G, M, D] -> [B, G, M, M]."""
    return torch.cdist(x, x).square()
