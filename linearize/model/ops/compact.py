"""A recurrent state in fewer bits between two steps; every step computes in fp32.

bfloat16 rounds each number. int8 keeps whole steps of a row (along the last dimension, with a scale of its own) and
what rounding left over, in sixteenths of a step: the next step adds to the exact sum of both, so that updates much
smaller than a step of int8 are not lost (error feedback). Plain rounding to int8 at every step loses them, and models
break on it. 1.5 bytes a number, and 2 a row.

Keys beside values, which are rounded when they are written and not at every step, need no rest: the functions of pairs.
These also know int4, two numbers in a byte with a scale for every 16: of a state that changes at every step it would
leave nothing.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
"""Name -> what a state is rounded to, int4 by the dtype of the bytes that hold it; None: not at all."""
STEPS = {torch.int8: 127, torch.uint8: 7}
"""The largest number that is kept of a row or group."""
GROUP = 16
"""Channels that share a scale in int4, or the most that divide both widths."""
SHORT = 8
"""Rows of fewer numbers share their scale with the rows beside them; if these are few too, as sums of weights are, they
stay fp32."""
FINEST = 16
"""Sixteenths of a step are what is left over."""


def stored(state: tuple[Tensor, ...], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """What is kept of a state.

    Args:
        state: fp32 tensors [B, G, ..., D].
        dtype: None (they stay as they are), bfloat16 or int8.

    Returns:
        For each long one, with bfloat16: [B, ..., D]; with int8: steps int8 [B, ..., D], the rest uint8, two in a byte
        [B, ..., ⌈D/2⌉], and scales bf16 [B, ..., 1] or, of short rows, [B, ..., 1, 1].
    """
    parts = []
    for x in state:
        if dtype is None or x[0, 0].numel() < SHORT:
            parts.append(x)
        elif dtype == torch.bfloat16:
            parts.append(x.to(dtype))
        else:
            parts += _steps(x)
    return tuple(parts)


def opened(kept: tuple[Tensor, ...], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """The fp32 state of which this was kept; without rounding the same tensors."""
    if dtype is None:
        return kept
    state, rest = [], list(kept)
    while rest:
        x = rest.pop(0)
        if x.dtype != torch.int8:
            state.append(x if x.dtype == torch.float32 else x.float())
            continue
        left, scale = rest.pop(0), rest.pop(0)
        both = torch.stack([left & 15, left >> 4], -1).flatten(-2)[..., : x.shape[-1]]
        state.append((x.float() + (both.float() - FINEST // 2) / FINEST) * scale.float())
    return tuple(state)


def _steps(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = (x.abs().amax(-1 if x.shape[-1] >= SHORT else (-2, -1), keepdim=True) / 127).bfloat16()
    x = x / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    step = x.round().clamp(-127, 127)
    left = ((x - step) * FINEST).round().clamp(-(FINEST // 2), FINEST // 2 - 1) + FINEST // 2
    left = F.pad(left.to(torch.uint8), (0, x.shape[-1] % 2), value=FINEST // 2)
    return step.to(torch.int8), left[..., ::2] | left[..., 1::2] << 4, scale


def groups(key_width: int, value_width: int, dtype: torch.dtype | None) -> list[int]:
    """Widths of what shares a scale: for int8 the key and the value, for int4 groups of channels; else nothing does."""
    if dtype == torch.int8:
        return [key_width, value_width]
    width = math.gcd(key_width, value_width, GROUP)
    return [width] * ((key_width + value_width) // width) if dtype == torch.uint8 else []


def packed(width: int, dtype: torch.dtype | None) -> int:
    """How many elements hold so many numbers of a pair, which are an even number in int4."""
    return width // 2 if dtype == torch.uint8 else width


def _grouped(x: Tensor, widths: list[int]) -> list[Tensor]:
    """Views [..., groups, width] of x [..., D]: one of all groups where they are equally wide, else one of each."""
    if len(set(widths)) == 1:
        return [x.unflatten(-1, (len(widths), widths[0]))]
    return [part.unsqueeze(-2) for part in x.split(widths, -1)]


def stored_pairs(x: Tensor, key_width: int, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Keys beside values [..., K + V] as a cache keeps them, and for int8 and int4 their scales, one for each of
    `groups`: what is rounded once needs no rest. Zeros are kept as zeros."""
    widths = groups(key_width, x.shape[-1] - key_width, dtype)
    if not widths:
        return (x.to(dtype if dtype == torch.bfloat16 else x.dtype),)
    most, codes, scales = STEPS[dtype], [], []  # type: ignore[index]
    for part in _grouped(x, widths):
        scale = (part.abs().amax(-1) / most).bfloat16()
        step = scale.to(x.dtype).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        codes.append((part / step).round().clamp(-most, most).flatten(-2).to(torch.int8))
        scales.append(scale)
    codes, scales = torch.cat(codes, -1), torch.cat(scales, -1)
    if dtype == torch.int8:
        return codes, scales
    low, high = codes.view(torch.uint8).chunk(2, -1)
    return low & 15 | high << 4, scales


def opened_pairs(kept: Tensor, scales: Tensor | None, key_width: int, dtype: torch.dtype) -> Tensor:
    """That of which `stored_pairs` keeps this, in `dtype`."""
    if kept.dtype == torch.uint8:
        both = kept.view(torch.int8)  # whose shifts to the right keep the sign
        x = torch.cat([both << 4 >> 4, both >> 4], -1).to(dtype)
    else:
        x = kept.to(dtype)
    if scales is not None:
        parts = _grouped(x, groups(key_width, x.shape[-1] - key_width, kept.dtype))
        each = scales.to(dtype).split([part.shape[-2] for part in parts], -1)
        for part, scale in zip(parts, each, strict=True):
            part.mul_(scale.unsqueeze(-1))
    return x


def rounded_pairs(x: Tensor, key_width: int, dtype: torch.dtype | None) -> Tensor:
    """Keys beside values as they are after they were stored; the gradient passes as if they were not."""
    if dtype not in (torch.bfloat16, *STEPS):
        return x
    stored = stored_pairs(x.detach(), key_width, dtype)
    kept = opened_pairs(stored[0], stored[1] if len(stored) > 1 else None, key_width, x.dtype)
    return x + (kept - x).detach() if x.requires_grad else kept
