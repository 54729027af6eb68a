"""What a recurrent mixer's file defines: how queries read a state, and how tokens change it.

Letters as in base.py.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..passes import Context
from ..tokens import Geometry, Tokens
from .config import MixerConfig


class Recurrence(nn.Module):
    """The first part of every mixer (base.py). A recurrent one defines the methods here.

    The one rule of a recurrence: a token that does not exist leaves the state as it was.

    Attributes:
        name: the name of its file, in lower case, by which a user chooses it.
        summary: what it is, in a line. rule: its formulas. papers: arXiv ids. state: the size of a layer's state.
        recurrent: whether there is a recurrence.
        scheduled: whether a head's updates depend on its index in the layer; then see `Geometry.schedule`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MixerConfig]] = MixerConfig
    combines: ClassVar[tuple[str, ...]] = ("memory", "liger", "none")
    recurrent: ClassVar[bool] = True
    keeps_source_cache: ClassVar[bool] = False
    """Whether it leaves the layer its source's own cache, which grows with the text."""
    read_by: ClassVar[tuple[str, ...]] = ("gate", "mass")
    """Weights that only reading needs: layers update their states together, whatever these are."""
    rounds_itself: ClassVar[bool] = False
    """Whether its operations keep the state in `state_dtype` themselves."""
    scheduled: ClassVar[bool] = False
    addressed: ClassVar[bool] = False
    """Whether a key reads what was written under it, so that `exact` knows what is kept badly; see `own_query`."""
    summary: ClassVar[str]
    rule: ClassVar[str]
    papers: ClassVar[tuple[str, ...]] = ()
    state: ClassVar[str]

    config: Any

    def __init__(self, config: MixerConfig, geometry: Geometry):
        super().__init__()
        self.config, self.geometry = config, geometry

    @property
    def weighted(self) -> bool:
        """Whether `scan` returns the log weight of the memory beside the window's log-sum-exp."""
        return False

    def query(self, q: Tensor, context: Context) -> Tensor:
        """Make what reads the state.

        Args:
            q: queries [B, H, T, K], as the source rotates them.
            context: of the call; `unrotate` gives them before RoPE.

        Returns:
            [B, H, T, ·].
        """
        return q

    @property
    def predicts(self) -> bool:
        """Whether what a key reads is as large as a value, where it is `addressed`."""
        return self.weighted

    def own_query(self, tokens: Tokens, scaling: float) -> Tensor:
        """What reads the state at the tokens' own keys, [B, G, T, ·], where the mixer is `addressed`.

        Args:
            tokens: that are about to enter.
            scaling: by which the reading multiplies scores.
        """
        raise TypeError(f"{self.name} reads nothing at a key")

    def kept_features(self, k: Tensor, unrotate: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Make what `updates` needs beside k and v; it is kept until the token leaves the window.

        Args:
            k: keys [B, G, T, K], as the source rotates them.
            unrotate: keys -> the same before RoPE, fp32.

        Returns:
            [B, G, T, C] with C = `kept_width`, or None where nothing is needed.
        """
        return None

    def updates(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """What the recurrence takes in, [B, G, T, ·] each; for a token that does not exist, what changes nothing."""
        raise TypeError(f"{self.name} has no recurrence")

    def scan(
        self, query: Tensor, updates: tuple[Tensor, ...], state: tuple[Tensor, ...], context: Context
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Run the recurrence over T tokens; token t's update is visible to query t.

        Args:
            query: of `query`, [B, H, T, ·].
            updates: of `updates`, [B, G, T, ·] each.
            state: before the first token; left as it is.
            context: of the call.

        Returns:
            y [B, H, T, V] fp32; its log weight [B, H, T] beside the window's log-sum-exp, or None where the recurrence
            has no normaliser; and the state after the last token.
        """
        raise TypeError(f"{self.name} has no recurrence")

    def update_state(self, updates: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> None:
        """Take the updates of one token per row, [B, G, 1, ·] each, into the state, in place."""
        raise TypeError(f"{self.name} has no recurrence")

    def read_state(self, query: Tensor, state: tuple[Tensor, ...], context: Context) -> Tensor:
        """What one token per row reads.

        Args:
            query: of `query`, [B, H, 1, ·].
            state: with the token's own update in it where it is not delayed.
            context: of the call.

        Returns:
            y [B, H, 1, V] fp32, with its log weight as one more column if `weighted`.
        """
        raise TypeError(f"{self.name} has no recurrence")

    @staticmethod
    def joined(y: Tensor, weight: Tensor | None) -> Tensor:
        """As `read_state` returns it: y [B, H, 1, V] with its log weight [B, H, 1], if any, as one more column."""
        return y if weight is None else torch.cat([y, weight.unsqueeze(-1)], -1)

    def initial_state(self, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        """The fp32 state on `device` of `batch` rows that have seen nothing, [batch, G, ...] each."""
        return ()

    def content(self, state: tuple[Tensor, ...]) -> Tensor:
        """What a state holds of the text, without the sums of weights beside it: a matrix per head [B, G, ·, V], or a
        vector [B, G, V]. To look at, not to compute with."""
        return state[0][..., : self.geometry.value_width]
