"""One token of ops/clusters.py in Triton kernels: what `update_state` and `read_state` do, a launch each. Nothing is
asked of the host, and the state stays where it lies, so that a step can be captured in a graph. As clusters_triton.py,
whose merging this uses.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from .clusters_triton import _choose, _codes, _find, _settle, _tile, _weigh

EMPTY = tl.constexpr(-1e30)


@triton.jit
def _open(kept, scales, row, x, rows, D, first: tl.constexpr, width: tl.constexpr, DTYPE: tl.constexpr):
    """Keys (first = 0) or values of clusters of a state, in fp32."""
    part = _tile(kept + first, row, x, D, rows, width).to(tl.float32)
    if DTYPE == 2:
        scale = tl.load(scales + 2 * row + (1 if first > 0 else 0), mask=row < rows, other=0.0)
        part *= scale.to(tl.float32)[:, None]
    return part


@triton.jit
def _keep(part, kept, scales, row, x, there, D, first: tl.constexpr, width: tl.constexpr, DTYPE: tl.constexpr):
    """Into a state, as `clusters._stored`."""
    at = kept + first + row[:, None] * D + x[None, :]
    if DTYPE == 2:
        code, scale = _codes(part)
        tl.store(scales + 2 * row[:, None] + (1 if first > 0 else 0), scale.to(tl.bfloat16), mask=there[:, None])
        tl.store(at, code.to(tl.int8), mask=there[:, None] & (x < width)[None, :])
    else:
        tl.store(at, part.to(kept.dtype.element_ty), mask=there[:, None] & (x < width)[None, :])


@triton.jit
def take_in(kept, scales, sizes, queries, keys, values, exists, means, merged, counts, real, whole, alpha,
            M: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr,
            KP: tl.constexpr, VP: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, WEIGHS: tl.constexpr,
            DTYPE: tl.constexpr, JUMPS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, INNER: tl.constexpr,
            JOINED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`clusters.update_state`, in place; `means`, `merged` and `counts` are scratch. One program a head: P = 1."""
    p, D = tl.program_id(0), K + V
    kept, scales, sizes = kept + p * M * D, scales + p * M * 2, sizes + p * M * 2
    queries, means, merged, counts = (
        queries + p * (2 * K + 1),
        means + p * M * D,
        merged + p * M * D,
        counts + p * M * 2,
    )
    least, partner = real + p * 4 * MP, whole + p * 7 * MP
    m, k, v = tl.arange(0, MP), tl.arange(0, KP), tl.arange(0, VP)
    here = tl.load(exists + p)
    if tl.load(sizes + 2 * (M - 1)) * here > 0.0:
        for start in range(0, M, JOINED):
            row = start + tl.arange(0, JOINED)
            at, there = means + row[:, None] * D, (row < M)[:, None]
            tl.store(at + k[None, :], _open(kept, scales, row, k, M, D, 0, K, DTYPE), mask=there & (k < K)[None, :])
            tl.store(at + K + v[None, :], _open(kept, scales, row, v, M, D, K, V, DTYPE), mask=there & (v < V)[None, :])
        tl.debug_barrier()
        _weigh(means, sizes, queries, least + MP, alpha, M, K, V, MP, KP, VP, HEADS, R)
        for tile in range(0, (M + R - 1) // R):
            _find(means, queries, least + MP, least, partner, tile, M, K, V, MP, KP, VP, R, W, INNER, PRECISION)
        tl.debug_barrier()
        _choose(least, partner, partner + MP, M, MP, C, CP, JUMPS, R, W)
        _settle(means, sizes, merged, counts, merged, counts, queries, partner + MP, partner, 0, 1, 0, M, K, V, C, MP,
                CP, KP, VP, 1, JOINED, WEIGHS, 0, False)  # fmt: skip
        tl.debug_barrier()
        for start in range(0, M, JOINED):
            row = start + tl.arange(0, JOINED)
            _keep(_tile(merged, row, k, D, M, K), kept, scales, row, k, row < M, D, 0, K, DTYPE)
            _keep(_tile(merged + K, row, v, D, M, V), kept, scales, row, v, row < M, D, K, V, DTYPE)
        both = tl.arange(0, 2 * MP)
        tl.store(sizes + both, tl.load(counts + both, mask=both < 2 * M, other=0.0), mask=both < 2 * M)
        tl.debug_barrier()
    taken = tl.sum((tl.load(sizes + 2 * m, mask=m < M, other=0.0) > 0).to(tl.int32), 0)
    row = tl.minimum(taken, M - 1) + tl.zeros([1], tl.int32)
    tl.debug_barrier()
    there = (tl.zeros([1], tl.float32) + here) > 0.0
    _keep(tl.load(keys + p * K + k, mask=k < K, other=0.0)[None, :], kept, scales, row, k, there, D, 0, K, DTYPE)
    _keep(tl.load(values + p * V + v, mask=v < V, other=0.0)[None, :], kept, scales, row, v, there, D, K, V, DTYPE)
    tl.store(sizes + 2 * row, tl.full([1], 1.0, tl.float32), mask=there)
    tl.store(queries + 2 * K, here)


@triton.jit
def read_token(q, kept, scales, sizes, queries, mass, same, y, weight, scaling, softcap, G, M: tl.constexpr,
               K: tl.constexpr,
               V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, HEADS: tl.constexpr, DTYPE: tl.constexpr,
               CAPPED: tl.constexpr, WEIGHS: tl.constexpr, OWN: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """`clusters.read_state`, a program per row and query head; the first of a group adds up the queries."""
    h, D = tl.program_id(0), K + V
    p = h // HEADS
    kept, scales, sizes = kept + p * M * D, scales + p * M * 2, sizes + p * M * 2
    queries = queries + p * (2 * K + 1)
    k, v = tl.arange(0, KP), tl.arange(0, VP)
    query = tl.load(q + h * K + k, mask=k < K, other=0.0).to(tl.float32)
    top, total, sums = tl.full([1], 2 * EMPTY, tl.float32), tl.zeros([1], tl.float32), tl.zeros([VP], tl.float32)
    for start in range(0, M, R):
        row = start + tl.arange(0, R)
        n = tl.load(sizes + 2 * row, mask=row < M, other=0.0)
        a = tl.sum(_open(kept, scales, row, k, M, D, 0, K, DTYPE) * query[None, :], 1) * scaling
        if CAPPED:
            a = softcap * (2.0 * tl.sigmoid(2.0 * (a / softcap)) - 1.0)
        a += tl.where(n == 0.0, EMPTY, tl.log(tl.maximum(n, 1.0)))
        if WEIGHS:
            spread = tl.load(sizes + 2 * row + 1, mask=row < M, other=0.0)
            own = same
            if OWN:
                own = tl.load(mass + h % (G * HEADS))
            a += 0.5 / HEADS * own * spread
        a = tl.where(row < M, a, 2 * EMPTY)
        higher = tl.maximum(top, tl.max(a, 0))
        share, fades = tl.exp(a - higher), tl.exp(top - higher)
        total = total * fades + tl.sum(share, 0)
        values = _open(kept, scales, row, v, M, D, K, V, DTYPE)
        sums = sums * fades + tl.sum(values * share[:, None], 0)
        top = higher
    tl.store(y + h * V + v, sums / total, mask=v < V)
    one = tl.arange(0, 1)
    log = top + tl.log(total)
    tl.store(weight + h + one, tl.where(log < EMPTY / 2, float("-inf"), log))
    if h % HEADS == 0:
        square, mean = tl.zeros([KP], tl.float32), tl.zeros([KP], tl.float32)
        for i in range(0, HEADS):
            each = tl.load(q + (h + i) * K + k, mask=k < K, other=0.0).to(tl.float32) * scaling
            square, mean = square + each * each, mean + each
        here = tl.load(queries + 2 * K)
        tl.store(queries + k, tl.load(queries + k, mask=k < K, other=0.0) + square * here, mask=k < K)
        tl.store(queries + K + k, tl.load(queries + K + k, mask=k < K, other=0.0) + mean * here, mask=k < K)
