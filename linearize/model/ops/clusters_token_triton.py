"""One token of ops/clusters.py in Triton kernels: what `update_state` and `read_state` do, a launch each. Nothing is
asked of the host, and the state stays where it lies, so that a step can be captured in a graph. As clusters_triton.py,
whose merging this uses.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from .clusters_triton import _choose, _codes, _find, _half_bytes, _settle, _tile, _weigh

EMPTY = tl.constexpr(-1e30)


@triton.jit
def _open(kept, scales, units, centre, row, x, rows, first: tl.constexpr, width: tl.constexpr, D: tl.constexpr,
          DTYPE: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Keys (first = 0) or values of taken clusters of a state, in fp32. With int4 both are equally wide."""
    inside, late = (row < rows)[:, None] & (x < width)[None, :], 1 if first > 0 else 0
    if DTYPE == 3:
        both = tl.load(kept + row[:, None] * width + x[None, :], mask=inside, other=0).to(tl.int32)
        part = ((((both >> (4 * late)) & 15) ^ 8) - 8).to(tl.float32)
        at = scales + row[:, None] * (2 * width // GROUP) + (late * width + x)[None, :] // GROUP
        step = tl.load(at, mask=inside, other=0).to(tl.float32)
        step *= tl.load(units + 2 * row + late, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        part = part * step + tl.load(centre + first + x, mask=x < width, other=0.0)[None, :]
    else:
        part = tl.load(kept + first + row[:, None] * D + x[None, :], mask=inside, other=0.0).to(tl.float32)
    if DTYPE == 2:
        part *= tl.load(scales + 2 * row + late, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    return part


@triton.jit
def _keep(part, kept, scales, row, x, there, first: tl.constexpr, width: tl.constexpr, D: tl.constexpr,
          DTYPE: tl.constexpr):  # fmt: skip
    """Into a state, as `clusters._kept` does; `_pack` does it for int4."""
    at = kept + first + row[:, None] * D + x[None, :]
    if DTYPE == 2:
        code, step = _codes(part)
        at_step = scales + 2 * row[:, None] + (1 if first > 0 else 0)
        tl.store(at_step, step.to(tl.bfloat16), mask=there[:, None])
        tl.store(at, code.to(tl.int8), mask=there[:, None] & (x < width)[None, :])
    else:
        tl.store(at, part.to(kept.dtype.element_ty), mask=there[:, None] & (x < width)[None, :])


@triton.jit
def _half(part, centre, scales, units, row, x, there, taken, width: tl.constexpr, GROUP: tl.constexpr):
    """Keys or values of clusters as numbers from -8 to 7, zeros where they are not taken; their steps are stored."""
    part = tl.where(taken[:, None], part - tl.load(centre + x, mask=x < width, other=0.0)[None, :], 0.0)
    code, scale, unit = _half_bytes(part, GROUP)
    g = tl.arange(0, part.shape[1] // GROUP)
    at = scales + row[:, None] * (2 * width // GROUP) + g[None, :]
    tl.store(at, scale.to(tl.int8), mask=there[:, None] & (g < width // GROUP)[None, :])
    tl.store(units + 2 * row, unit.to(tl.bfloat16), mask=there)
    return tl.reshape(code, part.shape).to(tl.int32)


@triton.jit
def _pack(keys, values, centre, kept, scales, units, row, x, there, taken, width: tl.constexpr, GROUP: tl.constexpr):
    """Keys and values, equally wide, into a state in int4, as `clusters._kept` does."""
    low = _half(keys, centre, scales, units, row, x, there, taken, width, GROUP)
    high = _half(values, centre + width, scales + width // GROUP, units + 1, row, x, there, taken, width, GROUP)
    at = kept + row[:, None] * width + x[None, :]
    tl.store(at, ((low & 15) | ((high & 15) << 4)).to(tl.uint8), mask=there[:, None] & (x < width)[None, :])


@triton.jit
def _store(key, value, centre, kept, scales, units, row, k, v, there, taken, K: tl.constexpr, V: tl.constexpr,
           DTYPE: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Clusters into a state; those that are not taken are zeros."""
    if DTYPE == 3:
        _pack(key, value, centre, kept, scales, units, row, k, there, taken, K, GROUP)
    else:
        _keep(key, kept, scales, row, k, there, 0, K, K + V, DTYPE)
        _keep(value, kept, scales, row, v, there, K, V, K + V, DTYPE)


@triton.jit
def take_in(kept, scales, units, sizes, queries, centres, keys, values, exists, means, merged, counts, real, whole,
            alpha, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, MP: tl.constexpr,
            CP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr,
            WEIGHS: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, JUMPS: tl.constexpr, R: tl.constexpr,
            W: tl.constexpr, INNER: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`clusters.update_state`, in place; `means`, `merged` and `counts` are scratch. One program a head: P = 1."""
    p, D = tl.program_id(0), K + V
    kept, scales = kept + p * M * (K if DTYPE == 3 else D), scales + p * M * (D // GROUP if DTYPE == 3 else 2)
    units, sizes, queries, centre = units + p * M * 2, sizes + p * M * 2, queries + p * (2 * K + 1), centres + p * D
    means, merged, counts = means + p * M * D, merged + p * M * D, counts + p * M * 2
    least, partner = real + p * 4 * MP, whole + p * 7 * MP
    m, k, v = tl.arange(0, MP), tl.arange(0, KP), tl.arange(0, VP)
    here = tl.load(exists + p)
    if tl.load(sizes + 2 * (M - 1)) * here > 0.0:
        for start in range(0, M, JOINED):
            row = start + tl.arange(0, JOINED)
            at, there = means + row[:, None] * D, (row < M)[:, None]
            key = _open(kept, scales, units, centre, row, k, M, 0, K, D, DTYPE, GROUP)
            value = _open(kept, scales, units, centre, row, v, M, K, V, D, DTYPE, GROUP)
            tl.store(at + k[None, :], key, mask=there & (k < K)[None, :])
            tl.store(at + K + v[None, :], value, mask=there & (v < V)[None, :])
        tl.debug_barrier()
        _weigh(means, sizes, queries, least + MP, alpha, M, K, V, MP, KP, VP, HEADS, R)
        for tile in range(0, (M + R - 1) // R):
            _find(means, queries, least + MP, least, partner, tile, M, K, V, MP, KP, VP, R, W, INNER, PRECISION)
        tl.debug_barrier()
        _choose(least, partner, partner + MP, M, MP, C, CP, JUMPS, R, W)
        _settle(means, sizes, merged, counts, merged, counts, queries, centre, partner + MP, partner, 0, 1, 0, M, K, V,
                C, MP, CP, KP, VP, 1, JOINED, WEIGHS, 0, GROUP, False)  # fmt: skip
        tl.debug_barrier()
        for start in range(0, M, JOINED):
            row = start + tl.arange(0, JOINED)
            key, value = _tile(merged, row, k, D, M, K), _tile(merged + K, row, v, D, M, V)
            taken = tl.load(counts + 2 * row, mask=row < M, other=0.0) > 0.0
            _store(key, value, centre, kept, scales, units, row, k, v, row < M, taken, K, V, DTYPE, GROUP)
        both = tl.arange(0, 2 * MP)
        tl.store(sizes + both, tl.load(counts + both, mask=both < 2 * M, other=0.0), mask=both < 2 * M)
        tl.debug_barrier()
    taken = tl.sum((tl.load(sizes + 2 * m, mask=m < M, other=0.0) > 0).to(tl.int32), 0)
    row = tl.minimum(taken, M - 1) + tl.zeros([1], tl.int32)
    tl.debug_barrier()
    there = (tl.zeros([1], tl.float32) + here) > 0.0
    key = tl.load(keys + p * K + k, mask=k < K, other=0.0)[None, :]
    value = tl.load(values + p * V + v, mask=v < V, other=0.0)[None, :]
    if DTYPE == 3:
        first = (row == 0)[:, None] & there[:, None]
        tl.store(centre + k[None, :], key, mask=first & (k < K)[None, :])
        tl.store(centre + K + v[None, :], value, mask=first & (v < V)[None, :])
        tl.debug_barrier()
    _store(key, value, centre, kept, scales, units, row, k, v, there, there, K, V, DTYPE, GROUP)
    tl.store(sizes + 2 * row, tl.full([1], 1.0, tl.float32), mask=there)
    tl.store(queries + 2 * K, here)


@triton.jit
def read_token(q, kept, scales, units, sizes, queries, centres, mass, same, y, weight, scaling, softcap, G,
               M: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
               HEADS: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr,
               WEIGHS: tl.constexpr, OWN: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """`clusters.read_state`, a program per row and query head; the first of a group adds up the queries."""
    h, D = tl.program_id(0), K + V
    p = h // HEADS
    kept, scales = kept + p * M * (K if DTYPE == 3 else D), scales + p * M * (D // GROUP if DTYPE == 3 else 2)
    units, sizes, queries, centre = units + p * M * 2, sizes + p * M * 2, queries + p * (2 * K + 1), centres + p * D
    k, v = tl.arange(0, KP), tl.arange(0, VP)
    query = tl.load(q + h * K + k, mask=k < K, other=0.0).to(tl.float32)
    top, total, sums = tl.full([1], 2 * EMPTY, tl.float32), tl.zeros([1], tl.float32), tl.zeros([VP], tl.float32)
    for start in range(0, M, R):
        row = start + tl.arange(0, R)
        n = tl.load(sizes + 2 * row, mask=row < M, other=0.0)
        keys = _open(kept, scales, units, centre, row, k, M, 0, K, D, DTYPE, GROUP)
        a = tl.sum(keys * query[None, :], 1) * scaling
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
        values = _open(kept, scales, units, centre, row, v, M, K, V, D, DTYPE, GROUP)
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
