"""What a student learns from: the next token, and the source's distribution over it.

Letters: B batch, T tokens, V vocabulary. Logits at position t predict token t + 1; a label of -100 is no target.

    lm = Σ −log q(label)             q = softmax(student)
    kl = Σ τ² KL(p_τ ‖ q_τ)          p_τ = softmax(source / τ),  q_τ = softmax(student / τ)

Sums over targets, not means: who adds up micro batches and processes divides once, by the targets of all of them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
CHUNK = 2**22
"""Elements of one fp32 [tokens, V] array at a time (16 MiB): more is slower on a CPU and no faster on a GPU."""


class Losses(NamedTuple):
    """Sums over the targets of a micro batch, in nats, fp32 scalars.

    Attributes:
        total: the weighted sum; the one to differentiate.
        lm: next-token cross-entropy, without gradient.
        kl: τ² KL(source ‖ student), without gradient; 0 where there is no source.
    """

    total: Tensor
    lm: Tensor
    kl: Tensor


def count_targets(labels: Tensor, weights: Tensor | None = None) -> float:
    """What sums over the targets of ``labels`` [B, T] are to be divided by: their number, or the sum of their weights.

    Nothing predicts the first token of a row. ``weights`` [T] are as in :func:`token_losses`.
    """
    targets = labels[:, 1:] != IGNORE
    return float(targets.sum() if weights is None else (targets * weights[:-1]).sum())


def token_losses(
    logits: Tensor,
    labels: Tensor,
    source_logits: Tensor | None = None,
    *,
    lm: float = 1.0,
    kl: float = 0.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Losses:
    """Next-token and distillation losses of one micro batch, in fp32 whatever the dtype of the logits.

    The gradient is computed together with the losses, a few tokens at a time, so no [T, V] array in fp32 ever exists.
    It is written over ``source_logits``, whose content is lost: a source costs one such array more, not three.

    Args:
        logits: of the student, [B, T, V], any floating dtype.
        labels: token ids int64 [B, T], -100 where there is nothing to learn.
        source_logits: of the source, like ``logits`` and without a gradient. Needed where ``kl`` is not 0.
        lm: weight of the next-token loss.
        kl: weight of the distillation loss.
        temperature: τ.
        weights: of the positions that predict, [T], ≥ 0: every sum is a weighted one. None: 1 each.

    Raises:
        ValueError: ``kl`` without ``source_logits``.

    Example:
        >>> token_losses(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])).lm    # 2 targets, log 8 each
        tensor(4.1589)
    """
    if kl and source_logits is None:
        raise ValueError("kl needs source_logits")
    return Losses(*_TokenLosses.apply(logits, labels, source_logits, weights, lm, kl, temperature))  # type: ignore[misc]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, source: Tensor | None, weights: Tensor | None,
        lm: float, kl: float, temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        V = logits.shape[-1]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        student, targets = logits.reshape(-1, V), F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        counts = (targets != IGNORE).to(dtype)
        if weights is not None:
            counts = counts * weights.to(counts).repeat(len(labels))
        teacher = None if source is None else source.reshape(-1, V)
        reuse = teacher is not None and teacher.dtype == student.dtype
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = teacher if reuse else torch.empty_like(student)
        lm_sum, kl_sum = student.new_zeros((), dtype=dtype), student.new_zeros((), dtype=dtype)
        step = max(1, CHUNK // V)
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            count = counts[part]
            target = targets[part].clamp(min=0).unsqueeze(-1)
            s = student[part].to(dtype)
            log_q = s.log_softmax(-1)
            lm_sum -= (log_q.gather(-1, target).squeeze(-1) * count).sum()
            slope = 0.0
            if lm and gradient is not None:
                slope = lm * log_q.exp()
                slope.scatter_add_(-1, target, torch.full_like(target, -lm, dtype=dtype))
            if teacher is not None and kl:
                t = teacher[part].to(dtype)
                if temperature != 1:
                    log_q, t = (s / temperature).log_softmax(-1), t / temperature
                log_p = t.log_softmax(-1)
                p = log_p.exp()
                kl_sum += temperature**2 * (torch.linalg.vecdot(p, log_p - log_q) * count).sum()
                if gradient is not None:
                    slope = slope + kl * temperature * log_q.exp_().sub_(p)
            if gradient is not None:
                gradient[part] = (slope * count.unsqueeze(-1)).to(gradient.dtype)
        ctx.gradient = None if gradient is None else gradient.view_as(logits)
        ctx.mark_non_differentiable(lm_sum, kl_sum)
        return lm * lm_sum + kl * kl_sum, lm_sum, kl_sum

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place below: a second backward must fail, not lie
        return gradient.mul_(outputs[0].to(gradient.dtype)), *[None] * 6
