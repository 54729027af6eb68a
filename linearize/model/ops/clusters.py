"""Softmax attention over at most M clusters of keys: what has left the window is merged, never dropped.

A cluster holds the mean key k̄ and mean value v̄ of n tokens, and a query sees it as n equal ones:

    y_t = Σ_m p_m v̄_m,  p = softmax_m(a(q_t, k̄_m) + ln n_m),  log weight ln Σ_m e^{a(q_t, k̄_m) + ln n_m},

a being the source's own score: exact while no more than M tokens were taken in. A token that finds all M taken makes
room for C: each cluster finds the earlier one that it costs least to join, and the C cheapest do (after ToMe, arXiv
2210.09461, which joins tokens of an image; clusters of keys are in SubGen, arXiv 2402.06082). Joining i and j changes
an output by about its share times the change of score times the difference of the values, so that its cost is

    min(n_i, n_j) · Σ_d w_d (k̄_i − k̄_j)_d² · |v̄_i − v̄_j|²,

with w_d the mean square of channel d over the queries that have read so far. (Ward's n_i n_j / (n_i + n_j) in the place
of the lesser count left SmolLM2-135M at 1.159 of its source's perplexity at 2048 tokens, this at 1.141.) Which pairs
join is decided without gradient; the means have theirs.

Letters and shapes as in ops/additive.py: q [B, H, T, K], k and v [B, G, T, ·], exists [B, G, T, 1]. State, fp32 and all
zeros at first: keys [B, G, M, K], values [B, G, M, V], n [B, G, M, 1], and [B, G, 1, K + 1] the sums of squares of the
queries, with a last column that says whether the last token existed. Taken clusters come before free ones.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .window import normalise, scores

State = tuple[Tensor, Tensor, Tensor, Tensor]
EMPTY = -1e30
"""Log weight of a free cluster: finite, so that a softmax over free ones alone is not NaN."""
PIECE = 2048
"""Tokens that `run` takes at a time: until they are read, all clusters after every chunk are held, G·M·(K + V)/C floats
a token."""


def initial_state(
    batch: int, kv_heads: int, key_width: int, value_width: int, clusters: int, device: torch.device
) -> State:
    """fp32 zeros on `device`, of M = `clusters`: keys, values, n and the sums of squares of the queries."""
    keys = torch.zeros(batch, kv_heads, clusters, key_width, device=device)
    values = keys.new_zeros(batch, kv_heads, clusters, value_width)
    return keys, values, keys.new_zeros(batch, kv_heads, clusters, 1), keys.new_zeros(batch, kv_heads, 1, key_width + 1)


def update_state(k: Tensor, v: Tensor, exists: Tensor, state: State, *, chunk: int) -> None:
    """Take in one token (T = 1; shapes as of `run`). `state` is updated in place."""
    keys, values, n, squares = state
    here = exists > 0
    full = (n[:, :, -1:] > 0) & here
    # Compiled code has no branches: it merges at every step and keeps what it needs.
    if torch.compiler.is_compiling() or bool(full.any()):
        # Of copies: what autograd keeps must not change below.
        kept = _merge(keys.clone(), values.clone(), n.clone(), squares, chunk)
        for x, merged in zip((keys, values, n), kept, strict=True):
            x.copy_(torch.where(full, merged, x))
    index = (n > 0).sum(2, keepdim=True).clamp(max=n.shape[2] - 1)
    for x, new in zip((keys, values, n), (k, v, exists), strict=True):  # free clusters are zeros
        x.scatter_add_(2, index.expand(-1, -1, 1, x.shape[-1]), new.to(x.dtype) * here)
    squares[..., -1:] = here.to(squares.dtype)


def read_state(q: Tensor, state: State, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """What one token q [B, H, 1, K] reads: y [B, H, 1, V] and its log weight [B, H, 1], both fp32. The squares of its
    query are added to the state."""
    keys, values, n, squares = state
    y, weight = _read(q, keys, values, n, None, scaling, softcap)
    with torch.no_grad():
        squares[..., :-1] += _squares(q.to(keys.dtype), keys.shape[1]).sum(2, keepdim=True) * squares[..., -1:]
    return y, weight


def run(
    q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: State, *, chunk: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor, State]:
    """A block of tokens. Between two merges, clusters only fill up, so that what a query reads is causal attention over
    them: first all merges, one per C tokens, then all reads at once. Time O(T·M).

    Args:
        q: [B, H, T, K].
        k: [B, G, T, K].
        v: [B, G, T, V].
        exists: [B, G, T, 1], 1 for a token and 0 for none.
        state: as `initial_state` makes it.
        chunk: C, how many clusters are merged away when all are taken.
        scaling: the source's, of q·k.
        softcap: the source's, or None.

    Returns:
        y [B, H, T, V] and log weight [B, H, T], fp32 (those of a token that does not exist mean nothing); the final
        state.
    """
    parts = []
    for start in range(0, max(q.shape[2], 1), PIECE):
        here = slice(start, start + PIECE)
        piece = q[:, :, here], k[:, :, here], v[:, :, here], exists[:, :, here]
        *part, state = _run(*piece, state, chunk=chunk, scaling=scaling, softcap=softcap)
        parts.append(part)
    y, weight = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return y, weight, state


def _run(
    q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: State, *, chunk: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor, State]:
    keys, values, n, squares = state
    B, H, T, K = q.shape
    G, M = keys.shape[1:3]
    real = exists[:, 0, :, 0] > 0
    if T == 0:
        return q.new_zeros(B, H, 0, values.shape[-1], dtype=values.dtype), q.new_zeros(B, H, 0), state
    # All rows on one tape: where token i of a row that holds f clusters lies at f + i, rows merge at the same indices.
    taken, count = (n[:, 0, :, 0] > 0).sum(1, keepdim=True), real.sum(1, keepdim=True)
    used, first = int((taken + count).max()), int(taken[0])
    merges = -(-max(used - M, 0) // chunk)
    length = M + merges * chunk if merges else max(used, 1)
    at = torch.arange(length, device=q.device)
    on = ((at >= taken) & (at < taken + count))[:, None, :, None]
    even = bool((taken == first).all() & real.all())  # rows lie on the tape as they are: nothing to gather
    order = real.logical_not().sort(dim=1, stable=True).indices
    token = order.gather(1, (at - taken).clamp(0, T - 1))[:, None, :, None]

    def lay(x: Tensor) -> Tensor:
        if even:
            return F.pad(x.to(keys.dtype), (0, 0, first, length - first - T))
        x = x.gather(2, token.expand(-1, x.shape[1], -1, x.shape[-1])).to(keys.dtype)
        return torch.where(on, x, 0)

    tape, one, q = lay(torch.cat([k, v], -1)), on.to(n.dtype).expand(-1, G, -1, -1), lay(q)
    start = min(M, length)
    old = at[:start, None] < taken[:, None, None]
    mean = torch.where(old, torch.cat([keys, values], -1)[:, :, :start], tape[:, :, :start])
    n = torch.where(old, n[:, :, :start], one[:, :, :start])
    mean, n = (F.pad(x, (0, 0, 0, M - start)) for x in (mean, n))
    with torch.no_grad():
        square = _squares(q, G)
        square = [square[:, :, :start].sum(2, keepdim=True), square[:, :, start:].unflatten(2, (merges, chunk)).sum(3)]
        metric = torch.cat(square, 2).cumsum(2) + squares[..., :-1]
    goes_on = taken + count > M + chunk * torch.arange(merges, device=q.device)
    keys, values, n = _Merges.apply(mean, n, tape[:, :, start:], one[:, :, start:], metric, goes_on, K)  # type: ignore[misc]
    slots = torch.arange(M, device=q.device)
    y, weight = _read(q[:, :, :start], keys[0], values[0], n[0], slots <= at[:start, None], scaling, softcap)
    if merges:
        later = q[:, :, start:].unflatten(2, (merges, chunk)).movedim(2, 0).flatten(0, 1)
        seen = slots <= M - chunk + at[:chunk, None]
        then = keys[1:].flatten(0, 1), values[1:].flatten(0, 1), n[1:].flatten(0, 1)
        part = _read(later, *then, seen, scaling, softcap)
        part = (x.unflatten(0, (merges, B)).movedim(0, 2).flatten(2, 3) for x in part)
        y, weight = (torch.cat(x, 2) for x in zip((y, weight), part, strict=True))
    if even:
        y, weight = y[:, :, first : first + T], weight[:, :, first : first + T]
    else:
        index = taken + real.cumsum(1) - 1
        none = (index < 0)[:, None]
        index = index.clamp(min=0)[:, None].expand(-1, H, -1)
        weight = weight.gather(2, index).masked_fill(none, float("-inf"))
        y = y.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, y.shape[-1])).masked_fill(none.unsqueeze(-1), 0)
    squares = torch.cat([metric[:, :, -1:], real[:, -1:, None, None].to(metric).expand(-1, G, -1, -1)], -1)
    # Of copies: a view would keep the clusters of every chunk in memory.
    return y, weight, (keys[-1].clone(), values[-1].clone(), n[-1].clone(), squares)


class _Merges(torch.autograd.Function):
    """Clusters before the first merge and after each, filled up with the chunk of the tape that follows it.

    Autograd would write down every operation of every merge: here the gradient of a merge is one gather.

    Args:
        mean: [B, G, M, K + V], keys and values.
        n: [B, G, M, 1].
        tape, one: what fills up, [B, G, S·C, K + V], and 1 where there is a token [B, G, S·C, 1], else 0 in both.
        metric: [B, G, S + 1, K], sums of squares of the queries until each merge.
        goes_on: [B, S], whether a row still merges.
        key_width: K.

    Returns:
        keys [S + 1, B, G, M, K], values [S + 1, B, G, M, V] and n [S + 1, B, G, M, 1].
    """

    @staticmethod
    def forward(ctx, mean, n, tape, one, metric, goes_on, key_width):  # type: ignore[override]
        merges, widths = goes_on.shape[1], (key_width, mean.shape[-1] - key_width)
        keys, values, counts = (n.new_empty(merges + 1, *n.shape[:3], width) for width in (*widths, 1))
        stay = torch.arange(n.numel(), device=n.device).view(n.shape[:3])
        sums, chunk = mean * n, tape.shape[2] // max(merges, 1)
        ctx.to, ctx.chunk = [], chunk
        for i in range(merges + 1):
            counts[i] = n
            for x, every in zip(sums.split(widths, -1), (keys, values), strict=True):
                torch.div(x, n.clamp(min=1), out=every[i])
            if i == merges:
                break
            to = _destinations(keys[i], values[i], n, metric[:, :, i : i + 1], chunk)
            to = torch.where(goes_on[:, i].view(-1, 1, 1), to, stay)
            fill = slice(i * chunk, (i + 1) * chunk)
            sums, n = _gathered(sums, to), _gathered(n, to)
            sums[:, :, -chunk:] += tape[:, :, fill]
            n[:, :, -chunk:] += one[:, :, fill]
            ctx.to.append(to)
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(counts)
        return keys, values, counts

    @staticmethod
    def backward(ctx, keys, values, _):  # type: ignore[override]
        (counts,) = ctx.saved_tensors
        g, tape = torch.cat([keys[-1], values[-1]], -1), []
        for i, to in reversed(list(enumerate(ctx.to))):
            g = g / counts[i + 1].clamp(min=1)
            tape.append(g[:, :, -ctx.chunk :])
            back = g.flatten(0, 2).index_select(0, to.flatten()).view_as(g)
            g = torch.cat([keys[i], values[i]], -1) + counts[i] * back
        return g, None, torch.cat(tape[::-1], 2) if tape else g[:, :, :0], None, None, None, None


def _squares(q: Tensor, groups: int) -> Tensor:
    """[B, H, T, K] -> sums over the heads of a group [B, G, T, K]."""
    return q.square().unflatten(1, (groups, -1)).sum(2)


def _read(
    q: Tensor, keys: Tensor, values: Tensor, n: Tensor, seen: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, L, K] over the clusters, those of `seen` [L, M]."""
    B, H, L, K = q.shape
    G, M = keys.shape[1:3]
    size = n.clamp(min=1).log().masked_fill(n == 0, EMPTY).mT
    if seen is not None:
        size = torch.where(seen, size, EMPTY)
    a = scores(q.to(keys.dtype).reshape(B, G, -1, L, K), keys, size.unsqueeze(2), scaling, softcap)
    p, weight = normalise(a, None)
    y = p.view(B, G, -1, M) @ values
    weight = weight.masked_fill(weight < EMPTY / 2, float("-inf"))
    return y.view(B, H, L, -1), weight.view(B, H, L)


def _merge(keys: Tensor, values: Tensor, n: Tensor, squares: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """M taken clusters -> M − C taken ones, in their order, and C free ones."""
    to = _destinations(keys, values, n, squares[..., :-1], chunk)
    keys, values, total = (_gathered(x, to) for x in (keys * n, values * n, n))
    return keys / total.clamp(min=1), values / total.clamp(min=1), total


@torch.no_grad()
def _destinations(keys: Tensor, values: Tensor, n: Tensor, metric: Tensor, chunk: int) -> Tensor:
    """Where each of M taken clusters goes, to one of M − C in their order: [B, G, M], rows of all of them as
    [B·G·M, ·]."""
    B, G, M = n.shape[:3]
    cost = _distances(keys * metric.sqrt()).mul_(_distances(values)).mul_(torch.minimum(n, n.mT))
    cost += cost.new_full((M, M), float("inf")).triu()  # adding is much faster than masking
    gone = cost.amin(-1).topk(chunk, largest=False, sorted=False).indices
    first = M * torch.arange(B * G, device=n.device).view(B, G, 1)
    partner = cost.flatten(0, 2).index_select(0, (gone + first).flatten()).argmin(-1).view_as(gone)
    into = torch.arange(M, device=n.device).expand(B, G, -1).scatter(2, gone, partner)
    for _ in range((chunk - 1).bit_length()):  # where a partner goes too, to where it goes
        into = into.gather(2, into)
    index = torch.ones_like(into).scatter_(2, gone, 0).cumsum(2) - 1
    return index.gather(2, into) + first


def _gathered(x: Tensor, to: Tensor) -> Tensor:
    """The rows of x [B, G, M, D] summed where `to` sends them."""
    rows = x.flatten(0, 2)
    return torch.zeros_like(rows).index_add_(0, to.flatten(), rows).view_as(x)


def _distances(x: Tensor) -> Tensor:
    """Squares of the distances between all: [B, G, M, D] -> [B, G, M, M]; of equal ones, zero but for rounding."""
    square = x.square().sum(-1, keepdim=True)
    both = (square + square.mT).flatten(0, 1)
    return both.baddbmm_(x.flatten(0, 1), x.mT.flatten(0, 1), alpha=-2).unflatten(0, x.shape[:2])
