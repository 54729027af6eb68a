"""Padded and packed batches as left-aligned rows of real tokens.

A recurrence, a ring and "the first s tokens" are simple on a row that starts at its first real token and has its
padding at the end: causality hides the padding from every real query. So left padding, right padding, holes and packed
documents all become rows once per forward pass, and no mixer knows any of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from .. import host

_NOT_ROWS = (
    "attention_mask: a mask of four dimensions is honoured where each token sees all tokens before it in its own "
    "document and no others, the same in every head; this one asks for something else, which a recurrence cannot do. "
    "Give a padding mask [batch, tokens], or position_ids that restart at every document"
)


@dataclass
class Rows:
    """How B×T token positions map to R rows of L tokens: R = B for padding, one row per document for packing.

    Attributes:
        index: [R, L] int64, flat position b·T + t of each row's token (0 where there is none).
        valid: [R, L] bool, True at real tokens, left-aligned.
        back: [B, T] int64, flat row position r·L + l of each token that lies in a row (0 elsewhere).
        real: [B, T] bool, whether it does: False at padding, and where these rows are a part, at the tokens of others.
    """

    index: Tensor
    valid: Tensor
    back: Tensor
    real: Tensor

    packed: ClassVar[bool] = False
    """Whether any item of the batch holds several documents."""

    @classmethod
    def from_padding(cls, real: Tensor) -> "Rows":
        """From a mask [B, T], non-zero at real tokens."""
        real = real.bool()
        B, T = real.shape
        offset = torch.arange(B, device=real.device)[:, None] * T
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        rank = real.cumsum(1) - 1
        valid = torch.arange(T, device=real.device) < real.sum(1, keepdim=True)
        return cls(order + offset, valid, torch.where(real, rank, 0) + offset, real)

    @staticmethod
    def from_positions(position_ids: Tensor, restarts_only: bool = False) -> "Packed | None":
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
        return Packed.where_several(starts)

    @property
    def documents(self) -> int:
        """How many rows there are in all."""
        return len(self.index)

    def parts(self, cached: bool) -> "list[Rows]":
        """Rows to run one after the other; a token lies in one of them.

        Args:
            cached: whether the first part is to hold what a cache goes on from, a row for each item of the batch.
        """
        return [self]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Rows":
        """The same on another device: accelerate calls this where a model lies on several."""
        tensors = (self.index, self.valid, self.back, self.real)
        if torch.empty(0, device=device).device == self.index.device:
            return self
        return Rows(*(x.to(device, non_blocking=non_blocking) for x in tensors))

    @classmethod
    def from_mask(cls, mask: Tensor, past: int, count: Tensor | None) -> "Rows | Packed | None":
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
        if mask.shape[-1] < past + T:
            raise InputError(_NOT_ROWS)
        plain = (allowed == allowed[:, :1]).all()
        if mask.dtype != torch.bool:
            plain &= (allowed | (mask <= -1e4)).all()
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
        starts = real & (first == at)
        holds = plain & (fits | ~real).all() & real.any(1).all()
        holds, whole, texts = host.read(holds, real.all(), starts.sum())
        if not holds:
            raise InputError(_NOT_ROWS)
        if whole and texts == len(starts):
            return None
        return Packed(starts.cpu(), real.cpu(), mask.device) if count is None else cls.from_padding(real)

    def gather(self, x: Tensor) -> Tensor:
        """x [B, H, T, D], tokens as the batch has them -> [R, H, L, D], as the rows have them."""
        return x.transpose(1, 2).flatten(0, 1)[self.index].transpose(1, 2)

    def scatter(self, y: Tensor) -> Tensor:
        """y [R, H, L, D] -> [B, H, T, D], zero at padding."""
        y = y.transpose(1, 2).flatten(0, 1)[self.back]
        return (y * self.real[:, :, None, None]).transpose(1, 2)


class Packed:
    """Documents of which several lie in one item of a batch. Rows of like length run together, so that each costs its
    own length and not that of the longest.

    Args:
        starts: [B, T] bool, where documents start, on the CPU, as all that is computed here.
        real: [B, T] bool, which tokens are real; every document has a real start.
        device: of the rows.

    Attributes:
        real: the same, on the device.
    """

    def __init__(self, starts: Tensor, real: Tensor, device: torch.device):
        self.shape, self.device, self.real = starts.shape, device, real.to(device)
        document = starts.flatten().cumsum(0) - 1
        self.token = real.flatten().nonzero().flatten()
        self.lengths = document[self.token].bincount(minlength=int(starts.sum()))
        self.last = document.view(starts.shape)[:, -1]
        self._parts: dict[bool, list[Rows]] = {}
        self._moved: dict[torch.device, Packed] = {device: self}

    @classmethod
    def where_several(cls, starts: Tensor) -> "Packed | None":
        """Of starts [B, T] bool, on any device, where all tokens are real; None where no item holds several."""
        there = starts.cpu()
        return cls(there, torch.ones_like(there), starts.device) if bool(there[:, 1:].any()) else None

    @property
    def packed(self) -> bool:
        """Whether any item of the batch holds several documents."""
        return len(self.lengths) > len(self.last)

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.lengths)

    def parts(self, cached: bool) -> list[Rows]:
        """As of `Rows`: the last document of each item first, if it goes into a cache, and the others by length."""
        if cached not in self._parts:
            rest = torch.arange(self.documents)
            first = [self.last] if cached else []
            groups = self._alike(rest[~torch.isin(rest, self.last)] if cached else rest)
            self._parts[cached] = [self._rows(each) for each in (*first, *groups)]
        return self._parts[cached]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Packed":
        """As of `Rows`."""
        device = torch.empty(0, device=device).device
        if device not in self._moved:
            moved = self._moved[device] = copy.copy(self)
            moved.device, moved._parts, moved.real = device, {}, self.real.to(device, non_blocking=non_blocking)
        return self._moved[device]

    def _alike(self, documents: Tensor) -> list[Tensor]:
        """Documents, int64 [n], in groups of which padding makes a third at most, the longest first."""
        groups: list[list[int]] = []
        longest = tokens = 0
        order = self.lengths[documents].argsort(descending=True, stable=True)
        for document, length in zip(documents[order].tolist(), self.lengths[documents][order].tolist(), strict=True):
            if not groups or (len(groups[-1]) + 1) * longest > 1.5 * (tokens + length):
                groups.append([])
                longest, tokens = length, 0
            groups[-1].append(document)
            tokens += length
        return [torch.tensor(sorted(group)) for group in groups]

    def _rows(self, documents: Tensor) -> Rows:
        lengths, first = self.lengths[documents], (self.lengths.cumsum(0) - self.lengths)[documents]
        within = torch.arange(int(lengths.max()))
        valid = within < lengths[:, None]
        index = torch.where(valid, self.token[(first[:, None] + within).clamp(max=len(self.token) - 1)], 0)
        back = torch.zeros(self.shape.numel(), dtype=torch.int64)
        real = torch.zeros_like(back, dtype=torch.bool)
        back[index[valid]], real[index[valid]] = valid.flatten().nonzero().flatten(), True
        tensors = index, valid, back.view(self.shape), real.view(self.shape)
        return Rows(*(x.to(self.device) for x in tensors))


def in_parts(rows: Rows | Packed | None, layer: Any, run: Callable[[Rows | None, Any], Tensor]) -> Tensor:
    """What `run` gives for all tokens of a batch, [B, H, T, D].

    Args:
        rows: of the batch; None: it is rows of real tokens as it is.
        layer: of the cache, or None.
        run: from rows, or None, and the layer, or None for rows that it does not hold, to outputs as the batch has
            them, zero where no row has the token.
    """
    if rows is None:
        return run(None, layer)
    first, *rest = rows.parts(layer is not None)
    y = run(first, layer)
    for part in rest:
        y = y + run(part, None)
    return y
