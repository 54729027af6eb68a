"""What a cache keeps of a mixer: its recurrent state, in fewer bits where so configured, and N tokens as they are where
`exact` says so.

A recurrence of fixed size holds the drift of a text and loses its facts. So a token that leaves the window gets a
score: how far its value is from what the state before it reads at its own key (the write residual; HOLA,
arXiv 2607.02303, LoLA, arXiv 2505.23666). The N tokens of largest score are kept with key and value (ops/exact.py) and
read in the window's softmax, with the source's own score and no parameter.

The recurrence takes in all tokens, as HOLA's does. If it took only those that are not kept, what it takes would depend
on what it holds, and there would be no parallel form. A memory that shares the window's softmax would count the kept
ones twice, so its weight is that of its n tokens times (n − N)/n: nothing as long as all are kept, which is the
source's own attention. One without a weight is added through its gate as ever.

The delta rule's state, and a memory divided by its sum of weights, read at a key a prediction of its value. Other
states read a multiple of one that depends on how many tokens they hold: of those the multiple that is nearest counts.
A block of tokens has its scores from the scan that its queries need anyway: the keys of the next tokens are read beside
them, as one more head of each group.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import compact, exact
from ..passes import Branch, Context
from ..tokens import Tokens
from .recurrence import Recurrence

State = tuple[Tensor, ...]
ALONE = Context(
    layer_idx=0, scaling=1.0, softcap=None, extra=None, unrotate=lambda x: x, rows=None, cache=None, branch="all",
    attend=lambda q, k, v: v,
)  # fmt: skip
"""Of a reading that no call asks for."""
LEAST = torch.finfo(torch.float32).tiny
"""What a square is divided by at least."""
PARTS = 3
"""Tensors of a store that is opened: tokens, scores, and how many came."""


class Kept(Recurrence):
    """A recurrence and its state as caches keep it; with `exact`, the state ends with those of the kept tokens."""

    @property
    def _dtype(self) -> torch.dtype | None:
        return compact.DTYPES[self.config.state_dtype]

    def empty_state(self, batch: int, device: torch.device) -> State:
        """The fp32 state of `batch` rows that have seen nothing, kept tokens included."""
        state, g, kept = self.initial_state(batch, device), self.geometry, self.config.exact
        if not kept:
            return state
        return *state, *exact.initial_state(batch, g.kv_heads, g.key_width, g.value_width, kept, device)

    def stored_state(self, batch: int, device: torch.device) -> State:
        """The same as a cache keeps it, in `state_dtype`."""
        return self.stored(self.empty_state(batch, device))

    def stored(self, state: State) -> State:
        """What a cache keeps of a state."""
        state, store = self._parted(state, PARTS)
        kept = state if self.rounds_itself else compact.stored(state, self._dtype)
        return (*kept, *exact.stored(store, self.geometry.key_width, self._dtype)) if store else kept

    def opened(self, kept: State) -> State:
        """The state of which a cache keeps this."""
        kept, store = self._parted(kept, PARTS + (self._dtype == torch.int8))
        state = kept if self.rounds_itself else compact.opened(kept, self._dtype)
        return (*state, *exact.opened(store, self.geometry.key_width)) if store else state

    def _parted(self, state: State, parts: int) -> tuple[State, State]:
        """The recurrent state, and the store, which is () without `exact`."""
        return (state[:-parts], state[-parts:]) if self.config.exact else (state, ())

    def take_in(self, tokens: Tokens, kept: State) -> None:
        """Take one token per row into a state as a cache keeps it, in place."""
        kept, store = self._parted(kept, PARTS + (self._dtype == torch.int8))
        state = kept if self.rounds_itself else compact.opened(kept, self._dtype)
        if store:
            y = self.read_state(self.own_query(tokens, ALONE.scaling), state, ALONE)[..., : self.geometry.value_width]
            exact.update_state(tokens.k, tokens.v, self._residual(tokens, y), tokens.present, store)
        self.update_state(self.updates(tokens), state)
        if self._dtype is not None and not self.rounds_itself:
            for old, new in zip(kept, compact.stored(state, self._dtype), strict=True):
                old.copy_(new)

    def _residual(self, tokens: Tokens, y: Tensor) -> Tensor:
        """The score [B, G, T, 1] of tokens at whose keys y [B, G, T, V] was read."""
        v = tokens.v.to(y.dtype)
        if not self.predicts:
            along = (y * v).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True).clamp(min=LEAST)
            y = y * along
        return (v - y).norm(dim=-1, keepdim=True)

    def run(
        self, q: Tensor, query: Tensor, tokens: Tokens, state: State, context: Context
    ) -> tuple[Branch, Branch | None, State]:
        """`scan`, and what is read of the kept tokens.

        Args:
            q: [B, H, T, K] as the source rotates them.
            query: of `query`, [B, H, T, ·].
            tokens: [B, G, T, ·] that enter; token t is visible to query t.
            state: before the first token, opened.
            context: of the call.

        Returns:
            What the recurrence gives; what the kept tokens give, None without `exact`; and the state after the last.
        """
        state, store = self._parted(state, PARTS)
        if not store:
            y, weight, state = self.scan(query, self.updates(tokens), state, context)
            return Branch(y, weight), None, state
        # A token that does not exist comes first, after which the key of the first is read.
        shifted = Tokens(F.pad(tokens.x, (0, 0, 1, 0)), self.geometry)
        groups = query.shape[0], self.geometry.kv_heads, -1, query.shape[2] + 1, query.shape[3]
        with torch.no_grad():
            own = F.pad(self.own_query(tokens, context.scaling), (0, 0, 0, 1)).to(query.dtype)
        both = torch.cat([F.pad(query, (0, 0, 1, 0)).reshape(groups), own.unsqueeze(2)], 2).flatten(1, 2)
        y, weight, state = self.scan(both, self.updates(shifted), state, context)
        y = y.unflatten(1, groups[1:3])
        with torch.no_grad():
            score, present = self._residual(tokens, y[:, :, -1, :-1]), (tokens.present > 0).to(y.dtype)
        far = Branch(y[:, :, :-1, 1:].flatten(1, 2), None)
        if weight is not None:
            rest = self._rest(store[-1] + present.cumsum(2))
            weight = weight.unflatten(1, groups[1:3])[:, :, :-1, 1:] + rest.mT
            far = Branch(far.y, weight.flatten(1, 2))
        given = {"scaling": context.scaling, "softcap": context.softcap, "dtype": self._dtype}
        y, weight, store = exact.chunked(q, tokens.k, tokens.v, score, present, store, **given)
        return far, Branch(y, weight), (*state, *store)

    def answer(self, q: Tensor, query: Tensor, state: State, context: Context) -> tuple[Tensor, Branch | None]:
        """`read_state`, and what one token per row reads of the kept ones.

        Args:
            q: [B, H, 1, K] as the source rotates them.
            query: of `query`, [B, H, 1, ·].
            state: opened.
            context: of the call.

        Returns:
            As of `read_state`; and what the kept tokens give, None without `exact`.
        """
        state, store = self._parted(state, PARTS)
        y = self.read_state(query, state, context)
        if not store:
            return y, None
        if self.weighted:
            rest = self._rest(store[-1]).expand(-1, -1, query.shape[1] // store[-1].shape[1], -1)
            y = torch.cat([y[..., :-1], y[..., -1:] + rest.reshape(*y.shape[:3], 1)], -1)
        return y, Branch(*exact.read_state(q, store, scaling=context.scaling, softcap=context.softcap))

    def _rest(self, seen: Tensor) -> Tensor:
        """log((n − N)/n), of n tokens [B, G, ·, 1] all but the kept ones."""
        n = seen.clamp(min=1)
        return ((n - self.config.exact).clamp(min=0) / n).log()
