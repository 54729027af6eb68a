"""What one forward pass of a layer is made of: its surroundings, its tokens, and what its two branches give."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from .decoding import Step
from .ops.rows import Packed, Rows


@dataclass
class Context:
    """What the surroundings know about one call.

    Attributes:
        layer_idx: the layer's index in the cache.
        scaling: the source's, of scores q·k.
        softcap: the source's, or None.
        extra: the source's logits without a value [H], or None.
        unrotate: queries or keys -> the same before RoPE, fp32.
        rows: left-aligned view of a padded or packed batch, or None.
        cache: the Cache to continue and update, or None.
        branch: all | window (without the memory) | memory (without the window).
        attend: the source's own attention over (q, k, v), for the control; y [B, H, T, V].
        taken: tokens that the state of a row holds at most before those of a `scan`.
        whole: whether every token of a `scan` exists and every row's state holds exactly `taken`.
        steps: layer index -> the decoding step it shares with other layers, and its index among them.
    """

    layer_idx: int
    scaling: float
    softcap: float | None
    extra: Tensor | None
    unrotate: Callable[[Tensor], Tensor]
    rows: Rows | Packed | None
    cache: Cache | None
    branch: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    taken: int | None = None
    whole: bool = False
    steps: dict[int, tuple[Step, int]] = field(default_factory=dict)


class Branch(NamedTuple):
    """What the window or the recurrence alone gives.

    Attributes:
        y: [B, H, T, V].
        log_weight: [B, H, T] fp32, the log of the sum of its weights, by which it shares one softmax with the other
            branch: the window's log-sum-exp; None where it shares none.
    """

    y: Tensor
    log_weight: Tensor | None

    def placed(self, wait: int, skip: int) -> "Branch":
        """Without the first `wait` tokens, behind `skip` that read nothing."""
        y, weight = self.y[:, :, wait:], None if self.log_weight is None else self.log_weight[:, :, wait:]
        if skip:
            y = F.pad(y, (0, 0, skip, 0))
            weight = None if weight is None else F.pad(weight, (skip, 0), value=float("-inf"))
        return Branch(y, weight)

    def joined(self, other: "Branch") -> "Branch":
        """One softmax over both, (e^w y + e^w' y') / (e^w + e^w'), in the other's dtype; both have log weights."""
        if self.log_weight is None or other.log_weight is None:
            raise ValueError("a branch without a log weight shares no softmax")
        share = (other.log_weight - self.log_weight).sigmoid()
        y = torch.lerp(self.y.to(other.y.dtype), other.y, share.unsqueeze(-1))
        return Branch(y, torch.logaddexp(self.log_weight, other.log_weight))


class Pass(NamedTuple):
    """The tokens of one forward pass, as rows that start at their first real token.

    Attributes:
        q: [B, H, T, K].
        query: of `Mixer.query`, [B, H, T, ·].
        x: of `Tokens`, [B, G, T, ·].
        real: [B, T] bool, or None where all are.
        lengths: int64 [B], real tokens.
    """

    q: Tensor
    query: Tensor
    x: Tensor
    real: Tensor | None
    lengths: Tensor

    def parted(self, last: int) -> "tuple[Pass, Pass, Callable[[Tensor, Tensor], Tensor]]":
        """All but the last so many tokens of each row, those, and what puts their outputs together again; for a pass
        of more tokens than that."""
        first = (self.lengths - last).clamp(min=0)
        n = self.q.shape[2] - last  # no row has more, and what a row does not have does not exist
        index = first[:, None] + torch.arange(last, device=first.device)

        def take(x: Tensor) -> Tensor:
            return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        before, behind = None, None
        if self.real is not None:
            before = torch.arange(n, device=first.device) < first[:, None]
            behind = self.real.gather(1, index)

        def put_together(y: Tensor, z: Tensor) -> Tensor:
            whole = F.pad(y, (0, 0, 0, self.q.shape[2] - n))
            return whole.scatter(2, index[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[3]), z)

        head = Pass(self.q[:, :, :n], self.query[:, :, :n], self.x[:, :, :n], before, first)
        rest = Pass(take(self.q), take(self.query), take(self.x), behind, self.lengths - first)
        return head, rest, put_together
