"""What is kept of each token until it leaves the window."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Shapes of one attention layer: query heads H, key/value heads G, key width K, value width V.

    Attributes:
        missing: key/value heads of the layer that are not among these, because they stay softmax.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    missing: tuple[int, ...] = ()

    def schedule(self, make: Callable[[int], Tensor]) -> Tensor:
        """Constants that differ from head to head, of the heads that are here: `make` gives them [G, ...] for all key/
        value heads of the layer, by their index."""
        whole = make(self.kv_heads + len(self.missing))
        # Slices: a list of indices would be copied to the device at every call.
        return torch.cat([whole[g : g + 1] for g in range(len(whole)) if g not in self.missing])


class Tokens:
    """Columns [k | 1 | v | 1 | kept] of one tensor x [B, G, T, K + V + 2 + C].

    A token that does not exist (padding, an empty slot) is a row of zeros. The ones lie so that a key and a value each
    have theirs at hand, which is how sums of weights are kept beside sums of values.
    """

    def __init__(self, x: Tensor, geometry: Geometry):
        self.x, self.K, self.V = x, geometry.key_width, geometry.value_width

    @classmethod
    def join(cls, k: Tensor, v: Tensor, kept: Tensor | None, one: Tensor, geometry: Geometry) -> "Tokens":
        """Put tokens together.

        Args:
            k: [B, G, T, K].
            v: [B, G, T, V].
            kept: what else is kept of each token (`Mixer.kept_features`), [B, G, T, C], or None.
            one: [B, G, T, 1], ones.
            geometry: of the layer.
        """
        return cls(torch.cat([k, one, v, one] if kept is None else [k, one, v, one, kept.to(k.dtype)], -1), geometry)

    @property
    def k(self) -> Tensor:
        """Keys [B, G, T, K]."""
        return self.x[..., : self.K]

    @property
    def k1(self) -> Tensor:
        """[k | 1], [B, G, T, K + 1]."""
        return self.x[..., : self.K + 1]

    @property
    def v(self) -> Tensor:
        """Values [B, G, T, V]."""
        return self.x[..., self.K + 1 : self.K + 1 + self.V]

    @property
    def v1(self) -> Tensor:
        """[v | 1], [B, G, T, V + 1]."""
        return self.x[..., self.K + 1 : self.K + self.V + 2]

    @property
    def present(self) -> Tensor:
        """[B, G, T, 1]: 1, or 0 for a token that does not exist."""
        return self.x[..., self.K : self.K + 1]

    @property
    def kept(self) -> Tensor:
        """What else is kept of each token, [B, G, T, C]."""
        return self.x[..., self.K + self.V + 2 :]
