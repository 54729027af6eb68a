"""Softmax attention over at most M clusters of keys: what has left the window is merged, never dropped.

A cluster holds the mean key k̄ and mean value v̄ of n tokens, and a query sees it as n equal ones, and a little more:

    y_t = Σ_m p_m v̄_m,  p = softmax_m(b_m),  b_m = a(q_t, k̄_m) + ln n_m + γ c_m,  log weight ln Σ_m e^{b_m},

a being the source's own score: exact while no more than M tokens were taken in. By Jensen's inequality e^{a(q, k̄)} is
too small for what it stands for; c_m = ½ Σ_d w_d Var_d(m), with Var the variance of the keys of a cluster and w_d the
mean square of channel d over the scaled queries so far, is the second-order term of what is missing, for queries whose
channels are independent. They are not, so γ = 1 is too much.

A token that finds all M taken makes room for C: each cluster finds the earlier one that it costs least to join, and the
C cheapest do (after ToMe, arXiv 2210.09461, which joins tokens of an image; clusters of keys are in SubGen, arXiv
2402.06082). Joining i and j changes an output by about its share times the change of score times the difference of the
values, so that its cost is

    min(n_i A_i^α, n_j A_j^α) · Σ_d w_d (k̄_i − k̄_j)_d² · |v̄_i − v̄_j|²,  A_m = exp(μ·k̄_m + ½ Σ_d σ_d² k̄_md²).

A_m is the weight that a key is expected to get from queries like those so far, of mean μ and variance σ² (Expected
Attention of kvpress, arXiv 2510.00636, drops keys of little A; here they are merged first). Which pairs join is decided
without gradient; the means have theirs.

Means are kept in the dtype of the state and computed with in fp32. They are rounded when a token enters and after every
merge, by the block form as by the steps; compact.py says how. What int4 keeps is the difference from a centre, which is
the first token that was taken in: keys of a head have channels in common, which would leave the others few of 16 steps
(KIVI, arXiv 2402.02750, scales by channel).

Letters and shapes as in ops/additive.py: q [B, H, T, K], k and v [B, G, T, ·], exists [B, G, T, 1]. State, all zeros at
first: means [B, G, M, K + V]; sizes [B, G, M, 2] fp32, n and Σ_d w_d Var_d times the heads of a group; queries
[B, G, 1, 2K + 1] fp32, sums of the squares of the scaled queries and of these themselves, with a last column that says
whether the last token existed; for int8 and int4 what scales the means, [B, G, M, ·] each; for int4 the centre
[B, G, 1, K + V] fp32.
Taken clusters come before free ones.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import host
from . import chooses_fla, clusters_backend, compact
from .joining import Rule, joined
from .window import normalise, scores

State = tuple[Tensor, ...]
EMPTY = -1e30
"""Log weight of a free cluster: finite, so that a softmax over free ones alone is not NaN."""
PIECE = 2048
"""Tokens that `run` takes at a time: until they are read, all clusters after every chunk are held, G·M·(K + V)/C floats
a token. Of means kept in whole numbers, the gradient ends between two pieces."""

MERGED = 2**19
"""Numbers of means that steps merge at a time on a CPU, whose cache has room for them."""


def initial_state(
    batch: int, kv_heads: int, key_width: int, value_width: int, clusters: int, device: torch.device,
    dtype: torch.dtype | None = None,
) -> State:  # fmt: skip
    """Zeros on `device`, of M = `clusters`, the means in `dtype`: bf16, int8, uint8 for int4, or None for fp32."""
    width = key_width + value_width
    sizes = torch.zeros(batch, kv_heads, clusters, 2, device=device)
    means = torch.zeros(batch, kv_heads, clusters, width, device=device)
    kept, *scales = compact.stored_pairs(means, key_width, dtype)
    state = kept, sizes, sizes.new_zeros(batch, kv_heads, 1, 2 * key_width + 1), *scales
    return (*state, sizes.new_zeros(batch, kv_heads, 1, width)) if dtype == torch.uint8 else state


def opened(state: State) -> Tensor:
    """The means of a state, [B, G, M, K + V] fp32; those of free clusters are zeros."""
    x = torch.cat(_pairs(state), -1)
    return x if _centre(state) is None else x.mul_(state[1][..., :1] > 0)


def _pairs(state: State) -> tuple[Tensor, Tensor]:
    """Keys and values of the clusters, fp32, not to be changed; those of free clusters are anything finite."""
    means, sizes, queries = state[:3]
    K, centre = queries.shape[-1] // 2, _centre(state)
    keys, values = compact.opened_pairs(means, _scales(state), K, sizes.dtype)
    # In place: on a CPU, new memory costs more than the sum.
    return (keys, values) if centre is None else (keys.add_(centre[..., :K]), values.add_(centre[..., K:]))


def _kept(x: Tensor, there: Tensor, key_width: int, dtype: torch.dtype, centre: Tensor | None) -> State:
    """What is kept of means [B, G, ·, K + V] where they are `there`, and their scales if any."""
    return compact.stored_pairs(x if centre is None else (x - centre) * there, key_width, dtype)


def _rounded(x: Tensor, there: Tensor, key_width: int, dtype: torch.dtype | None, centre: Tensor | None) -> Tensor:
    """Means as they are after they were kept."""
    if centre is None:
        return compact.rounded_pairs(x, key_width, dtype)
    return (compact.rounded_pairs(x - centre, key_width, dtype) + centre) * there


def _centre(state: State) -> Tensor | None:
    return state[-1] if state[0].dtype == torch.uint8 else None


def _scales(state: State) -> State:
    return state[3:-1] if state[0].dtype == torch.uint8 else state[3:]


def _first(comes: Tensor, token: Tensor, centre: Tensor) -> Tensor:
    """The centre of rows to which their first token comes, or came before."""
    return torch.where(comes, token.detach(), centre)


def update_state(k: Tensor, v: Tensor, exists: Tensor, state: State, rule: Rule) -> None:
    """Take in one token (T = 1; shapes as of `run`). `state` is updated in place."""
    means, sizes, queries = state[:3]
    if _is_one_launch(k.shape[-1], state, k, v):
        return clusters_backend.take_in(k, v, exists, state, rule)
    here = exists > 0
    full = (sizes[:, :, -1:, :1] > 0) & here
    old = means, *_scales(state), sizes
    if torch.compiler.is_exporting():  # the graph looks while it runs
        _copy(old, torch.cond(full.any(), lambda *x: _roomy(*x, rule=rule), _same, (full, *state)))
    elif not host.is_free(means):  # where a look is not free, it is merged at every step
        _copy(old, _roomy(full, *state, rule=rule))
    elif bool(full.any()):
        room = sizes.shape[1] * sizes.shape[2] * (k.shape[-1] + v.shape[-1])
        for some in full[:, 0, 0, 0].nonzero().flatten().split(max(MERGED // room, 1)):
            new = _roomy(full[some], *(x[some] for x in state), rule=rule)
            for x, changed in zip(old, new, strict=True):
                x[some] = changed
    index = (sizes[..., :1] > 0).sum(2, keepdim=True).clamp(max=means.shape[2] - 1)
    token, centre = torch.where(here, torch.cat([k, v], -1).to(sizes.dtype), 0), _centre(state)
    if centre is not None:
        centre.copy_(_first((sizes[:, :, :1, :1] == 0) & here, token, centre))
    one = torch.cat([exists, torch.zeros_like(exists)], -1)
    entering = *_kept(token, here, k.shape[-1], means.dtype, centre), one
    for x, new in zip(old, entering, strict=True):  # free clusters are zeros
        x.scatter_add_(2, index.expand(-1, -1, 1, x.shape[-1]), new.to(x.dtype) * here)
    queries.copy_(torch.cat([queries[..., :-1], here.to(queries.dtype)], -1))


def _copy(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for x, changed in zip(old, new, strict=True):
        x.copy_(changed)


def _roomy(full: Tensor, *state: Tensor, rule: Rule) -> State:
    """Means, their scales if any, and sizes of a state whose full rows made room for C tokens."""
    means, sizes, queries = state[:3]
    kept, size, _ = joined(opened(state), sizes.clone(), queries[..., :-1], rule)  # of copies, for autograd
    merged = *_kept(kept, size[..., :1] > 0, queries.shape[-1] // 2, means.dtype, _centre(state)), size
    return tuple(torch.where(full, new, x) for new, x in zip(merged, (means, *_scales(state), sizes), strict=True))


def _same(full: Tensor, *state: Tensor) -> State:
    """What `_roomy` gives where no row is full."""
    return tuple(x.clone() for x in (state[0], *_scales(state), state[1]))


def read_state(q: Tensor, state: State, rule: Rule) -> tuple[Tensor, Tensor]:
    """What one token q [B, H, 1, K] reads: y [B, H, 1, V] and its log weight [B, H, 1], both fp32. The queries of its
    query are added to the state."""
    sizes, queries = state[1:3]
    if _is_one_launch(q.shape[-1], state, q, rule.mass):
        return clusters_backend.read_token(q, state, rule)
    y, weight = _read(q, *_pairs(state), sizes, None, rule)
    with torch.no_grad():
        seen = _seen(q.to(sizes.dtype) * rule.scaling, sizes.shape[1])
        queries[..., :-1] += seen * queries[..., -1:]
    return y, weight


def run(
    q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: State, rule: Rule,
    *, taken: int | None = None, whole: bool = False,
) -> tuple[Tensor, Tensor, State]:  # fmt: skip
    """A block of tokens. Between two merges, clusters only fill up, so that what a query reads is causal attention over
    them: first all merges, one per C tokens, then all reads at once. Time O(T·M²/C). No value on the device decides
    what is computed.

    Args:
        q: [B, H, T, K].
        k: [B, G, T, K].
        v: [B, G, T, V].
        exists: [B, G, T, 1], 1 for a token and 0 for none.
        state: as `initial_state` makes it.
        rule: what does not change from token to token.
        taken: how many clusters of a row are taken at most; None: all.
        whole: whether every token exists and exactly `taken` clusters of every row are taken.

    Returns:
        y [B, H, T, V] and log weight [B, H, T], fp32 (those of a token that does not exist mean nothing); the final
        state.
    """
    M, parts = state[0].shape[2], []
    first = M if taken is None else min(taken, M)
    for start in range(0, max(q.shape[2], 1), PIECE):
        here = slice(start, start + PIECE)
        piece = q[:, :, here], k[:, :, here], v[:, :, here], exists[:, :, here]
        *part, state = _run(*piece, state, rule, first, whole)
        parts.append(part)
        first += piece[0].shape[2]
        if first > M:
            first = M - rule.chunk + (first - M - 1) % rule.chunk + 1 if whole else M
    y, weight = parts[0] if len(parts) == 1 else (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return y, weight, state


def _run(
    q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: State, rule: Rule, first: int, whole: bool
) -> tuple[Tensor, Tensor, State]:
    old_means, (_, sizes, queries), chunk = opened(state), state[:3], rule.chunk
    (B, H, T, K), (G, M) = q.shape, sizes.shape[1:3]
    if T == 0:
        return q.new_zeros(B, H, 0, v.shape[-1], dtype=sizes.dtype), q.new_zeros(B, H, 0, dtype=sizes.dtype), state
    real = exists[:, 0, :, 0] > 0
    # All rows on one tape: where token i of a row that holds f clusters lies at f + i, rows merge at the same indices.
    taken, count = (sizes[:, 0, :, 0] > 0).sum(1, keepdim=True), real.sum(1, keepdim=True)
    merges = -(-max(first + T - M, 0) // chunk)
    length = M + merges * chunk if merges else first + T
    at = torch.arange(length, device=q.device)
    end = taken + count
    on = ((at >= taken) & (at < end))[:, None, :, None]
    order = None if whole else real.logical_not().long().sort(dim=1, stable=True).indices
    token = None if order is None else order.gather(1, (at - taken).clamp(0, T - 1))[:, None, :, None]

    def lay(x: Tensor) -> Tensor:
        if token is None:  # rows lie on the tape as they are
            return F.pad(x.to(sizes.dtype), (0, 0, first, length - first - T))
        x = x.gather(2, token.expand(-1, x.shape[1], -1, x.shape[-1])).to(sizes.dtype)
        return torch.where(on, x, 0)

    tape, q, centre = lay(torch.cat([k, v], -1)), lay(q), _centre(state)
    if centre is not None:
        centre = _first((taken == 0)[..., None, None] & on[:, :, :1], tape[:, :, :1], centre)
    tape = _rounded(tape, on, K, state[0].dtype, centre)
    one = F.pad(on.to(sizes.dtype), (0, 1)).expand(-1, G, -1, -1)  # n of 1, no variance
    start = min(M, length)
    old = at[:start, None] < taken[:, None, None]
    means = torch.where(old, old_means[:, :, :start], tape[:, :, :start])
    sizes = torch.where(old, sizes[:, :, :start], one[:, :, :start])
    if start < M:
        means, sizes = (F.pad(x, (0, 0, 0, M - start)) for x in (means, sizes))
    with torch.no_grad():
        square = _seen(q * rule.scaling, G)
        square = [square[:, :, :start].sum(2, keepdim=True), square[:, :, start:].unflatten(2, (merges, chunk)).sum(3)]
        metric = torch.cat(square, 2).cumsum(2) + queries[..., :-1]
    goes_on = end > torch.arange(M, M + merges * chunk, chunk, device=q.device)
    given = means, sizes, tape[:, :, start:], one[:, :, start:], metric, goes_on, rule, state[0].dtype, centre
    every, sizes = _Merges.apply(*given) if torch.is_grad_enabled() else _merges(*given)[:2]  # type: ignore[misc]
    slots = torch.arange(M, device=q.device)
    y, weight = _read(q[:, :, :start], every[0, ..., :K], every[0, ..., K:], sizes[0], slots <= at[:start, None], rule)
    if merges:
        later = q[:, :, start:].unflatten(2, (merges, chunk)).movedim(2, 0).flatten(0, 1)
        part = _read_chunks(later, every[1:], sizes[1:], slots <= M - chunk + at[:chunk, None], rule)
        y, weight = (torch.cat(x, 2) for x in zip((y, weight), part, strict=True))
    if token is None:
        y, weight = y[:, :, first : first + T], weight[:, :, first : first + T]
    else:
        index = taken + real.cumsum(1) - 1
        none = (index < 0)[:, None]
        index = index.clamp(min=0)[:, None].expand(-1, H, -1)
        weight = weight.gather(2, index).masked_fill(none, float("-inf"))
        y = y.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, y.shape[-1])).masked_fill(none.unsqueeze(-1), 0)
    queries = torch.cat([metric[:, :, -1:], real[:, -1:, None, None].to(metric).expand(-1, G, -1, -1)], -1)
    # Of copies: a view would keep the clusters of every chunk in memory.
    means, *scales = _kept(every[-1].clone(), sizes[-1][..., :1] > 0, K, state[0].dtype, centre)
    return y, weight, (means, sizes[-1].clone(), queries, *scales, *([] if centre is None else [centre]))


class _Merges(torch.autograd.Function):
    """`_merges`, whose gradient is one gather a merge: autograd would write down every operation of every merge.
    Rounding passes the gradient on as it is; sizes have none."""

    @staticmethod
    def forward(ctx, means, sizes, tape, one, metric, goes_on, rule, dtype, centre):  # type: ignore[override]
        means, sizes, ctx.to = _merges(means, sizes, tape, one, metric, goes_on, rule, dtype, centre)
        ctx.chunk = rule.chunk
        ctx.mark_non_differentiable(sizes)
        ctx.save_for_backward(sizes)
        return means, sizes

    @staticmethod
    def backward(ctx, means, _):  # type: ignore[override]
        (sizes,) = ctx.saved_tensors
        if isinstance(ctx.to, Tensor):
            g, tape = clusters_backend.gradient(means, sizes, ctx.to, ctx.chunk)
            return g, None, tape, None, None, None, None, None, None
        counts, g, tape = sizes[..., :1], means[-1], []
        for i, to in reversed(list(enumerate(ctx.to))):
            tape.append(g[:, :, -ctx.chunk :])
            g = g / counts[i + 1].clamp(min=1)
            back = g.flatten(0, 2).index_select(0, to.flatten()).view_as(g)
            g = means[i] + counts[i] * back
        return g, None, torch.cat(tape[::-1], 2) if tape else g[:, :, :0], None, None, None, None, None, None


def _merges(
    means: Tensor, sizes: Tensor, tape: Tensor, one: Tensor, metric: Tensor, goes_on: Tensor, rule: Rule,
    dtype: torch.dtype, centre: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor] | Tensor]:  # fmt: skip
    """Clusters before the first merge and after each, filled up with the chunk of the tape that follows it.

    Args:
        means: [B, G, M, K + V].
        sizes: [B, G, M, 2].
        tape: what fills up, [B, G, S·C, K + V], zeros where there is no token.
        one: [B, G, S·C, 2], 1 and 0 where there is a token, else zeros.
        metric: [B, G, S + 1, K], sums of the queries until each merge.
        goes_on: [B, S], whether a row still merges.
        rule: as of `run`.
        dtype: that means are rounded to.
        centre: from which, for int4.

    Returns:
        means [S + 1, B, G, M, K + V] and sizes [S + 1, B, G, M, 2]; and of each merge where each cluster went, as an
        index [B, G, M] into all rows.
    """
    K = metric.shape[-1] // 2
    if _has_kernels(sizes, K, means.shape[-1] - K, dtype):
        return clusters_backend.merges(means, sizes, tape, one, metric, goes_on, rule, dtype, centre)
    every, counts, chunk = [means], [sizes], rule.chunk
    stay, went = torch.arange(sizes[..., 0].numel(), device=sizes.device).view(sizes.shape[:3]), []
    for i in range(goes_on.shape[1]):
        on, fill = goes_on[:, i].view(-1, 1, 1, 1), slice(i * chunk, (i + 1) * chunk)
        merged, size, to = joined(means, sizes, metric[:, :, i : i + 1], rule)
        merged = _rounded(merged, size[..., :1] > 0, K, dtype, centre)
        if not host.is_free(on) or not bool(on.all()):
            merged, size, to = (
                torch.where(on, merged, means),
                torch.where(on, size, sizes),
                torch.where(on[..., 0], to, stay),
            )
        means, sizes = merged, size
        went.append(to)
        means = torch.cat([means[:, :, :-chunk], means[:, :, -chunk:] + tape[:, :, fill]], 2)
        sizes = torch.cat([sizes[:, :, :-chunk], sizes[:, :, -chunk:] + one[:, :, fill]], 2)
        every.append(means)
        counts.append(sizes)
    return torch.stack(every), torch.stack(counts), went


def _has_kernels(sizes: Tensor, key_width: int, value_width: int, dtype: torch.dtype | None) -> bool:
    """Whether Triton kernels do it, of means kept in `dtype`; what is compiled has the operations, which it fuses."""
    if torch.compiler.is_compiling():
        return False
    restriction = clusters_backend.restriction(sizes, key_width, value_width, dtype)
    return chooses_fla(sizes, restriction, missing=clusters_backend.missing)


def _is_one_launch(key_width: int, state: State, *given: Any) -> bool:
    """Whether a kernel takes in or reads a token. Those have no gradient."""
    centre = _centre(state)
    value_width = (state[0] if centre is None else centre).shape[-1] - key_width
    if host.is_free(state[1]) or not _has_kernels(state[1], key_width, value_width, state[0].dtype):
        return False
    return not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in (*state, *given))


def _seen(q: Tensor, groups: int) -> Tensor:
    """Scaled queries [B, H, T, K] -> sums over the heads of a group, of queries and of themselves, [B, G, T, 2K]."""
    return torch.cat([q.square(), q], -1).unflatten(1, (groups, -1)).sum(2)


def _read_chunks(q: Tensor, means: Tensor, sizes: Tensor, seen: Tensor, rule: Rule) -> Iterator[Tensor]:
    """`_read` of chunks q [S·B, H, C, K], each of its own clusters [S, B, G, M, ·]: y [B, H, S·C, V] and log weight."""
    (merges, B), K = means.shape[:2], q.shape[-1]
    means, sizes = means.flatten(0, 1), sizes.flatten(0, 1)
    if host.is_free(q):  # chunk by chunk, which a CPU's cache has room for
        chunks = zip(q.split(B), means.split(B), sizes.split(B), strict=True)
        parts = [_read(asking, own[..., :K], own[..., K:], counts, seen, rule) for asking, own, counts in chunks]
        read = tuple(torch.cat(x) for x in zip(*parts, strict=True))
    else:
        read = _read(q, means[..., :K], means[..., K:], sizes, seen, rule)
    return (x.unflatten(0, (merges, B)).movedim(0, 2).flatten(2, 3) for x in read)


def _read(
    q: Tensor, keys: Tensor, values: Tensor, sizes: Tensor, seen: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, L, K] over the clusters, those of `seen` [L, M]."""
    B, H, L, K = q.shape
    G, M = keys.shape[1:3]
    n, spread = sizes.mT.unsqueeze(2).split(1, 3)  # [B, G, 1, 1, M] each
    bias = n.log().clamp(min=EMPTY)
    if rule.weighs:
        mass = rule.mass.view(G, -1, 1, 1).to(bias) if isinstance(rule.mass, Tensor) else rule.mass
        bias = bias + (0.5 / rule.heads * mass) * spread
    if seen is not None:
        bias = torch.where(seen, bias, EMPTY)
    a = scores(q.to(keys.dtype).reshape(B, G, -1, L, K), keys, bias, rule.scaling, rule.softcap)
    p, weight = normalise(a, None)
    y = p.view(B, G, -1, M) @ values
    weight = weight.masked_fill(weight < EMPTY / 2, float("-inf"))
    return y.view(B, H, L, -1), weight.view(B, H, L)
