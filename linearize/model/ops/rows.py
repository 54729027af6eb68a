"""Padded and packed batches as left-aligned rows of real tokens.

A recurrence, a ring and "the first s tokens" are simple on a row that starts at its first real token and has its
padding at the end: causality hides the padding from every real query. So left padding, right padding, holes and packed
documents all become rows once per forward pass, and no mixer knows any of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    def from_positions(cls, position_ids: Tensor) -> "Rows | None":
        """From position ids [B, T] that restart at every document; None when none restarts."""
        B, T = position_ids.shape
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if int(starts.sum()) == B:
            return None
        row = starts.flatten().cumsum(0) - 1
        first = starts.flatten().nonzero().flatten()
        within = torch.arange(B * T, device=row.device) - first[row]
        length = int(within.max()) + 1
        back = row * length + within
        index = back.new_zeros(len(first) * length)
        valid = torch.zeros_like(index, dtype=torch.bool)
        index[back] = torch.arange(B * T, device=row.device)
        valid[back] = True
        shape = (len(first), length)
        return cls(
            index.view(shape), valid.view(shape), back.view(B, T), torch.ones_like(starts), row.view(B, T)[:, -1], True
        )

    def gather(self, x: Tensor) -> Tensor:
        """x [B, H, T, D], tokens as the batch has them -> [R, H, L, D], as the rows have them."""
        return x.transpose(1, 2).flatten(0, 1)[self.index].transpose(1, 2)

    def scatter(self, y: Tensor) -> Tensor:
        """y [R, H, L, D] -> [B, H, T, D], zero at padding."""
        y = y.transpose(1, 2).flatten(0, 1)[self.back]
        return (y * self.real[:, :, None, None]).transpose(1, 2)
