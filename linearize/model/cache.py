"""The cache of one linearized layer: sinks, a ring of the last W tokens, and the recurrent state.

Its size never grows, but for heads that stay softmax (softmax_heads.py), where there are some.

Slots lie in one buffer of s + W: slot t holds token t for t < s; token t ≥ s lies in slot s + (t − s) mod W. A token
that is overwritten is exactly the one that leaves the window, so it is read there, once, to enter the memory. Every row
counts its own real tokens, so rows of very different length share a batch. All updates are in place on tensors of fixed
address.

With r more slots the last r tokens can be taken back: the ring holds W + r tokens, and the recurrent state waits. It is
the state of the first `settled` tokens of a row; the `pending` ones behind them have left the window of the next query,
but are still in the ring. A forward pass reads them as if they were in the state; they enter it when they are certain.
So `crop` moves a counter and copies nothing.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from . import host
from .ops.rows import Packed, Rows
from .transformers_api import CacheLayerMixin, LinearAttentionCacheLayerMixin, StaticLayer, new_layer

if TYPE_CHECKING:
    from .stack import Stack

ROLLBACK = 32
"""Slots that recording adds: transformers drafts 20 tokens at a time unless told otherwise."""


class LinearizedCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """A transformers cache layer that `Cache` objects of any kind accept.

    Args:
        window: W ≥ 1 slots of the ring (0 for a mixer without a window).
        sinks: s slots of the first tokens.
        static: whether lengths are reported as tensors, as transformers' static layers do (no recompilation per step).
        late: whether a token enters the recurrent state only when it leaves the window.

    Attributes:
        rollback: r, how many tokens can be taken back; 0 unless past tokens are recorded.
        record_past: as of transformers' own layers.
        waiting: what `pending` gives, where it is known.
        grown: [B, heads, N, width], all tokens of heads that stay softmax, token t of a row in slot t; None without
            such heads. The one part that grows.
    """

    # Not among `vars`, of which exporters make trees: they point at other layers.
    __slots__ = ("beside", "stack")

    is_sliding = False
    supports_early_init = False

    def __init__(self, window: int, sinks: int, static: bool = False, late: bool = True):
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=0)
        self.window, self.sinks, self.static, self.late = window, sinks, static, late
        self.rollback = 0
        self.tensors: dict[str, Tensor] = {}
        self.grown: Tensor | None = None
        self.stack: Stack | None = None  # pyright: ignore[reportAttributeAccessIssue]
        self.beside: Any = None  # pyright: ignore[reportAttributeAccessIssue]
        self.is_initialized = False
        self.waiting: int | None = 0
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
        self.tensors = {"tokens": like.new_zeros(batch, heads, self.slots, width)}
        self.state_names = [f"state_{i}" for i in range(len(state))]
        self.tensors |= dict(zip(self.state_names, state, strict=True))
        for name in ("count", "settled", "certain") if self.rollback else ("count",):
            self.tensors[name] = torch.zeros(batch, dtype=torch.int64, device=like.device)
        if self.rollback:
            self.tensors["recent"] = torch.ones(batch, self.rollback, dtype=torch.bool, device=like.device)
        if self.static:
            self._length = torch.zeros((), dtype=torch.int64, device=like.device)
        if not torch.compiler.is_compiling():
            for x in (*self.tensors.values(), self._length):
                if isinstance(x, Tensor):
                    torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back, once they are recorded."""
        return self.late and not self.static

    @property
    def ring(self) -> int:
        """Slots of the ring: W + r."""
        return self.window + self.rollback

    @property
    def slots(self) -> int:
        """All of them: s + W + r."""
        return self.sinks + self.ring

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
        if self.ring == 0:
            return t.clamp(max=self.sinks - 1)
        return torch.where(t < self.sinks, t, self.sinks + (t - self.sinks).remainder(self.ring))

    def filled(self) -> Tensor:
        """[B, s + W + r] bool: which slots hold a token that the next one sees, once it is there."""
        slot, count = torch.arange(self.slots, device=self.device), self.tensors["count"][:, None]
        if self.rollback == 0:
            return slot <= count
        token = count - (count - slot).remainder(self.ring)
        return torch.where(slot < self.sinks, slot <= count, (token >= self.sinks) & (token > count - self.window))

    def in_order(self, pending: int = 0) -> Tensor:
        """The W tokens before the next one, and `pending` before those, oldest first.

        Returns:
            [B, heads, pending + W, width]; for tokens that a row has not, or which are sinks, it holds anything finite.
        """
        back = self.window + pending
        return self.at(self.tensors["count"][:, None] - back + torch.arange(back, device=self.device))

    def at(self, token: Tensor) -> Tensor:
        """Tokens of the ring by their number in the row, int64 [B, n]: [B, heads, n, width]."""
        x, slot = self.tensors["tokens"], self.sinks + (token - self.sinks).remainder(self.ring)
        return x.gather(2, slot[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def extend(self, new: Tensor, lengths: Tensor) -> None:
        """Put a block of tokens into the slots; `advance` counts them later.

        Args:
            new: [B, heads, T, width].
            lengths: int64 [B], how many tokens of each row are real; they come first.
        """
        slot = torch.arange(self.slots, device=self.device)
        count = self.tensors["count"][:, None]
        after = count + lengths[:, None]
        # The newest token that belongs in each slot, or one before the block where the slot stays as it is.
        ring = after - 1 - (after - 1 - slot).remainder(max(self.ring, 1))
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

    def entered(self, late: bool, passed: int) -> int | None:
        """How many tokens the state of a row holds at most, or None where only the device knows.

        Args:
            late: whether a token enters it when it leaves the window.
            passed: tokens of the forward pass under way, which are not counted yet.
        """
        if self.static or torch.compiler.is_compiling():
            return None
        return max(int(self._length) + passed - late * (self.window + self.sinks), 0)

    def check_start(self, rows: Rows | Packed | None) -> None:
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
        self.waiting = None

    # --- the contract of transformers

    def update(self, *args: Any, **kwargs: Any):
        """Refuse it: always a RuntimeError."""
        raise RuntimeError("a linearized layer's cache is written by its mixer; Cache.update has no meaning here")

    update_conv_state = update_recurrent_state = update

    def get_seq_length(self) -> int | Tensor:
        """Positions seen, padding included, as for every other layer."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of a layer beside it that stays softmax, as transformers may ask any layer; else such that no mask is
        built, as none is needed."""
        return (query_length, 0) if self.beside is None else self.beside.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """-1: any number of tokens."""
        return -1

    def reset(self) -> None:
        """Forget all tokens; the slots stay allocated."""
        for x in self.tensors.values():
            x.zero_()
        self.grown, self.waiting = None, 0
        self._length = self._length.zero_() if isinstance(self._length, Tensor) else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens of each row back, and make those that stay certain.

        Args:
            tokens_to_remove: 0, or how many, as a negative number.

        Raises:
            RuntimeError: more than are recorded, or tokens are not recorded.
        """
        removed = abs(tokens_to_remove)
        if not self.is_initialized or not self.rollback and removed == 0:
            return
        if not self.rollback:
            raise RuntimeError(
                "a linearized cache that does not record its past cannot be cropped: call `activate_past_recording` "
                "before the tokens that may have to go"
            )
        count, recent = self.tensors["count"], self.tensors["recent"]
        real = recent[:, max(self.rollback - removed, 0) :].sum(1)  # padding was never counted
        if removed > self.rollback or bool((count - real < self.tensors["settled"]).any()):
            raise RuntimeError(
                f"a linearized cache can take back the last {self.rollback} tokens at most; {removed} were to go"
            )
        if self.stack is not None and removed:
            self.stack.ahead = None
        count -= real
        recent.copy_(recent.roll(removed, 1))
        recent[:, :removed] = True
        self._length -= removed
        self.waiting = None
        self.tensors["certain"].copy_(count)
        if self.grown is not None:
            self.grown = self.grown[:, :, : self.grown.shape[2] - removed]

    def activate_past_recording(self) -> None:
        """Add slots for tokens that may be taken back.

        Raises:
            RuntimeError: the cache is static, or the mixer writes each token into its state at once.
        """
        if self.static:
            raise RuntimeError("a static linearized cache cannot take tokens back; use a dynamic cache")
        if not self.late:
            raise RuntimeError(
                "this mixer writes every token into its state at once (combine: liger or none), so none can be taken "
                "back; assisted decoding needs combine: memory"
            )
        self.record_past = True
        if self.rollback:
            return
        if self.is_initialized:
            count, old = self.tensors["count"], self.tensors["tokens"]
            kept = self.in_order()
            self.rollback = ROLLBACK
            x = old.new_zeros(*old.shape[:2], self.slots, old.shape[3])
            x[:, :, : self.sinks] = old[:, :, : self.sinks]
            token = count[:, None] - self.window + torch.arange(self.window, device=self.device)
            slot = self.sinks + (token - self.sinks).remainder(self.ring)
            x.scatter_(2, slot[:, None, :, None].expand_as(kept), kept)
            recent = torch.ones(len(count), ROLLBACK, dtype=torch.bool, device=self.device)
            self.tensors |= {"tokens": x, "settled": count.clone(), "certain": count.clone(), "recent": recent}
            self.stack = None
        self.rollback, self.waiting = ROLLBACK, 0

    def remember(self, real: Tensor | None, tokens: int) -> None:
        """Note which of the last positions [B, tokens] hold tokens; None: all."""
        if self.rollback:
            recent = self.tensors["recent"]
            new = torch.ones_like(recent[:, :1]).expand(-1, tokens) if real is None else real
            recent.copy_(torch.cat([recent, new.to(recent.dtype)], 1)[:, -self.rollback :])

    def pending(self) -> int:
        """Tokens of the longest wait: they have left the window and are not in the state yet. A forward pass asks for
        all layers at once (`decoding.settle`)."""
        if self.rollback and self.waiting is None:
            self.waiting = host.read((self.tensors["count"] - self.tensors["settled"]).max())[0]
        return self.waiting or 0

    def settle(self) -> None:
        """Note that all tokens are in the state."""
        if self.rollback:
            self.tensors["settled"].copy_(self.tensors["count"])
            self.waiting = 0

    def _map(self, f) -> None:
        self.tensors = {n: f(x) for n, x in self.tensors.items()}
        self.grown = None if self.grown is None else f(self.grown)
        self.stack = self.waiting = None

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


def cache_layer(
    cache: Cache, layer_idx: int, window: int, sinks: int, grows: bool = False, late: bool = True
) -> LinearizedCacheLayer:
    """The linearized layer of any Cache, put there on first use.

    Args:
        cache: of transformers, of any kind.
        layer_idx: the layer's index in it.
        window: of a new layer, see `LinearizedCacheLayer`.
        sinks: of a new layer.
        grows: whether there are heads that stay softmax.
        late: of a new layer.

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
        records = getattr(layer, "record_past", False)
        layer = cache.layers[layer_idx] = LinearizedCacheLayer(window, sinks, isinstance(layer, StaticLayer), late)
        if records:
            layer.activate_past_recording()
    if grows and layer.static:
        raise RuntimeError(
            f"layer {layer_idx} has heads that stay softmax, whose cache grows with the text, so a static cache cannot "
            "hold it; use a dynamic cache"
        )
    return layer
