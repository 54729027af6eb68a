"""A recurrent state in fewer bits between two steps; every step computes in fp32.

bfloat16 rounds each number. int8 keeps whole steps of a row (along the last dimension, with a scale of its own) and
what rounding left over, in sixteenths of a step: the next step adds to the exact sum of both, so that updates much
smaller than a step of int8 are not lost (error feedback). Plain rounding to int8 at every step loses them, and models
break on it. 1.5 bytes a number, and 2 a row.

Keys beside values, which are rounded when they are written and not at every step, need no rest: the functions of pairs.
These also know int4, two numbers in a byte: of a state that changes at every step it would leave nothing. A group of 8
numbers has a step in int8, and these steps a unit in bf16, one for the key and one for the value (double quantisation,
QLoRA, arXiv 2305.14314). The number of a group that is farthest from 0 is -8 of its steps, whatever its sign, so that
all 16 codes are of use.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import host

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
"""Name -> what a state is rounded to, int4 by the dtype of the bytes that hold it; None: not at all."""
GROUP = 8
"""Channels that share a step in int4, or the most that divide both widths."""
SHORT = 8
"""Rows of fewer numbers share their scale with the rows beside them; if these are few too, as sums of weights are, they
stay fp32."""
NOTHING = math.log(torch.finfo(torch.float32).tiny)
"""What int8 keeps of the logarithm of 0, the weight of a memory in which nothing has arrived."""
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
    x = x.masked_fill(x == -math.inf, NOTHING)  # by which the row would be scaled
    scale = (x.abs().amax(-1 if x.shape[-1] >= SHORT else (-2, -1), keepdim=True) / 127).bfloat16()
    x = x / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    step = x.round().clamp(-127, 127)
    left = ((x - step) * FINEST).round().clamp(-(FINEST // 2), FINEST // 2 - 1) + FINEST // 2
    left = F.pad(left.to(torch.uint8), (0, x.shape[-1] % 2), value=FINEST // 2)
    return step.to(torch.int8), left[..., ::2] | left[..., 1::2] << 4, scale


def groups(key_width: int, value_width: int, dtype: torch.dtype | None) -> list[int]:
    """Widths of what shares a step: for int8 the key and the value, for int4 groups of channels; else nothing does."""
    if dtype == torch.int8:
        return [key_width, value_width]
    width = math.gcd(key_width, value_width, GROUP)
    return [width] * ((key_width + value_width) // width) if dtype == torch.uint8 else []


def stored_pairs(x: Tensor, key_width: int, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Keys beside values [..., K + V] as a cache keeps them, and what scales them: what is rounded once needs no rest.
    Zeros are kept as zeros. Whole numbers and their scales have no gradient.

    Returns:
        With int8 whole numbers [..., K + V] and steps bf16 [..., 2]. With int4 bytes [..., (K + V)/2], of channel i in
        the low half and i + (K + V)/2 in the high one; a step of each group, int8 [..., groups]; the units of steps,
        bf16 [..., 2]. Else the pairs alone.
    """
    if dtype not in (torch.int8, torch.uint8):
        return (x.to(dtype if dtype == torch.bfloat16 else x.dtype),)
    codes, *scales = _codes(x.detach(), key_width, dtype)
    codes = codes.to(torch.int8)
    if dtype == torch.uint8:
        first, second = codes.view(torch.uint8).chunk(2, -1)
        codes = first & 15 | second << 4
    return codes, *scales


def opened_pairs(kept: Tensor, scales: Sequence[Tensor], key_width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys [..., K] and values [..., V] of which `stored_pairs` keeps this, in `dtype`; if not rounded, views of it."""
    if kept.dtype != torch.uint8:
        return _scaled(kept.to(dtype), scales, key_width)
    both = kept.view(torch.int8)  # whose shifts to the right keep the sign
    codes = both << 4 >> 4, both >> 4
    if key_width == both.shape[-1]:  # each half alone stays in a CPU's cache
        return _scaled_parts(codes[0].to(dtype), codes[1].to(dtype), scales)
    return _scaled(torch.cat(codes, -1).to(dtype), scales, key_width)


def rounded_pairs(x: Tensor, key_width: int, dtype: torch.dtype | None) -> Tensor:
    """Keys beside values as they are after they were stored; the gradient passes as if they were not."""
    if dtype not in (torch.bfloat16, torch.int8, torch.uint8):
        return x
    given = x.detach()
    if dtype == torch.bfloat16:
        opened = given.to(dtype).to(x.dtype)
    else:
        codes, *scales = _codes(given, key_width, dtype)
        _scaled(codes, scales, key_width)
        opened = codes
    return x + (opened - x).detach() if x.requires_grad else opened


def _codes(x: Tensor, key_width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Whole numbers [..., K + V] in the dtype of x, before they are packed, and what scales them."""
    widths, tiny = groups(key_width, x.shape[-1] - key_width, dtype), torch.finfo(torch.float32).tiny
    if dtype == torch.int8:
        parts = x.split(widths, -1)
        steps = torch.cat([part.abs().amax(-1, keepdim=True) / 127 for part in parts], -1).bfloat16()
        each = steps.to(x.dtype).clamp(min=tiny).split(1, -1)
        codes = torch.cat([part / step for part, step in zip(parts, each, strict=True)], -1)
        return codes.round_().clamp_(-127, 127), steps
    x = x.unflatten(-1, (-1, widths[0]))
    high, low = x.amax(-1), x.amin(-1)
    step = torch.where(high > -low, high, low) / -8
    most = [part.abs().amax(-1, keepdim=True) / 127 for part in _of_pairs(step, key_width, widths)]
    units = torch.cat(most, -1).bfloat16()
    unit = _for_each(units.to(x.dtype), key_width, widths)
    scales = (step / unit.clamp(min=tiny)).round().clamp(-127, 127)
    step = scales * unit
    codes = (x / step.where(step != 0, math.inf).unsqueeze(-1)).round_().clamp_(-8, 7).flatten(-2)
    return codes, scales.to(torch.int8), units


def _scaled(codes: Tensor, scales: Sequence[Tensor], key_width: int) -> tuple[Tensor, Tensor]:
    """What whole numbers stand for, in their place: keys and values."""
    return _scaled_parts(codes[..., :key_width], codes[..., key_width:], scales)


def _scaled_parts(keys: Tensor, values: Tensor, scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if len(scales) == 2:
        width = (keys.shape[-1] + values.shape[-1]) // scales[0].shape[-1]
        steps = scales[0].to(keys.dtype).split([keys.shape[-1] // width, values.shape[-1] // width], -1)
        keys.mul_(_spread(steps[0], width))
        values.mul_(_spread(steps[1], width))
    if scales:
        units = scales[-1].to(keys.dtype)
        keys.mul_(units[..., :1])
        values.mul_(units[..., 1:])
    return keys, values


def _spread(x: Tensor, width: int) -> Tensor:
    """Small whole numbers x [..., groups], each `width` times, [..., groups·width]. On a CPU a product with ones: exact
    in any precision, and three times faster there than broadcasting over groups."""
    if not host.is_free(x):
        return x.unsqueeze(-1).expand(*x.shape, width).flatten(-2)
    n = 1 + (x.shape[-1] % 2 == 0)
    ones = torch.eye(n, dtype=x.dtype, device=x.device).repeat_interleave(width, 1)
    return (x.reshape(-1, n) @ ones).view(*x.shape[:-1], x.shape[-1] * width)


def _of_pairs(x: Tensor, key_width: int, widths: list[int]) -> tuple[Tensor, ...]:
    """Those of groups [..., groups] that are of keys, and those that are of values."""
    keys = key_width // widths[0]
    return x.split([keys, len(widths) - keys], -1)


def _for_each(units: Tensor, key_width: int, widths: list[int]) -> Tensor:
    """Of units [..., 2] that of each group, [..., groups]."""
    keys = key_width // widths[0]
    sizes = keys, len(widths) - keys
    return torch.cat([x.expand(*x.shape[:-1], n) for x, n in zip(units.split(1, -1), sizes, strict=True)], -1)
