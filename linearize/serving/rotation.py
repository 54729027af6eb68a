"""RoPE of a server's own module, run backwards."""

from typing import Any

import torch
from torch import Tensor


def unrotate(rotary: Any, x: Tensor, positions: Tensor) -> Tensor:
    """Queries or keys as they were before RoPE.

    Args:
        rotary: vLLM's module, with its table `cos_sin_cache` [positions, rotated channels] and `is_neox_style`; None
            where nothing rotates.
        x: [B, heads, T, K].
        positions: int64 [B, T].

    Returns:
        fp32, like x.
    """
    x = x.float()
    if rotary is None:
        return x
    cos, sin = rotary.cos_sin_cache[positions].float().unsqueeze(1).chunk(2, -1)
    # The table may hold a factor (YaRN), and is rounded to 16 bits: cos² + sin² is not 1.
    square = cos**2 + sin**2
    width = 2 * cos.shape[-1]
    turned = x[..., :width]
    a, b = turned.chunk(2, -1) if rotary.is_neox_style else (turned[..., ::2], turned[..., 1::2])
    back = (a * cos + b * sin) / square, (b * cos - a * sin) / square
    raw = torch.cat(back, -1) if rotary.is_neox_style else torch.stack(back, -1).flatten(-2)
    return torch.cat([raw, x[..., width:]], -1)
