"""What a student learns from: the next token, and the source's distribution over it.

Letters: B batch, T tokens, V vocabulary. Logits at position t predict token t + 1; a label of -100 is no target.

    lm = Σ −log q(label)             q = softmax(student)
    kl = Σ τ² KL(p_τ ‖ q_τ)          p_τ = softmax(source / τ),  q_τ = softmax(student / τ)

Of a source that is known by its k likeliest tokens only (`Likeliest`), p_τ and q_τ are over k + 1 outcomes: these
tokens, and any other one. That is a KL divergence of its own: never negative, and with k = V the one above. It equals
the KL over all tokens from p̃ to q_τ, where p̃ shares the source's rest among the other tokens as the student does; so it
has the same gradient, q_τ − p̃.

Sums over targets, not means: who adds up micro batches and processes divides once, by the targets of all of them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.recovery.head import Deferred

IGNORE = -100
CHUNK = 2**22
"""Elements of one fp32 [tokens, V] array at a time (16 MiB): more is slower on a CPU and no faster on a GPU."""


class Likeliest(NamedTuple):
    """A distribution softmax(logits / τ) by its k likeliest tokens.

    Attributes:
        ids: int32 or int64 [..., k], the tokens, different ones.
        log_p: [..., k], their log probabilities; of any floating dtype.
        log_rest: fp32 [...], the log probability that it is none of them; `NEVER` where it is 0.
    """

    ids: Tensor
    log_p: Tensor
    log_rest: Tensor


NEVER = -1e4
"""Log probability of what has none: finite, so that 0 · log 0 is 0."""


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
    """What sums over targets are to be divided by: their number, or the sum of their weights.

    Args:
        labels: int64 [B, T], -100 where there is no target; nothing predicts the first token of a row.
        weights: of the positions that predict, [T], as in :func:`token_losses`.
    """
    targets = labels[:, 1:] != IGNORE
    return float(targets.sum() if weights is None else (targets * weights[:-1]).sum())


def token_losses(
    logits: Tensor | Deferred,
    labels: Tensor,
    source: Tensor | Likeliest | Deferred | None = None,
    *,
    lm: float = 1.0,
    kl: float = 0.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Losses:
    """Next-token and distillation losses of one micro batch, in fp32 whatever the dtype of the logits.

    The gradient is computed together with the losses, a few tokens at a time, so no [T, V] array in fp32 ever exists.
    It is written over the logits ``source``, whose content is lost: a source costs one such array more, not three.
    Of deferred logits only a piece exists at a time, of the student's and of the source's.

    Args:
        logits: of the student, [B, T, V], any floating dtype; there, or deferred.
        labels: token ids int64 [B, T], -100 where there is nothing to learn.
        source: logits of the source, like ``logits`` and without a gradient, or its likeliest tokens [B, T, k] at the
            same temperature. Needed where ``kl`` is not 0. Deferred where ``logits`` are, or likeliest.
        lm: weight of the next-token loss.
        kl: weight of the distillation loss.
        temperature: τ.
        weights: of the positions that predict, [T], ≥ 0: every sum is a weighted one. None: 1 each.

    Returns:
        Sums over the targets.

    Raises:
        ValueError: ``kl`` without ``source``.

    Example:
        >>> token_losses(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])).lm    # 2 targets, log 8 each
        tensor(4.1589)
    """
    if kl and source is None:
        raise ValueError("kl needs source")
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    settings = lm, kl, temperature
    if isinstance(logits, Deferred):
        given = logits.hidden, logits, targets, source, weights, settings, *logits.weights
        return Losses(*_DeferredLosses.apply(*given))  # type: ignore[misc]
    return Losses(*_TokenLosses.apply(logits, targets, source, weights, *settings))  # type: ignore[misc]


def likeliest(logits: Tensor | Deferred, k: int, temperature: float = 1.0) -> Likeliest:
    """The k likeliest tokens of a distribution.

    Their probabilities are rounded here, to fp16, which is finest near 0; `token_losses` makes them sum to 1 again.

    Args:
        logits: [..., V], of any floating dtype, or deferred; softmax is taken in fp32 at least.
        k: how many tokens.
        temperature: τ.

    Returns:
        ids int32, log_p fp16, log_rest.
    """
    if isinstance(logits, Deferred):
        starts = range(0, logits.hidden.shape[1], logits.step)
        cut: Any = (_cut(logits, slice(i, i + logits.step)) for i in starts)
        pieces = [likeliest(each, k, temperature) for each in cut]
        return Likeliest(*(torch.cat(each, 1) for each in zip(*pieces, strict=True)))
    V = logits.shape[-1]
    parts = []
    for part in logits.reshape(-1, V).split(max(1, CHUNK // V)):
        log_p = (part.to(torch.promote_types(part.dtype, torch.float32)) / temperature).log_softmax(-1)
        top, ids = log_p.topk(k)
        rest = log_p.scatter_(-1, ids, float("-inf")).logsumexp(-1).clamp(min=NEVER)
        parts.append((ids.int(), top.clamp(min=NEVER).half(), rest))
    ids, log_p, rest = (torch.cat(each) for each in zip(*parts, strict=True))
    shape = logits.shape[:-1]
    return Likeliest(ids.view(*shape, k), log_p.view(*shape, k), rest.view(shape))


def _spread(known: Likeliest, log_q: Tensor) -> Tensor:
    """log p̃ [N, V] of known tokens [N, k], beside the student's log q [N, V]."""
    ids = known.ids.long()
    log_p = torch.cat([known.log_p.to(log_q.dtype), known.log_rest.to(log_q.dtype).unsqueeze(-1)], -1).log_softmax(-1)
    rest = log_q.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return (log_q + (log_p[:, -1:] - rest)).scatter_(-1, ids, log_p[:, :-1])


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, source: Tensor | Likeliest | None, weights: Tensor | None,
        lm: float, kl: float, temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        V, rows = logits.shape[-1], len(targets)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        student, targets = logits.reshape(-1, V), targets.flatten()
        counts = (targets != IGNORE).to(dtype)
        if weights is not None:
            counts = counts * weights.to(counts).repeat(rows)
        if isinstance(source, Likeliest):
            source = Likeliest(*(x.flatten(0, 1) for x in source))
        elif source is not None:
            source = source.reshape(-1, V)
        gradient: Tensor | None = None
        if ctx.needs_input_grad[0]:
            if isinstance(source, Tensor) and source.dtype == student.dtype:
                gradient = source
            else:
                gradient = torch.empty_like(student)
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
            if kl and source is not None:
                if temperature != 1:
                    log_q = (s / temperature).log_softmax(-1)
                if isinstance(source, Likeliest):
                    log_p = _spread(Likeliest(*(x[part] for x in source)), log_q)
                else:
                    t = source[part].to(dtype)
                    log_p = (t if temperature == 1 else t / temperature).log_softmax(-1)
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


class _DeferredLosses(torch.autograd.Function):
    """`_TokenLosses` of one piece of positions after the other: each piece's logits live while it is at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, logits: Deferred, targets: Tensor, source: Likeliest | Deferred | None,
        weights: Tensor | None, settings: tuple[float, float, float], *trained: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        wanted = [index for index in (0, *range(6, 6 + len(trained))) if ctx.needs_input_grad[index]]
        gradient = torch.empty_like(hidden)
        others = [torch.zeros_like(weight) for weight in trained]
        sums: list[Tensor] = []
        for start in range(0, hidden.shape[1], logits.step):
            part = slice(start, start + logits.step)
            piece = hidden[:, part].detach().requires_grad_(0 in wanted)
            with torch.set_grad_enabled(bool(wanted)):
                beside = None if weights is None else weights[part]
                found = _TokenLosses.apply(
                    logits.head(piece), targets[:, part], _cut(source, part), beside, *settings
                )  # fmt: skip
            sums.append(torch.stack([each.detach() for each in found]))  # type: ignore[union-attr]
            if wanted:
                inputs = [piece, *trained]
                made = torch.autograd.grad(found[0], inputs, allow_unused=True)  # type: ignore[index]
                gradient[:, part] = made[0]
                for total, own in zip(others, made[1:], strict=True):
                    if own is not None:
                        total += own
        ctx.gradients = [gradient, *others] if wanted else None
        total, lm, kl = torch.stack(sums).sum(0)
        ctx.mark_non_differentiable(lm, kl)
        return total, lm, kl

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None  # as above
        first, *others = (gradient.mul_(outputs[0].to(gradient.dtype)) for gradient in gradients)
        return first, *[None] * 5, *others


def _cut(source: Likeliest | Deferred | None, part: slice) -> Tensor | Likeliest | None:
    """What the source says of some positions."""
    if isinstance(source, Deferred):
        with torch.no_grad():
            return source.head(source.hidden[:, part])
    return None if source is None else Likeliest(*(x[:, part] for x in source))
