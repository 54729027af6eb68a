"""All merges of a block of ops/clusters.py in one Triton kernel, and their gradient in another. Imported only where
triton is; clusters_backend.py launches them.

P programs share a row and key head and go through its merges one after the other. Current clusters are the last slab of
the result, which stays in L2; an M × M matrix of costs never exists, only the least of each row of tiles. Every sum has
a fixed order, so that results are the same at every run. With P > 1, programs wait for each other at a counter in
global memory, which needs all of them to run at once (a cooperative launch); the counter decides nothing else.

Letters as in ops/clusters.py; N = B·G, S merges, D = K + V. MP, CP, KP and VP are M, C, K and V up to a power of two.
Scratch of a head is rows of MP numbers. `real`: the least cost of each cluster; then, of each program, logarithms or
weights, squares of keys, squares of values. `whole`: partners; then, of each program, where each goes, places, those
that stay, those that go, and for those that go the next one with the same place, and their place.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _tile(at, row, column, D, rows, columns):
    """Rows × columns of a matrix with D columns, zeros outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(at + row[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def _meet(ticket, target, P: tl.constexpr):
    """All programs of a head wait for each other, and see what each has written."""
    tl.debug_barrier()
    if P > 1:
        seen = tl.atomic_add(ticket, 1, sem="acq_rel") + 1
        while seen < target:
            seen = tl.atomic_add(ticket, 0, sem="acq_rel")
        tl.debug_barrier()


@triton.jit
def _weigh(means, sizes, metric, real, alpha, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MP: tl.constexpr,
           KP: tl.constexpr, VP: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Of each cluster n A^α, and the squares of its scaled key and of its value."""
    m, k, v = tl.arange(0, MP), tl.arange(0, KP), tl.arange(0, VP)
    n = tl.load(sizes + 2 * m, mask=m < M, other=0.0)
    total = tl.maximum(tl.sum(n, 0), 1.0)
    squares = tl.load(metric + k, mask=k < K, other=0.0)
    mean = tl.load(metric + K + k, mask=k < K, other=0.0) / total / HEADS
    variance = tl.maximum(squares / total / HEADS - mean * mean, 0.0)
    root = tl.sqrt(squares)
    for start in range(0, M, R):
        row = start + tl.arange(0, R)
        x = _tile(means, row, k, K + V, M, K)
        log = tl.sum(x * mean[None, :] + 0.5 * (x * x) * variance[None, :], 1)
        x *= root[None, :]
        y = _tile(means + K, row, v, K + V, M, V)
        tl.store(real + row, log, mask=row < M)
        tl.store(real + MP + row, tl.sum(x * x, 1), mask=row < M)
        tl.store(real + 2 * MP + row, tl.sum(y * y, 1), mask=row < M)
    tl.debug_barrier()
    log = tl.load(real + m, mask=m < M, other=float("-inf"))
    tl.debug_barrier()
    tl.store(real + m, n * tl.exp(alpha * (log - tl.max(log, 0))), mask=m < M)
    tl.debug_barrier()


@triton.jit
def _cost(means, metric, real, row, column, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MP: tl.constexpr,
          KP: tl.constexpr, VP: tl.constexpr, R: tl.constexpr, W: tl.constexpr, INNER: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """What it costs that clusters `row` join clusters `column`, infinite where that is not an earlier one."""
    keys, values = tl.zeros([R, W], tl.float32), tl.zeros([R, W], tl.float32)
    for start in range(0, KP, INNER):
        d = start + tl.arange(0, INNER)
        root = tl.sqrt(tl.load(metric + d, mask=d < K, other=0.0))
        a = _tile(means, row, d, K + V, M, K) * root[None, :]
        b = _tile(means, column, d, K + V, M, K) * root[None, :]
        keys = tl.dot(a, tl.trans(b), keys, input_precision=PRECISION)
    for start in range(0, VP, INNER):
        d = start + tl.arange(0, INNER)
        a = _tile(means + K, row, d, K + V, M, V)
        b = _tile(means + K, column, d, K + V, M, V)
        values = tl.dot(a, tl.trans(b), values, input_precision=PRECISION)
    low, high = row < M, column < M
    weight = tl.minimum(tl.load(real + row, mask=low, other=0.0)[:, None],
                        tl.load(real + column, mask=high, other=0.0)[None, :])  # fmt: skip
    square = tl.load(real + MP + row, mask=low, other=0.0)[:, None]
    cost = square + tl.load(real + MP + column, mask=high, other=0.0)[None, :] - 2.0 * keys
    square = tl.load(real + 2 * MP + row, mask=low, other=0.0)[:, None]
    cost *= square + tl.load(real + 2 * MP + column, mask=high, other=0.0)[None, :] - 2.0 * values
    cost *= weight
    return tl.where((column[None, :] < row[:, None]) & (cost == cost), cost, float("inf"))


@triton.jit
def _find(means, metric, real, least, partner, tile, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
          MP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
          INNER: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """For the clusters of a tile of rows the earlier one that each costs least to join."""
    row = tile * R + tl.arange(0, R)
    best, at = tl.full([R], float("inf"), tl.float32), tl.zeros([R], tl.int32)
    for start in range(0, tl.where(tile * R < M, tl.minimum(tile * R + R, M), 0), W):
        column = start + tl.arange(0, W)
        cost = _cost(means, metric, real, row, column, M, K, V, MP, KP, VP, R, W, INNER, PRECISION)
        low, where = tl.min(cost, 1, return_indices=True, return_indices_tie_break_left=True)
        at = tl.where(low < best, start + where, at)
        best = tl.minimum(low, best)
    tl.store(least + row, best, mask=row < M)
    tl.store(partner + row, at, mask=row < M)


@triton.jit
def _choose(least, partner, own, M: tl.constexpr, MP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
            JUMPS: tl.constexpr, R: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Which clusters go, and the place of each afterwards, into the scratch of a program. The first never goes."""
    for start in range(0, M, R):
        row = start + tl.arange(0, R)
        cost = tl.load(least + row, mask=row < M, other=float("inf"))
        rank = tl.zeros([R], tl.int32)
        for begin in range(0, M, W):
            column = begin + tl.arange(0, W)
            other = tl.load(least + column, mask=column < M, other=float("inf"))
            before = (other[None, :] == cost[:, None]) & (column[None, :] < row[:, None])
            before = (before | (other[None, :] < cost[:, None])) & (column > 0)[None, :]
            rank += tl.sum(before.to(tl.int32), 1)
        goes = (rank < C) & (row > 0)
        join = tl.load(partner + row, mask=row < M, other=0)
        tl.store(own + row, tl.where(goes, join, row), mask=row < M)
    tl.debug_barrier()
    m = tl.arange(0, MP)
    into = tl.load(own + m, mask=m < M, other=0)
    goes, stays = (into != m) & (m < M), (into == m) & (m < M)
    for _ in tl.static_range(JUMPS):  # where a partner goes too, to where it goes
        into = tl.load(own + into)
        tl.debug_barrier()
        tl.store(own + m, into, mask=m < M)
        tl.debug_barrier()
    place, count = tl.cumsum(stays.to(tl.int32), 0) - 1, tl.cumsum(goes.to(tl.int32), 0) - 1
    tl.store(own + MP + m, place, mask=m < M)
    tl.store(own + 2 * MP + place, m, mask=stays)
    tl.store(own + 3 * MP + count, m, mask=goes)
    tl.debug_barrier()
    tl.store(own + m, tl.load(own + MP + into), mask=m < M)
    tl.debug_barrier()
    c = tl.arange(0, CP)
    gone = tl.load(own + 3 * MP + c, mask=c < C, other=0)
    to = tl.load(own + gone, mask=c < C, other=-1)
    tl.store(own + 5 * MP + c, to, mask=c < C)
    tl.debug_barrier()
    for start in range(0, CP, 16):
        row = start + tl.arange(0, 16)
        mine = tl.load(own + 5 * MP + row, mask=row < C, other=-1)
        same = (to[None, :] == mine[:, None]) & (c[None, :] > row[:, None]) & (c < C)[None, :]
        tl.store(own + 4 * MP + row, tl.min(tl.where(same, c[None, :], CP), 1), mask=row < C)
    tl.debug_barrier()


@triton.jit
def _whole(x, least, most):
    """To the nearest whole number, halves to even."""
    return tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, least), most)


@triton.jit
def _codes(x):
    """Rows in int8: whole numbers, and the step [·, 1] of each."""
    step = tl.div_rn(tl.max(tl.abs(x), 1), 127.0).to(tl.bfloat16).to(tl.float32)[:, None]
    return _whole(tl.div_rn(x, tl.maximum(step, 1.1754943508222875e-38) + tl.zeros_like(x)), -127.0, 127.0), step


@triton.jit
def _half_bytes(x, GROUP: tl.constexpr):
    """Rows in int4: whole numbers [·, groups, GROUP], a step of each group [·, groups], and the unit of each row."""
    x = tl.reshape(x, [x.shape[0], x.shape[1] // GROUP, GROUP])
    high, low = tl.max(x, 2), tl.min(x, 2)
    step = tl.where(high > -low, high, low) * -0.125
    unit = tl.div_rn(tl.max(tl.abs(step), 1), 127.0).to(tl.bfloat16).to(tl.float32)
    scale = tl.div_rn(step, tl.maximum(unit, 1.1754943508222875e-38)[:, None] + tl.zeros_like(step))
    scale = _whole(scale, -127.0, 127.0)
    step = scale * unit[:, None]
    step = tl.where(step == 0.0, float("inf"), step)
    return _whole(tl.div_rn(x, step[:, :, None] + tl.zeros_like(x)), -8.0, 7.0), scale, unit


@triton.jit
def _rounded(x, n, centre, DTYPE: tl.constexpr, GROUP: tl.constexpr):
    """As `clusters._rounded`, of clusters of n tokens; DTYPE 0 fp32, 1 bf16, 2 int8, 3 int4 from a centre."""
    if DTYPE == 1:
        x = x.to(tl.bfloat16).to(tl.float32)
    if DTYPE == 2:
        code, step = _codes(x)
        x = code * step
    if DTYPE == 3:
        code, scale, unit = _half_bytes(x - centre[None, :], GROUP)
        near = tl.reshape(code * (scale * unit[:, None])[:, :, None], x.shape) + centre[None, :]
        x = tl.where(n[:, None] > 0.0, near, 0.0)
    return x


@triton.jit
def _members(means, sizes, weigh, row, there, k, v, K: tl.constexpr, V: tl.constexpr, WEIGHS: tl.constexpr):
    """Of clusters `row`: n, n(spread + Σ w k²), sums of keys and of values; zeros where not `there`."""
    n = tl.load(sizes + 2 * row, mask=there, other=0.0)
    keys = tl.load(means + row[:, None] * (K + V) + k[None, :], mask=there[:, None] & (k < K)[None, :], other=0.0)
    at = means + row[:, None] * (K + V) + K + v[None, :]
    values = tl.load(at, mask=there[:, None] & (v < V)[None, :], other=0.0)
    second = tl.zeros_like(n)
    if WEIGHS:
        spread = tl.load(sizes + 2 * row + 1, mask=there, other=0.0)
        second = n * (spread + tl.sum(keys * keys * weigh[None, :], 1))
    return n, second, keys * n[:, None], values * n[:, None]


@triton.jit
def _join(means, sizes, own, weigh, centre, row, k, v, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
          MP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, WEIGHS: tl.constexpr, DTYPE: tl.constexpr,
          GROUP: tl.constexpr):  # fmt: skip
    """Keys, values, n and spread of the clusters that come to lie at `row`."""
    stays, c = row < M - C, tl.arange(0, CP)
    source = tl.load(own + 2 * MP + row, mask=stays, other=0)
    n, second, keys, values = _members(means, sizes, weigh, source, stays, k, v, K, V, WEIGHS)
    n_more, second_more = tl.zeros_like(n), tl.zeros_like(n)
    keys_more, values_more = tl.zeros_like(keys), tl.zeros_like(values)
    to = tl.load(own + 5 * MP + c, mask=c < C, other=-1)
    member = tl.min(tl.where(to[None, :] == row[:, None], c[None, :], CP), 1)
    left = tl.min(member, 0)
    while left < CP:  # the first of those that join each, then the second ones
        there = member < CP
        gone = tl.load(own + 3 * MP + member, mask=there, other=0)
        n_own, second_own, keys_own, values_own = _members(means, sizes, weigh, gone, there, k, v, K, V, WEIGHS)
        n_more, second_more = n_more + n_own, second_more + second_own
        keys_more, values_more = keys_more + keys_own, values_more + values_own
        member = tl.load(own + 4 * MP + member, mask=there, other=CP)
        left = tl.min(member, 0)
    n += n_more
    safe = tl.maximum(n, 1.0)
    keys = tl.div_rn(keys + keys_more, safe[:, None] + tl.zeros_like(keys))
    values = tl.div_rn(values + values_more, safe[:, None] + tl.zeros_like(values))
    spread = tl.zeros_like(n)
    if WEIGHS:
        spread = (second + second_more) / safe - tl.sum(keys * keys * weigh[None, :], 1)
        spread = tl.maximum(spread, 0.0)
    key, value = tl.zeros_like(weigh), tl.zeros([values.shape[1]], tl.float32)
    if DTYPE == 3:
        key = tl.load(centre + k, mask=k < K, other=0.0)
        value = tl.load(centre + K + v, mask=v < V, other=0.0)
    return _rounded(keys, n, key, DTYPE, GROUP), _rounded(values, n, value, DTYPE, GROUP), n, spread


@triton.jit
def _settle(means, sizes, next_means, next_sizes, tape, one, metric, centre, own, went, base, on, me, M: tl.constexpr,
            K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr,
            VP: tl.constexpr, P: tl.constexpr, R: tl.constexpr, WEIGHS: tl.constexpr, DTYPE: tl.constexpr,
            GROUP: tl.constexpr, FILLS: tl.constexpr):  # fmt: skip
    """The next clusters, of the tiles of rows that are this program's; if it FILLS, with the chunk that follows, and
    where each cluster went."""
    m, k, v = tl.arange(0, MP), tl.arange(0, KP), tl.arange(0, VP)
    total = tl.maximum(tl.sum(tl.load(sizes + 2 * m, mask=m < M, other=0.0), 0), 1.0)
    weigh = tl.load(metric + k, mask=k < K, other=0.0) / total
    for tile in range(me, (M + R - 1) // R, P):
        row = tile * R + tl.arange(0, R)
        there, new = row < M, (row >= M - C) & (row < M)
        fill = row - (M - C)
        if on != 0:
            keys, values, n, spread = _join(means, sizes, own, weigh, centre, row, k, v, M, K, V, MP, C, CP, WEIGHS,
                                            DTYPE, GROUP)  # fmt: skip
            to = tl.load(own + row, mask=there, other=0)
        else:
            keys, values = _tile(means, row, k, K + V, M, K), _tile(means + K, row, v, K + V, M, V)
            n = tl.load(sizes + 2 * row, mask=there, other=0.0)
            spread = tl.load(sizes + 2 * row + 1, mask=there, other=0.0)
            to = row
        if FILLS:
            at = fill[:, None] * (K + V)
            keys += tl.load(tape + at + k[None, :], mask=new[:, None] & (k < K)[None, :], other=0.0)
            values += tl.load(tape + at + K + v[None, :], mask=new[:, None] & (v < V)[None, :], other=0.0)
            n += tl.load(one + 2 * fill, mask=new, other=0.0)
            spread += tl.load(one + 2 * fill + 1, mask=new, other=0.0)
            tl.store(went + row, base + to, mask=there)
        at = row[:, None] * (K + V)
        tl.store(next_means + at + k[None, :], keys, mask=there[:, None] & (k < K)[None, :])
        tl.store(next_means + at + K + v[None, :], values, mask=there[:, None] & (v < V)[None, :])
        tl.store(next_sizes + 2 * row, n, mask=there)
        tl.store(next_sizes + 2 * row + 1, spread, mask=there)


@triton.jit(do_not_specialize=["first", "last", "S", "L"])
def merge_all(every, counts, went, tape, one, metric, centres, goes_on, real, whole, tickets, alpha, first, last, S, G,
              L, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, MP: tl.constexpr,
              CP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr,
              WEIGHS: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, JUMPS: tl.constexpr, R: tl.constexpr,
              W: tl.constexpr, INNER: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr,
              PART: tl.constexpr):  # fmt: skip
    """Merges `first` to `last`, of L in `metric`. PART 0: all of it; 1: only costs; 2: only what follows from them."""
    p, me = tl.program_id(0) // P, tl.program_id(0) % P
    N = tl.num_programs(0) // P
    least, partner = real + p * (3 * P + 1) * MP, whole + p * (6 * P + 1) * MP
    weights, own = least + (3 * me + 1) * MP, partner + (6 * me + 1) * MP
    for i in range(first, last):
        at = (i * N + p).to(tl.int64) * M
        means, sizes = every + at * (K + V), counts + at * 2
        square = metric + (p * L + i) * 2 * K
        on = tl.load(goes_on + (p // G) * S + i)
        if PART != 2:  # noqa: SIM102 — decided when it is compiled
            if on != 0:
                _weigh(means, sizes, square, weights, alpha, M, K, V, MP, KP, VP, HEADS, R)
                for turn in range(0, (M + R * P - 1) // (R * P)):  # there and back: later tiles have more columns
                    tile = turn * P + tl.where(turn % 2 == 0, me, P - 1 - me)
                    _find(means, square, weights, least, partner, tile, M, K, V, MP, KP, VP, R, W, INNER, PRECISION)
        if PART == 0:
            _meet(tickets + p, (2 * (i - first) + 1) * P, P)
        if PART != 1:
            if on != 0:
                _choose(least, partner, own, M, MP, C, CP, JUMPS, R, W)
            ahead, fill = at + N * M, (p * S + i).to(tl.int64) * C
            _settle(means, sizes, every + ahead * (K + V), counts + ahead * 2, tape + fill * (K + V), one + fill * 2,
                    square, centres + p * (K + V), own, went + at, p * M, on, me, M, K, V, C, MP, CP, KP, VP, P,
                    JOINED, WEIGHS, DTYPE, GROUP, True)  # fmt: skip
        if PART == 0:
            _meet(tickets + p, (2 * (i - first) + 2) * P, P)


@triton.jit(do_not_specialize=["S"])
def merge_gradient(given, counts, went, scratch, out, tape, S, M: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
                   DB: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """The gradients of the first means and of the tape, of some columns of one row and key head."""
    p, N = tl.program_id(0), tl.num_programs(0)
    d = tl.program_id(1) * DB + tl.arange(0, DB)
    own = scratch + p.to(tl.int64) * M * D
    for back in range(0, S + 1):
        i = S - back
        at = (i * N + p).to(tl.int64) * M
        for start in range(0, M, R):
            row = start + tl.arange(0, R)
            g = _tile(given + at * D, row, d, D, M, D)
            n = tl.load(counts + (at + row) * 2, mask=row < M, other=0.0)
            if back > 0:
                to = tl.load(went + at + row, mask=row < M, other=0) - p * M
                inside = (row < M)[:, None] & (d < D)[None, :]
                g += n[:, None] * tl.load(own + to[:, None] * D + d[None, :], mask=inside, other=0.0)
            if i > 0:
                new = (row >= M - C) & (row < M)
                fill = (p * S + i - 1).to(tl.int64) * C + row - (M - C)
                tl.store(tape + fill[:, None] * D + d[None, :], g, mask=new[:, None] & (d < D)[None, :])
            at_out = out + (p.to(tl.int64) * M + row)[:, None] * D + d[None, :]
            tl.store(at_out, g, mask=(row < M)[:, None] & (d < D)[None, :])
        tl.debug_barrier()
        if i > 0:
            for start in range(0, M, R):
                row = start + tl.arange(0, R)
                g = _tile(out + p.to(tl.int64) * M * D, row, d, D, M, D)
                n = tl.load(counts + (at + row) * 2, mask=row < M, other=0.0)
                g = tl.div_rn(g, tl.maximum(n, 1.0)[:, None] + tl.zeros_like(g))
                tl.store(own + row[:, None] * D + d[None, :], g, mask=(row < M)[:, None] & (d < D)[None, :])
        tl.debug_barrier()
