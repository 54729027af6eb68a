"""The state of a request as one page of a server's cache, and one step of many requests over their pages.

A page of a layer holds the recurrent state and the slots of sinks and ring (model/cache.py), nothing that grows. How
many tokens a request has is known to the server and not kept. The pages of the scheduled requests are gathered into a
cache layer, the mixer's own code runs on it, and what has changed goes back: no maths is here. No server is imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..model.cache import LinearizedCacheLayer
from ..model.mixers import Context, Mixer

Pages = Sequence[Tensor]
"""One layer's parts of all pages, as `layout` has them: [pages, ...] each, of any stride between pages."""


def layout(mixer: Mixer, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part of a page, in this order: the recurrent state as caches keep it, and the slots.

    Args:
        mixer: of the layer.
        dtype: of keys and values.
    """
    parts = [(tuple(x.shape[1:]), x.dtype) for x in mixer.stored_state(1, torch.device("meta"))]
    heads, width = mixer.token_shape
    return [*parts, ((heads, mixer.sinks + mixer.window, width), dtype)] if width else parts


def page_bytes(parts: list[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes of a page of this `layout`."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in parts)


@dataclass(frozen=True)
class Piece:
    """Tokens of one request that are read at once.

    Attributes:
        tokens: where they lie among the tokens of the step.
        page: int64 [1].
        seen: int64 [1], tokens of the request before these.
        before: the same as a number; 0: the page holds what another request left.
    """

    tokens: slice
    page: Tensor
    seen: Tensor
    before: int


@dataclass(frozen=True)
class Schedule:
    """Which tokens of a step belong to which request.

    Attributes:
        decoding: where the tokens of requests with one new token lie among those of the step: a slice, or int64 [D].
        pages: int64 [D], of these requests.
        seen: int64 [D], tokens of these requests before the new one.
        pieces: of the other requests.
    """

    decoding: slice | Tensor
    pages: Tensor
    seen: Tensor
    pieces: list[Piece]

    @classmethod
    def of(cls, lengths: Sequence[int], seen: Sequence[int], pages: Tensor) -> "Schedule":
        """From numbers that the CPU knows; nothing waits for the device.

        Args:
            lengths: new tokens of each request, which lie one request after the other.
            seen: tokens of each request before these.
            pages: [requests], of any integer dtype, on the device of the layers.
        """
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        rows = [r for r, length in enumerate(lengths) if length == 1 and seen[r]]
        others = [r for r, length in enumerate(lengths) if length > 1 or length == 1 and not seen[r]]
        pages = pages.long()
        numbers = torch.tensor([seen, starts[:-1]], dtype=torch.int64).view(2, -1)
        if pages.is_cuda:
            numbers = numbers.pin_memory()
        before, first = numbers.to(pages.device, non_blocking=True)
        pieces = [Piece(slice(starts[r], starts[r + 1]), pages[r : r + 1], before[r : r + 1], seen[r]) for r in others]
        if rows == list(range(len(rows))):  # servers sort them so
            return cls(slice(0, len(rows)), pages[: len(rows)], before[: len(rows)], pieces)
        index = torch.tensor(rows, dtype=torch.int64)
        index = (index.pin_memory() if pages.is_cuda else index).to(pages.device, non_blocking=True)
        return cls(first[index], pages[index], before[index], pieces)


def gather(mixer: Mixer, pages: Pages, index: Tensor, seen: Tensor, most: int = 0) -> LinearizedCacheLayer:
    """A cache layer with copies of some pages.

    Args:
        mixer: of the layer.
        pages: of all requests.
        index: int64 [B], which.
        seen: int64 [B], tokens of each request.
        most: tokens of the longest; needed to read several at once.
    """
    layer = LinearizedCacheLayer(mixer.window, mixer.sinks, late=mixer.late)
    parts = [x.index_select(0, index) for x in pages]
    heads, width = mixer.token_shape
    tokens = parts.pop() if width else parts[0].new_zeros(len(index), heads, layer.slots, 0)
    layer.state_names = [f"state_{i}" for i in range(len(parts))]
    layer.tensors = {"tokens": tokens, **dict(zip(layer.state_names, parts, strict=True)), "count": seen.clone()}
    layer.dtype, layer.device, layer.is_initialized, layer._length = tokens.dtype, tokens.device, True, most
    return layer


def scatter(pages: Pages, index: Tensor, layer: LinearizedCacheLayer) -> None:
    """Write what `gather` gave back into the pages; arguments as there."""
    parts = [*layer.state, layer.tensors["tokens"]][: len(pages)]
    for page, part in zip(pages, parts, strict=True):
        page.index_copy_(0, index, part)


def run(
    mixer: Mixer, pages: Pages, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule,
    context: Callable[[Any, Tensor], Context],
) -> Tensor:  # fmt: skip
    """What attention would return for the tokens of a step; the pages then hold them too.

    Args:
        mixer: of the layer.
        pages: of all requests.
        q: [N, H, K], N tokens or more, as the source's code made them.
        k: [N, G, K].
        v: [N, G, V].
        schedule: of the step.
        context: a cache, and the positions [B, T] of its new tokens in their requests -> what the mixer is called with.

    Returns:
        y [N, H, V]; that of tokens which no request has is 0.
    """
    y = q.new_zeros(*q.shape[:2], v.shape[-1])

    def attend(tokens: slice | Tensor, index: Tensor, seen: Tensor, layer: LinearizedCacheLayer) -> None:
        parts = [x[tokens].unflatten(0, (len(index), -1)).transpose(1, 2) for x in (q, k, v)]
        positions = seen[:, None] + torch.arange(parts[0].shape[2], device=seen.device)
        called = context(SimpleNamespace(layers=[layer]), positions)
        y[tokens] = mixer(*parts, called).transpose(1, 2).flatten(0, 1)
        scatter(pages, index, layer)

    index, seen = schedule.pages, schedule.seen
    if len(index):
        attend(schedule.decoding, index, seen, gather(mixer, pages, index, seen))
    for piece in schedule.pieces:
        layer = LinearizedCacheLayer(mixer.window, mixer.sinks, late=mixer.late)
        if piece.before:
            layer = gather(mixer, pages, piece.page, piece.seen, piece.before)
        attend(piece.tokens, piece.page, piece.seen, layer)
    return y
