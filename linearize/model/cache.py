"""The cache of one linearized layer: sinks, a ring of the last W tokens, and the recurrent state.

Its size never grows, but for heads that stay softmax (softmax_heads.py), where there are some.

Slots lie in one buffer of s + W: slot t holds token t for t < s; token t ≥ s lies in slot s + (t − s) mod W. A token
that is overwritten is exactly the one that leaves the window, so it is read there, once, to enter the memory. Every row
counts its own real tokens, so rows of very different length share a batch. All updates are in place on tensors of fixed
address.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .ops.rows import Rows
from .transformers_api import CacheLayerMixin, LinearAttentionCacheLayerMixin, StaticLayer, new_layer


class LinearizedCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """A transformers cache layer that `Cache` objects of any kind accept.

    Args:
        window: W ≥ 1 slots of the ring (0 for a mixer without a window).
        sinks: s slots of the first tokens.
        static: whether lengths are reported as tensors, as transformers' static layers do (no recompilation per step).

    Attributes:
        grown: [B, heads, N, width], all tokens of heads that stay softmax, token t of a row in slot t; None without
            such heads. The one part that grows.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, window: int, sinks: int, static: bool = False):
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=0)
        self.window, self.sinks, self.static = window, sinks, static
        self.tensors: dict[str, Tensor] = {}
        self.grown: Tensor | None = None
        self.stack: Stack | None = None
        self.is_initialized = False
        self._length: int | Tensor = 0

    def lazy_initialization(self, batch: int, like: Tensor, token_shape: tuple[int, int], state: tuple[Tensor, ...]):
        """Allocate everything once.

        Args:
            batch: rows B.
            like: a tensor whose dtype and device the slots take.
            token_shape: (heads, width) of what is kept per token, in slots [B, heads, s + W, width].
            state: fp32 tensors [B, ...], the empty recurrent state, taken as they are.
        """
        self.dtype, self.device = like.dtype, like.device
        heads, width = token_shape
        self.tensors = {"tokens": like.new_zeros(batch, heads, self.sinks + self.window, width)}
        self.state_names = [f"state_{i}" for i in range(len(state))]
        self.tensors |= dict(zip(self.state_names, state, strict=True))
        self.tensors["count"] = torch.zeros(batch, dtype=torch.int64, device=like.device)
        if self.static:
            self._length = torch.zeros((), dtype=torch.int64, device=like.device)
        if not torch.compiler.is_compiling():
            for x in self.tensors.values():
                torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    @property
    def is_croppable(self) -> bool:
        """Never: the recurrent state cannot forget a token."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Only beside static layers: transformers then makes masks that fit their fixed length."""
        return self.static

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The recurrent state, in the order the mixer gave it."""
        return tuple(self.tensors[n] for n in self.state_names)

    def nbytes(self) -> int:
        """Bytes held now; constant from the first token on, but for heads that stay softmax."""
        return sum(x.nbytes for x in self.tensors.values()) + (0 if self.grown is None else self.grown.nbytes)

    # --- reading and writing slots

    def slot_of_next(self, t: Tensor) -> Tensor:
        """The slot that the next token of a row with t tokens takes, both of any shape."""
        if self.window == 0:
            return t.clamp(max=self.sinks - 1)
        return torch.where(t < self.sinks, t, self.sinks + (t - self.sinks).remainder(self.window))

    def filled(self) -> Tensor:
        """[B, s + W] bool: which slots hold a token once the next one is there."""
        return torch.arange(self.sinks + self.window, device=self.device) <= self.tensors["count"][:, None]

    def in_order(self) -> Tensor:
        """The W tokens before the next one, oldest first.

        Returns:
            [B, heads, W, width]; rows with fewer tokens hold zeros or sinks in the first ones.
        """
        x = self.tensors["tokens"]
        token = self.tensors["count"][:, None] - self.window + torch.arange(self.window, device=x.device)
        slot = self.sinks + (token - self.sinks).remainder(self.window)
        return x.gather(2, slot[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def extend(self, new: Tensor, lengths: Tensor) -> None:
        """Put a block of tokens into the slots; `advance` counts them later.

        Args:
            new: [B, heads, T, width].
            lengths: int64 [B], how many tokens of each row are real; they come first.
        """
        slot = torch.arange(self.sinks + self.window, device=self.device)
        count = self.tensors["count"][:, None]
        after = count + lengths[:, None]
        # The newest token that belongs in each slot, or one before the block where the slot stays as it is.
        ring = after - 1 - (after - 1 - slot).remainder(max(self.window, 1))
        token = torch.where(slot < self.sinks, slot, ring)
        take = (token >= count) & (token < after) & ((slot < self.sinks) | (token >= self.sinks))
        source = (token - count).clamp(min=0, max=new.shape[2] - 1)
        old = self.tensors["tokens"]
        index = source[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
        old.copy_(torch.where(take[:, None, :, None], new.detach().gather(2, index).to(old.dtype), old))

    def grow(self, new: Tensor) -> Tensor:
        """Append a block of tokens for heads that stay softmax; `advance` counts them later.

        Args:
            new: [B, heads, T, width].

        Returns:
            All slots [B, heads, N + T, width]. Those of a row behind its tokens hold anything: the next block's first
            token replaces this one's padding.
        """
        x = new
        if self.grown is not None:
            x = torch.cat([self.grown, torch.zeros_like(new)], 2)
            slot = self.tensors["count"][:, None] + torch.arange(new.shape[2], device=new.device)
            x.scatter_(2, slot[:, None, :, None].expand_as(new), new)
        self.grown = x.detach()
        return x

    def check_start(self, rows: Rows | None) -> None:
        """Refuse packed documents behind other tokens, with a ValueError: they become rows of their own."""
        if rows is not None and rows.packed and self.is_initialized:
            raise ValueError("packed documents can only start an empty cache")

    def advance(self, lengths: Tensor | int, tokens: int) -> None:
        """Count new tokens.

        Args:
            lengths: int64 [B] or one number, real tokens of each row.
            tokens: positions of the batch, padding included.
        """
        self.tensors["count"] += lengths
        self._length += tokens

    # --- the contract of transformers

    def update(self, *args: Any, **kwargs: Any):
        """Refuse it: always a RuntimeError."""
        raise RuntimeError("a linearized layer's cache is written by its mixer; Cache.update has no meaning here")

    update_conv_state = update_recurrent_state = update

    def get_seq_length(self) -> int | Tensor:
        """Positions seen, padding included, as for every other layer."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is needed: sizes for which transformers builds none."""
        return query_length, 0

    def get_max_length(self) -> int:
        """-1: any number of tokens."""
        return -1

    def reset(self) -> None:
        """Forget all tokens; the slots stay allocated."""
        for x in self.tensors.values():
            x.zero_()
        self.grown = None
        self._length = self._length * 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget the last tokens: a RuntimeError, unless there are 0."""
        if tokens_to_remove != 0:
            raise RuntimeError(
                "a linearized cache cannot be cropped: its recurrent state cannot forget single tokens; "
                "use generation without assisted decoding"
            )

    def activate_past_recording(self) -> None:
        """Refuse it: always a RuntimeError."""
        raise RuntimeError("a linearized cache cannot be rolled back, so assisted decoding is not possible")

    def _map(self, f) -> None:
        self.tensors = {n: f(x) for n, x in self.tensors.items()}
        self.grown = None if self.grown is None else f(self.grown)
        self.stack = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row `beam_idx[b]`, int64 [B], as row b."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, int64."""
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        """Move all tensors to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move all tensors back to their device."""
        if self.is_initialized:
            self._map(lambda x: x.to(self.device, non_blocking=True))


class Stack:
    """The tensors of alike layers, joined along the batch: what all of them do at the same time is one operation.

    Each layer keeps its own rows as views.

    Args:
        layers: initialized, of equal shapes, dtype and device.

    Attributes:
        tensors: as of a layer, [L·B, ...] each.
    """

    def __init__(self, layers: list[LinearizedCacheLayer]):
        self.layers = layers
        self.tensors = layers[0].tensors
        if len(layers) > 1:
            self.tensors = {n: torch.cat([layer.tensors[n] for layer in layers]) for n in layers[0].tensors}
            views = ({n: x.chunk(len(layers)) for n, x in self.tensors.items()}).items()
            for i, layer in enumerate(layers):
                layer.tensors = {n: parts[i] for n, parts in views}
        for layer in layers:
            layer.stack = self

    @classmethod
    def of(cls, layers: list[LinearizedCacheLayer]) -> "Stack":
        """The stack of exactly these layers, made anew where one has left it."""
        stack = layers[0].stack
        same = stack is not None and stack.layers == layers and all(layer.stack is stack for layer in layers)
        return stack if stack is not None and same else cls(layers)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The recurrent states, [L·B, ...] each, in the order the mixer gave them."""
        return tuple(self.tensors[n] for n in self.layers[0].state_names)

    def advance(self) -> None:
        """Count one token per row, in every layer."""
        self.tensors["count"] += 1
        for layer in self.layers:
            layer._length += 1


def cache_layer(cache: Cache, layer_idx: int, window: int, sinks: int, grows: bool = False) -> LinearizedCacheLayer:
    """The linearized layer of any Cache, put there on first use.

    Args:
        cache: of transformers, of any kind.
        layer_idx: the layer's index in it.
        window: of a new layer, see `LinearizedCacheLayer`.
        sinks: of a new layer.
        grows: whether there are heads that stay softmax.

    Raises:
        RuntimeError: the layer there holds tokens already, or has a fixed size and must grow.
    """
    while len(cache.layers) <= layer_idx:
        cache.layers.append(new_layer(cache))
    layer: Any = cache.layers[layer_idx]
    if not isinstance(layer, LinearizedCacheLayer):
        if layer.get_seq_length():
            raise RuntimeError(
                f"layer {layer_idx} of this cache was filled by softmax attention; start with an empty cache"
            )
        layer = cache.layers[layer_idx] = LinearizedCacheLayer(window, sinks, isinstance(layer, StaticLayer))
    if grows and layer.static:
        raise RuntimeError(
            f"layer {layer_idx} has heads that stay softmax, whose cache grows with the text, so a static cache cannot "
            "hold it; use a dynamic cache"
        )
    return layer
