"""The launches of the Triton kernels of clusters_triton.py, which is imported at the first call with a CUDA tensor.

Constants are what was found to be fast, or may be tried: none of them changes what is computed, but for PRECISION.
Letters as in ops/clusters.py; N = B·G, S merges.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import compact

ROWS, COLUMNS, INNER = 64, 64, 32
"""Tile of the costs, and how many channels a product takes at a time."""
JOINED = 32
"""Rows that are joined at a time."""
PRECISION = "tf32x3"
"""Of products of fp32: ieee, or tf32x3, which is nearly as exact and runs on tensor cores."""
PROGRAMS = 8
"""P, programs that share a row and key head. More than one wait for each other, so that all N·P must run at once: there
are no more of them than the device has multiprocessors."""
SPLIT = False
"""Two launches a merge, for costs and for joining, in place of one for all merges: nothing waits inside a kernel."""
FLAGS: dict[str, Any] = {"num_warps": 8, "num_stages": 1}
GRADIENT: dict[str, int] = {"DB": 16, "R": 64, "num_warps": 4}
"""Columns of a program, rows at a time, and warps."""
READING = {"R": 32, "num_warps": 4}
"""Clusters at a time, and warps."""
WIDEST, MOST = 256, 1024
"""K or V, and M."""
DTYPES = {torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""The kernels' number of a dtype of means; fp32 is 0."""


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot be imported, or None."""
    try:
        _kernels()
    except (ImportError, OSError) as error:  # triton reads the source of a kernel
        return f"the Triton kernels of clusters cannot be imported ({error}); pip install triton"
    return None


@functools.cache
def _kernels() -> Any:
    """What holds all kernels by their names."""
    from . import clusters_token_triton, clusters_triton

    return SimpleNamespace(**{**vars(clusters_triton), **vars(clusters_token_triton)})


def _launch(name: str, grid: tuple[int, ...], first: Tensor, *given: Any, **constants: Any) -> None:
    """A kernel, on the device where its first tensor lies."""
    with torch.cuda.device_of(first):
        getattr(_kernels(), name)[grid](first, *given, **constants)


def _at_once(device: torch.device) -> int:
    """How many programs surely run at the same time; in Triton's interpreter one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def restriction(sizes: Tensor, K: int, V: int, dtype: torch.dtype | None) -> str | None:
    """What about clusters of `sizes` [B, G, M, 2], kept in `dtype`, the kernels cannot do, or None."""
    M, widest = sizes.shape[2], max(K, V)
    if dtype == torch.uint8 and K != V:
        return f"in int4 keys and values must be equally wide, and these are {K} and {V}"
    if sizes.dtype != torch.float32:
        return f"they compute in fp32, and the clusters are {sizes.dtype}"
    if widest > WIDEST:
        return f"keys and values may be {WIDEST} wide, and these are {widest}"
    return f"there may be {MOST} clusters, and these are {M}" if M > MOST else None


def constants(M: int, K: int, V: int, rule: Any, dtype: torch.dtype, programs: int) -> dict[str, Any]:
    """What `merge_all` is compiled for."""

    def padded(size: int) -> int:
        return max(1 << (size - 1).bit_length(), 16)

    MP, KP, VP, C = padded(M), padded(K), padded(V), rule.chunk
    return {
        "M": M, "K": K, "V": V, "C": C, "MP": MP, "CP": padded(C), "KP": KP, "VP": VP, "P": programs,
        "HEADS": rule.heads, "WEIGHS": rule.weighs, "DTYPE": DTYPES.get(dtype, 0),
        "GROUP": (compact.groups(K, V, dtype) or [1])[0], "JUMPS": (C - 1).bit_length(), "R": min(ROWS, MP),
        "W": min(COLUMNS, MP), "INNER": min(INNER, KP, VP), "JOINED": JOINED, "PRECISION": PRECISION,
    }  # fmt: skip


def merges(
    means: Tensor, sizes: Tensor, tape: Tensor, one: Tensor, metric: Tensor, goes_on: Tensor, rule: Any,
    dtype: torch.dtype, centre: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`clusters._merges`, with its arguments; where clusters went is [S, B, G, M] int32."""
    B, G, M, D = means.shape
    S, N, K = goes_on.shape[1], B * G, metric.shape[-1] // 2
    every, counts = means.new_empty(S + 1, B, G, M, D), means.new_empty(S + 1, B, G, M, 2)
    every[0], counts[0] = means, sizes
    went = torch.empty(S, B, G, M, device=means.device, dtype=torch.int32)
    if S == 0:
        return every, counts, went
    P = PROGRAMS if SPLIT else max(min(PROGRAMS, _at_once(means.device) // N), 1)
    compiled = constants(M, K, D - K, rule, dtype, P)
    real = means.new_empty(N, 3 * P + 1, compiled["MP"])
    whole = torch.empty(N, 6 * P + 1, compiled["MP"], device=means.device, dtype=torch.int32)
    waits = P > 1 and not SPLIT
    tickets = torch.zeros(N, device=means.device, dtype=torch.int32) if waits else whole
    flags = FLAGS | ({"launch_cooperative_grid": True} if waits else {})
    given = (
        every, counts, went, tape.contiguous(), one.contiguous(), metric.contiguous(),
        counts if centre is None else centre.contiguous(), goes_on.contiguous().view(torch.uint8), real, whole, tickets,
        float(rule.expected),
    )  # fmt: skip
    rest = S, G, metric.shape[2]
    parts = [(i, i + 1, part) for i in range(S) for part in (1, 2)] if SPLIT else [(0, S, 0)]
    for first, last, part in parts:
        _launch("merge_all", (N * P,), *given, first, last, *rest, **compiled, PART=part, **flags)
    return every, counts, went


def _parts(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Means, scales, units, sizes, queries and centre; sizes stand for what a state lacks, which no kernel reads."""
    means, sizes, queries, *rest = state
    scales, units, centre = [*rest, *[sizes] * (3 - len(rest))]
    return means, scales, units, sizes, queries, centre


def take_in(k: Tensor, v: Tensor, exists: Tensor, state: tuple[Tensor, ...], rule: Any) -> None:
    """`clusters.update_state`, with its arguments, where nothing has a gradient."""
    means, scales, units, sizes, queries, centre = _parts(state)
    (B, G, M), K, V = means.shape[:3], k.shape[-1], v.shape[-1]
    compiled = constants(M, K, V, rule, means.dtype, 1)
    opened, merged, counts = (sizes.new_empty(B, G, M, width) for width in (K + V, K + V, 2))
    real = sizes.new_empty(B * G, 4, compiled["MP"])
    whole = torch.empty(B * G, 7, compiled["MP"], device=means.device, dtype=torch.int32)
    assert all(x.is_contiguous() for x in state)  # it is changed in place
    token = (x.to(sizes.dtype).contiguous() for x in (k, v, exists))
    _launch(
        "take_in", (B * G,), means, scales, units, sizes, queries, centre, *token, opened, merged, counts, real,
        whole, float(rule.expected), **compiled, **FLAGS,
    )  # fmt: skip


def read_token(q: Tensor, state: tuple[Tensor, ...], rule: Any) -> tuple[Tensor, Tensor]:
    """`clusters.read_state`, with its arguments, where nothing has a gradient."""
    means, scales, units, sizes, queries, centre = _parts(state)
    assert all(x.is_contiguous() for x in state)  # it is changed in place
    (B, H, _, K), (G, M) = q.shape, means.shape[1:3]
    V = (centre if means.dtype == torch.uint8 else means).shape[-1] - K
    y, weight = sizes.new_empty(B, H, 1, V), sizes.new_empty(B, H, 1)
    compiled = constants(M, K, V, rule, means.dtype, 1)
    names = ("M", "K", "V", "KP", "VP", "HEADS", "DTYPE", "GROUP", "WEIGHS")
    mass = rule.mass.float() if isinstance(rule.mass, Tensor) else sizes
    _launch(
        "read_token", (B * H,), q.contiguous(), means, scales, units, sizes, queries, centre, mass,
        0.0 if isinstance(rule.mass, Tensor) else float(rule.mass), y, weight, rule.scaling, rule.softcap or 0.0, G,
        **{name: compiled[name] for name in names}, CAPPED=rule.softcap is not None,
        OWN=isinstance(rule.mass, Tensor), **READING,
    )  # fmt: skip
    return y, weight


def gradient(given: Tensor, counts: Tensor, went: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The gradients of the first means and of the tape, from those [S + 1, B, G, M, D] of all means."""
    S, (B, G, M, D) = went.shape[0], given.shape[1:]
    out, scratch, tape = (given.new_empty(B, G, rows, D) for rows in (M, M, S * chunk))
    grid = B * G, -(-D // GRADIENT["DB"])
    _launch(
        "merge_gradient", grid, given.contiguous(), counts, went, scratch, out, tape, S, M=M, D=D, C=chunk, **GRADIENT
    )
    return out, tape
