"""Padded and packed batches as left-aligned rows of real tokens.

A recurrence, a ring and "the first s tokens" are simple on a row that starts at its first real token and has its
padding at the end: causality hides the padding from every real query. So left padding, right padding, holes and packed
documents all become rows once per forward pass, and no mixer knows any of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError

_NOT_ROWS = (
    "attention_mask: a mask of four dimensions is honoured where each token sees all tokens before it in its own "
    "document and no others, the same in every head; this one asks for something else, which a recurrence cannot do. "
    "Give a padding mask [batch, tokens], or position_ids that restart at every document"
)


@dataclass
class Rows:
    """How B×T token positions map to R rows of L: R = B for padding, one row per document for packing.

    Attributes:
        index: [R, L] int64, flat position b·T + t of each row's token (0 where there is none).
        valid: [R, L] bool, True at real tokens, left-aligned.
        back: [B, T] int64, flat row position r·L + l of each token (0 at padding).
        real: [B, T] bool, False at padding.
        last: [B] int64, the row in which each batch item ends.
        packed: whether any item holds several documents.
    """

    index: Tensor
    valid: Tensor
    back: Tensor
    real: Tensor
    last: Tensor
    packed: bool

    @classmethod
    def from_padding(cls, real: Tensor) -> "Rows":
        """From a mask [B, T], non-zero at real tokens."""
        real = real.bool()
        B, T = real.shape
        offset = torch.arange(B, device=real.device)[:, None] * T
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        rank = real.cumsum(1) - 1
        valid = torch.arange(T, device=real.device) < real.sum(1, keepdim=True)
        back = torch.where(real, rank, 0) + offset
        return cls(order + offset, valid, back, real, torch.arange(B, device=real.device), False)

    @classmethod
    def from_positions(cls, position_ids: Tensor, restarts_only: bool = False) -> "Rows | None":
        """From position ids that restart at every document.

        Args:
            position_ids: [B, T].
            restarts_only: whether any other jump than to 0 is none. transformers takes each for a new document, but
                only where there is no cache.

        Returns:
            None where there is one document in each row.
        """
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if restarts_only:
            starts[:, 1:] &= position_ids[:, 1:] == 0
        return None if int(starts.sum()) == len(starts) else cls._from_starts(starts, torch.ones_like(starts))

    @classmethod
    def _from_starts(cls, starts: Tensor, real: Tensor) -> "Rows":
        """From where documents start and which tokens are real, both [B, T] bool; every document has a real start."""
        (B, T), device = starts.shape, starts.device
        row = (starts.flatten().cumsum(0) - 1).clamp(min=0)
        rank = real.flatten().cumsum(0) - 1
        within = rank - rank[starts.flatten()][row]
        token = real.flatten().nonzero().flatten()
        shape = (int(starts.sum()), int(within.max()) + 1)
        index = torch.zeros(shape, dtype=torch.int64, device=device)
        valid = torch.zeros(shape, dtype=torch.bool, device=device)
        index[row[token], within[token]] = token
        valid[row[token], within[token]] = True
        back = torch.where(real, (row * shape[1] + within).view(B, T), 0)
        return cls(index, valid, back, real, row.view(B, T)[:, -1], bool((starts.sum(1) > 1).any()))

    @classmethod
    def from_mask(cls, mask: Tensor, past: int, count: Tensor | None) -> "Rows | None":
        """From a mask of four dimensions: padding, and documents of which none sees another.

        Args:
            mask: [B, 1 or heads, T, past + T or more, or T], bool, or added to the scores: 0 or about minus infinity.
            past: positions in the cache before these.
            count: int64 [B], how many of them are real; None where there are none.

        Returns:
            None where all tokens are real and in one document.

        Raises:
            InputError: it lets tokens see more, or less, than those before them in their document.
        """
        T = mask.shape[2]
        if mask.shape[-1] == T:  # nothing is said of those before
            past, count = 0, None if count is None else torch.zeros_like(count)
        allowed = mask if mask.dtype == torch.bool else mask == 0
        plain = mask.dtype == torch.bool or bool((allowed | (mask <= -1e4)).all())
        if not plain or mask.shape[-1] < past + T or not bool((allowed == allowed[:, :1]).all()):
            raise InputError(_NOT_ROWS)
        old, new, rest = allowed[:, 0].split([past, T, mask.shape[-1] - past - T], -1)
        at = torch.arange(T, device=mask.device)
        # A row of padding sees nothing, or, where that would divide by zero, everything.
        real = new.diagonal(dim1=1, dim2=2) & ~(new & (at[:, None] < at)).any(-1)
        first = new.to(torch.uint8).argmax(-1)  # [B, T], the first token that each one sees
        before = torch.where(real, at, -1).cummax(1).values.roll(1, 1)
        before[:, 0] = -1
        same = (before >= 0) & (first.gather(1, before.clamp(min=0)) == first)
        expected = real[:, None] & (first[..., None] <= at) & (at <= at[:, None])
        fits = (same | (first == at)) & (new == expected).all(-1) & ~rest.any(-1)
        if count is not None:
            fits &= (same | (before < 0)) & (old.sum(-1) == count[:, None])
        if not bool((fits | ~real).all()) or not bool(real.any(1).all()):
            raise InputError(_NOT_ROWS)
        starts = real & (first == at)
        if bool(real.all()) and int(starts.sum()) == len(starts):
            return None
        return cls._from_starts(starts, real) if count is None else cls.from_padding(real)

    def gather(self, x: Tensor) -> Tensor:
        """x [B, H, T, D], tokens as the batch has them -> [R, H, L, D], as the rows have them."""
        return x.transpose(1, 2).flatten(0, 1)[self.index].transpose(1, 2)

    def scatter(self, y: Tensor) -> Tensor:
        """y [R, H, L, D] -> [B, H, T, D], zero at padding."""
        y = y.transpose(1, 2).flatten(0, 1)[self.back]
        return (y * self.real[:, :, None, None]).transpose(1, 2)
