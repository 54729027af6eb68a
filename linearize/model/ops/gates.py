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


def half_lives(shortest: float, longest: float, heads: int, device: torch.device | None = None) -> Tensor:
    """Half-lives in tokens, one per head, evenly spaced in log; a single head has the longest: fp32 [heads, 1, 1]."""
    spread = torch.linspace(math.log(shortest), math.log(longest), heads, device=device)
    return (spread if heads > 1 else spread.new_full((1,), math.log(longest))).exp().view(heads, 1, 1)


def forget(logits: Tensor, lower: float) -> tuple[Tensor, Tensor]:
    """The tied gates of HGRN-2 (arXiv 2404.07904): f = lower + (1 − lower) σ(x).

    Args:
        logits: x of any shape.
        lower: bound below which no channel forgets, in (0, 1).

    Returns:
        ln f, and the key 1 − f, without cancellation where f is near 1.
    """
    x = logits.float()
    log_decay = torch.logaddexp(F.logsigmoid(x) + math.log1p(-lower), torch.full_like(x, math.log(lower)))
    return log_decay, (1 - lower) * (-x).sigmoid()


def log_count(n: Tensor, strength: float, heads: int) -> Tensor:
    """ln n + strength [B, H, T], the log weight of a memory that stands for n tokens [B, G, T, 1]; −∞ where n is 0."""
    weight = (n.clamp(min=1).log() + strength).masked_fill(n == 0, float("-inf"))
    return weight.squeeze(-1).repeat_interleave(heads // n.shape[1], 1)


def running_softmax(
    logits: Tensor, exists: Tensor, running: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Additive decay (LightNet, arXiv 2405.21022): every channel's keys are a softmax over the tokens so far.

    With z_t = ln Σ_{j ≤ t} e^{x_j}, the key e^{x_t − z_t} and the decay e^{z_{t-1} − z_t} give
    S_t = Σ_j e^{x_j − z_t} v_jᵀ.

    Args:
        logits: x [B, G, T, K].
        exists: [B, G, T, 1], 1 for a token and 0 for none: it gets key 0 and decay 1 and leaves z as it was.
        running: z [B, G, 1, K] after the tokens before; 0 where there were none.
        seen: n [B, G, 1, 1], their number.

    Returns:
        key and log_decay [B, G, T, K] for the additive recurrence, z after the last token, and n [B, G, T, 1] at every
        token.
    """
    x = logits.to(running.dtype).masked_fill(exists == 0, EMPTY)
    z = torch.cat([running.masked_fill(seen == 0, EMPTY), x], dim=-2).logcumsumexp(-2)
    before, after = z[..., :-1, :], z[..., 1:, :]
    log_decay = torch.where((exists == 0) | (before == EMPTY), 0.0, before - after)
    key = (x - after).exp().masked_fill(exists == 0, 0.0)
    count = seen + exists.to(seen.dtype).cumsum(-2)
    total = count[..., -1:, :] if count.shape[-2] else seen
    return key, log_decay, z[..., -1:, :].masked_fill(total == 0, 0.0), count
