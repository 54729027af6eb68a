"""Decays that a paper defines by a formula, for the additive recurrence. Log space, fp32, ≤ 0."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

EMPTY = -1e30
"""The log of a sum over no tokens: finite, so that no difference of two of them is NaN."""


def retention(heads: int, device: torch.device | None = None) -> Tensor:
    """ln(1 − 2^{−5−h}) for head h, [heads, 1, 1] to broadcast over rows and tokens (RetNet, arXiv 2307.08621)."""
    exponent = -5.0 - torch.arange(heads, device=device, dtype=torch.float32)
    return torch.log1p(-exponent.exp2()).view(heads, 1, 1)


def forget(logits: Tensor, lower: float = 0.0) -> tuple[Tensor, Tensor]:
    """The tied gates of HGRN-2 (arXiv 2404.07904): f = lower + (1 − lower) σ(x).

    Args:
        logits: x of any shape.
        lower: bound below which no channel forgets, in [0, 1).

    Returns:
        ln f, and the key 1 − f, without cancellation where f is near 1.
    """
    x = logits.float()
    log_decay = F.logsigmoid(x)
    if lower:
        log_decay = torch.logaddexp(log_decay + math.log1p(-lower), torch.full_like(x, math.log(lower)))
    return log_decay, (1 - lower) * (-x).sigmoid()


def empty_running(batch: int, kv_heads: int, key_width: int, device: torch.device) -> Tensor:
    """The state of `running_softmax` before the first token, [B, G, 1, K]."""
    return torch.full((batch, kv_heads, 1, key_width), EMPTY, device=device)


def running_softmax(
    logits: Tensor, exists: Tensor, running: Tensor, decoding: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Additive decay (LightNet, arXiv 2405.21022): every channel's keys are a softmax over the tokens so far.

    With z_t = ln Σ_{j ≤ t} e^{x_j}, the key e^{x_t − z_t} and the decay e^{z_{t-1} − z_t} give
    S_t = Σ_j e^{x_j − z_t} v_jᵀ.

    Args:
        logits: x [B, G, T, K].
        exists: [B, G, T, 1], 1 for a token and 0 for none: it gets key 0 and decay 1 and leaves z as it was.
        running: z [B, G, 1, K] as `empty_running` makes it.
        decoding: T = 1 and `running` is updated in place.

    Returns:
        key and log_decay [B, G, T, K] for the additive recurrence, and z after the last token.
    """
    x = logits.to(running.dtype).masked_fill(exists == 0, EMPTY)
    z = torch.cat([running, x], dim=-2).logcumsumexp(-2)
    before, after = z[..., :-1, :], z[..., 1:, :]
    log_decay = torch.where((exists == 0) | (before == EMPTY), 0.0, before - after)
    key = (x - after).exp().masked_fill(exists == 0, 0.0)
    last = z[..., -1:, :]
    return key, log_decay, running.copy_(last) if decoding else last
