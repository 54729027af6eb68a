"""Cache layers that are alike, as one, for what decoding does to all of them (decoding.py)."""

import torch
from torch import Tensor

from .cache import LinearizedCacheLayer


class Stack:
    """The tensors of alike layers, joined along the batch: what all of them do at the same time is one operation.

    Each layer keeps its own rows as views.

    Args:
        layers: initialized, of equal shapes, dtype and device.

    Attributes:
        tensors: as of a layer, [L·B, ...] each.
        ahead: while tokens are recorded and come one by one, the state with all of them in it; else None.
    """

    def __init__(self, layers: list[LinearizedCacheLayer]):
        self.layers = layers
        self.ahead: tuple[Tensor, ...] | None = None
        self.tensors = layers[0].tensors
        if len(layers) > 1:
            self.tensors = {n: torch.cat([layer.tensors[n] for layer in layers]) for n in layers[0].tensors}
            views = ({n: x.chunk(len(layers)) for n, x in self.tensors.items()}).items()
            for i, layer in enumerate(layers):
                layer.tensors = {n: parts[i] for n, parts in views}
        if not torch.compiler.is_compiling():  # a graph that changes it would be compiled anew for the next token
            for layer in layers:
                layer.stack = self

    @classmethod
    def of(cls, layers: list[LinearizedCacheLayer]) -> "Stack":
        """The stack of exactly these layers, made anew where one has left it."""
        if torch.compiler.is_compiling():
            return cls(layers)
        stacks = [getattr(layer, "stack", None) for layer in layers]  # an exporter makes layers without it
        stack = stacks[0]
        same = stack is not None and stack.layers == layers and all(other is stack for other in stacks)
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
            layer.waiting = None
            layer.remember(None, 1)
