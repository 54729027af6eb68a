"""One decoding step of the layers that are alike.

A token enters the memory W steps after it arrived, so nothing of that depends on the layers before: it is done for all
layers at once, before the first of them runs, and what the new token will be remembered by is computed after the last.
What remains inside a layer is attention over its slots and one reading of its state. On a small model, decoding time is
the number of operations.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import host
from .cache import LinearizedCacheLayer
from .stack import Stack
from .tokens import Tokens
from .transformers_api import CacheLayerMixin

if TYPE_CHECKING:
    from .mixers.base import Mixer


class Step:
    """One token of each row, in all layers of a stack.

    Args:
        mixer: of any of these layers.
        stack: their caches.

    Attributes:
        slot: [B, G, 1, D] int64, where the new token goes in each layer's slots.
        bias: [B·G, 1, s + W] fp32, 0 where a slot will be filled, −inf elsewhere.
        one: [B, G, 1, 1], in the dtype of the slots.
        slots: layer's index in the stack -> its keys [B·G, K, s + W] and values [B·G, s + W, V], new token included.
        positions: layer index -> the position embeddings its attention was called with, in the order of the layers.
    """

    def __init__(self, mixer: "Mixer", stack: Stack):
        self.mixer, self.stack = mixer, stack
        self.positions: dict[int, Any] = {}
        first, tokens = stack.layers[0], stack.tensors["tokens"]
        B = first.tensors["count"].shape[0]
        heads, width = mixer.token_shape
        self._slot = first.slot_of_next(stack.tensors["count"])[:, None, None, None].expand(-1, heads, 1, width)
        self.slot = self._slot[:B]
        bias = torch.zeros((), device=tokens.device).masked_fill(~first.filled(), float("-inf"))
        self.bias = bias.repeat_interleave(heads, 0).unsqueeze(1)
        self.one = tokens.new_ones(B, heads, 1, 1)
        if mixer.windowed:
            kept = Tokens(tokens, mixer.geometry)
            parts = (kept.k.flatten(0, 1).mT, kept.v.flatten(0, 1))
            parts = (x.unflatten(0, (len(stack.layers), -1)).unbind() for x in parts)
            self.slots = list(zip(*parts, strict=True))
        self._ahead: list[tuple[Tensor, ...]] | None = None
        if mixer.delayed and first.rollback:
            if stack.ahead is None:
                stack.ahead = tuple(x.clone() for x in stack.state)
                enter(mixer, stack, stack.tensors["settled"], stack.tensors["count"], stack.ahead, first.pending())
            enter(mixer, stack, stack.tensors["count"], stack.tensors["count"] + 1, stack.ahead, 1)
            self._ahead = list(zip(*(x.chunk(len(stack.layers)) for x in stack.ahead), strict=True))
        elif mixer.delayed:
            leaving = Tokens(tokens.gather(2, self._slot), mixer.geometry)
            mixer.take_in(leaving, stack.state)

    def state(self, index: int, past: LinearizedCacheLayer) -> tuple[Tensor, ...]:
        """What a layer of this index among them reads: the state with the token in it that has just left."""
        return past.state if self._ahead is None else self._ahead[index]

    def finish(self, unrotate: Callable[[Tensor], Tensor]) -> None:
        """Once the new token lies in the slots of every layer.

        Args:
            unrotate: keys [L·B, G, 1, K] of the layers one after the other -> the same before RoPE, fp32.
        """
        width = self.mixer.kept_width if self.mixer.delayed else 0
        if width:
            tokens = self.stack.tensors["tokens"]
            arrived = Tokens(tokens.gather(2, self._slot), self.mixer.geometry)
            kept = self.mixer.kept_features(arrived.k, unrotate)
            if kept is not None:
                tokens.scatter_(2, self._slot, torch.cat([arrived.x[..., :-width], kept.to(tokens.dtype)], -1))
        self.stack.advance()


def enter(mixer: "Mixer", stack: Stack, first: Tensor, last: Tensor, state: tuple[Tensor, ...], most: int) -> None:
    """Take tokens that have left the window into a state, in place, in the order in which they left.

    Args:
        mixer: of any of the layers.
        stack: their caches, whose rings still hold the tokens.
        first: int64 [L·B], how many tokens of each row lay before the next when the state was as it is.
        last: the same, when it will be as it is to become.
        state: [L·B, ...] each.
        most: what `last` is more than `first` in any row.
    """
    x, layer = stack.tensors["tokens"], stack.layers[0]
    for offset in range(most):
        token = (first + offset)[:, None] - layer.window
        slot = layer.sinks + (token - layer.sinks).remainder(layer.ring)
        leaving = x.gather(2, slot[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        real = (token >= layer.sinks) & ((first + offset)[:, None] < last[:, None])
        mixer.take_in(Tokens(leaving * real[:, None, :, None], mixer.geometry), state)


def know_each_other(layers: list) -> None:
    """Let linearized layers find a layer that stays softmax, whose masks transformers may ask them for.

    Args:
        layers: of a Cache.
    """
    softmax = (x for x in layers if isinstance(x, CacheLayerMixin) and not isinstance(x, LinearizedCacheLayer))
    beside = next((layer for layer in softmax if not getattr(layer, "is_sliding", False)), None)
    for layer in layers:
        if isinstance(layer, LinearizedCacheLayer):
            layer.beside = beside


def settle(mixers: "dict[int, Mixer]", layers: list, new: int) -> None:
    """Before a forward pass over caches that record: take what is certain into the state, and what no slot is left for.

    Args:
        mixers: layer index -> mixer.
        layers: of the Cache.
        new: tokens of the pass.
    """
    groups: dict[Any, list[int]] = {}
    for index, mixer in mixers.items():
        layer = layers[index] if index < len(layers) else None
        if isinstance(layer, LinearizedCacheLayer) and layer.is_initialized and layer.rollback:
            key = (*mixer.alike, layer.device, layer.dtype) if mixer.alike else index
            groups.setdefault(key, []).append(index)
    for indices in groups.values():
        mixer, stack = mixers[indices[0]], Stack.of([layers[i] for i in indices])
        count, settled, certain = (stack.tensors[name] for name in ("count", "settled", "certain"))
        full = count + new - stack.layers[0].rollback
        target = torch.minimum(torch.maximum(torch.maximum(certain, full), settled), count)
        moving, waiting = host.read((target - settled).max(), (count - target).max())
        if mixer.delayed and moving:
            if stack.ahead is not None and not waiting:
                for old, ahead in zip(stack.state, stack.ahead, strict=True):
                    old.copy_(ahead)
            else:
                enter(mixer, stack, settled, target, stack.state, moving)
        settled.copy_(target)
        if not waiting:
            stack.ahead = None
        for layer in stack.layers:
            layer.waiting = waiting


def steps(mixers: "dict[int, Mixer]", layers: list) -> "dict[int, tuple[Step, int]]":
    """Begin a decoding step of all layers that can share one.

    A mixer with weights of its own has updates of its own, and a layer that has seen nothing has no slots: they are
    left out.

    Args:
        mixers: layer index -> mixer.
        layers: of the Cache.

    Returns:
        Layer index -> its step, one for all layers that are alike, and the layer's index in the stack.
    """
    groups: dict[tuple, list[int]] = {}
    for index, mixer in mixers.items():
        layer = layers[index] if index < len(layers) else None
        if isinstance(layer, LinearizedCacheLayer) and layer.is_initialized and mixer.alike:
            groups.setdefault((*mixer.alike, layer.device, layer.dtype), []).append(index)
    begun = {}
    for indices in groups.values():
        step = Step(mixers[indices[0]], Stack.of([layers[i] for i in indices]))
        begun |= {layer: (step, index) for index, layer in enumerate(indices)}
    return begun
