"""One token of ops/clusters.py in Triton kernels: what `update_state` and `read_state` do, a launch each. Nothing is
asked of the host, and the state stays where it lies, so that a step can be captured in a graph. As clusters_triton.py,
whose merging this uses.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from .clusters_triton import _choose, _codes, _find, _settle, _tile, _weigh

EMPTY = tl.constexpr(-1e30)


@triton.jit
def _open(kept, scales, centre, row, x, rows, first, width: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
          DTYPE: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Keys (first = 0) or values of taken clusters of a state, in fp32."""
    inside = (row < rows)[:, None] & (x < width)[None, :]
    channel = first + x
    if DTYPE == 3:
        late = channel >= D // 2
        at = kept + row[:, None] * (D // 2) + tl.where(late, channel - D // 2, channel)[None, :]
        both = tl.load(at, mask=inside, other=0).to(tl.int32) ^ 0x88
        part = (tl.where(late[None, :], both >> 4, both) & 15).to(tl.float32) - 8.0
        scale = tl.load(scales + row[:, None] * N + (channel // GROUP)[None, :], mask=inside, other=0.0)
        part = part * scale.to(tl.float32) + tl.load(centre + channel, mask=x < width, other=0.0)[None, :]
    else:
        part = tl.load(kept + row[:, None] * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if DTYPE == 2:
        scale = tl.load(scales + N * row + (1 if first > 0 else 0), mask=row < rows, other=0.0)
        part *= scale.to(tl.float32)[:, None]
    return part


@triton.jit
def _keep(part, kept, scales, row, x, there, first, width: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """Into a state, as `clusters._kept` does; `_pack` does it for int4."""
    at = kept + first + row[:, None] * D + x[None, :]
    if DTYPE == 2:
        code, scale = _codes(part, part.shape[1], 127.0)
        scale = tl.reshape(scale, [part.shape[0], 1]).to(tl.bfloat16)
        tl.store(scales + 2 * row[:, None] + (1 if first > 0 else 0), scale, mask=there[:, None])
        tl.store(at, tl.reshape(code, part.shape).to(tl.int8), mask=there[:, None] & (x < width)[None, :])
    else:
        tl.store(at, part.to(kept.dtype.element_ty), mask=there[:, None] & (x < width)[None, :])


@triton.jit
def _half(part, centre, scales, row, x, there, taken, N: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr):
    """Of half of the channels of clusters 1 to 15 a channel, 8 where they are not taken; their scales are stored."""
    part = tl.where(taken[:, None], part - tl.load(centre + x, mask=x < HALF, other=0.0)[None, :], 0.0)
    code, scale = _codes(part, GROUP, 7.0)
    g, scale = tl.arange(0, part.shape[1] // GROUP), tl.reshape(scale, [part.shape[0], part.shape[1] // GROUP])
    inside = there[:, None] & (g < HALF // GROUP)[None, :]
    tl.store(scales + row[:, None] * N + g[None, :], scale.to(tl.bfloat16), mask=inside)
    return tl.reshape(code + 8.0, part.shape).to(tl.int32)


@triton.jit
def _pack(low, high, centre, kept, scales, row, x, there, taken, N: tl.constexpr, HALF: tl.constexpr,
          GROUP: tl.constexpr):  # fmt: skip
    """Both halves of the channels of clusters into a state in int4, as `clusters._kept` does."""
    low = _half(low, centre, scales, row, x, there, taken, N, HALF, GROUP)
    high = _half(high, centre + HALF, scales + HALF // GROUP, row, x, there, taken, N, HALF, GROUP)
    both = ((low | (high << 4)) ^ 0x88).to(tl.uint8)
    tl.store(kept + row[:, None] * HALF + x[None, :], both, mask=there[:, None] & (x < HALF)[None, :])


@triton.jit
def _entering(keys, values, channel, last, K: tl.constexpr):
    """Channels, before `last`, of the one key and value."""
    inside = channel < last
    key = tl.load(keys + channel, mask=inside & (channel < K), other=0.0)
    return (key + tl.load(values + channel - K, mask=inside & (channel >= K), other=0.0))[None, :]


@triton.jit
def take_in(kept, scales, sizes, queries, centres, keys, values, exists, means, merged, counts, real, whole, alpha,
            M: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr,
            KP: tl.constexpr, VP: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, WEIGHS: tl.constexpr,
            DTYPE: tl.constexpr, GROUP: tl.constexpr, JUMPS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
            INNER: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`clusters.update_state`, in place; `means`, `merged` and `counts` are scratch. One program a head: P = 1."""
    p, D, HALF = tl.program_id(0), K + V, (K + V) // 2
    N = D // GROUP if DTYPE == 3 else 2
    kept, scales, sizes = kept + p * M * (HALF if DTYPE == 3 else D), scales + p * M * N, sizes + p * M * 2
    queries, centre, means, merged, counts = (
        queries + p * (2 * K + 1),
        centres + p * D,
        means + p * M * D,
        merged + p * M * D,
        counts + p * M * 2,
    )
    keys, values = keys + p * K, values + p * V
    least, partner = real + p * 4 * MP, whole + p * 7 * MP
    m, k, v, x = tl.arange(0, MP), tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, KP if KP > VP else VP)
    here = tl.load(exists + p)
    if tl.load(sizes + 2 * (M - 1)) * here > 0.0:
        for start in range(0, M, JOINED):
            row = start + tl.arange(0, JOINED)
            at, there = means + row[:, None] * D, (row < M)[:, None]
            key = _open(kept, scales, centre, row, k, M, 0, K, D, N, DTYPE, GROUP)
            value = _open(kept, scales, centre, row, v, M, K, V, D, N, DTYPE, GROUP)
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
            if DTYPE == 3:
                low, high = _tile(merged, row, x, D, M, HALF), _tile(merged + HALF, row, x, D, M, HALF)
                taken = tl.load(counts + 2 * row, mask=row < M, other=0.0) > 0.0
                _pack(low, high, centre, kept, scales, row, x, row < M, taken, N, HALF, GROUP)
            else:
                _keep(_tile(merged, row, k, D, M, K), kept, scales, row, k, row < M, 0, K, D, DTYPE)
                _keep(_tile(merged + K, row, v, D, M, V), kept, scales, row, v, row < M, K, V, D, DTYPE)
        both = tl.arange(0, 2 * MP)
        tl.store(sizes + both, tl.load(counts + both, mask=both < 2 * M, other=0.0), mask=both < 2 * M)
        tl.debug_barrier()
    taken = tl.sum((tl.load(sizes + 2 * m, mask=m < M, other=0.0) > 0).to(tl.int32), 0)
    row = tl.minimum(taken, M - 1) + tl.zeros([1], tl.int32)
    tl.debug_barrier()
    there = (tl.zeros([1], tl.float32) + here) > 0.0
    key, value = _entering(keys, values, k, K, K), _entering(keys, values, K + v, D, K)
    if DTYPE == 3:
        first = (row[:, None] == 0) & there[:, None]
        tl.store(centre + k[None, :], key, mask=first & (k < K)[None, :])
        tl.store(centre + K + v[None, :], value, mask=first & (v < V)[None, :])
        tl.debug_barrier()
        low, high = _entering(keys, values, x, HALF, K), _entering(keys, values, HALF + x, D, K)
        _pack(low, high, centre, kept, scales, row, x, there, there, N, HALF, GROUP)
    else:
        _keep(key, kept, scales, row, k, there, 0, K, D, DTYPE)
        _keep(value, kept, scales, row, v, there, K, V, D, DTYPE)
    tl.store(sizes + 2 * row, tl.full([1], 1.0, tl.float32), mask=there)
    tl.store(queries + 2 * K, here)


@triton.jit
def read_token(q, kept, scales, sizes, queries, centres, mass, same, y, weight, scaling, softcap, G, M: tl.constexpr,
               K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, HEADS: tl.constexpr,
               DTYPE: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, WEIGHS: tl.constexpr, OWN: tl.constexpr,
               R: tl.constexpr):  # fmt: skip
    """`clusters.read_state`, a program per row and query head; the first of a group adds up the queries."""
    h, D = tl.program_id(0), K + V
    p, N = h // HEADS, D // GROUP if DTYPE == 3 else 2
    kept, scales, sizes = kept + p * M * (D // 2 if DTYPE == 3 else D), scales + p * M * N, sizes + p * M * 2
    queries, centre = queries + p * (2 * K + 1), centres + p * D
    k, v = tl.arange(0, KP), tl.arange(0, VP)
    query = tl.load(q + h * K + k, mask=k < K, other=0.0).to(tl.float32)
    top, total, sums = tl.full([1], 2 * EMPTY, tl.float32), tl.zeros([1], tl.float32), tl.zeros([VP], tl.float32)
    for start in range(0, M, R):
        row = start + tl.arange(0, R)
        n = tl.load(sizes + 2 * row, mask=row < M, other=0.0)
        keys = _open(kept, scales, centre, row, k, M, 0, K, D, N, DTYPE, GROUP)
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
        values = _open(kept, scales, centre, row, v, M, K, V, D, N, DTYPE, GROUP)
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
