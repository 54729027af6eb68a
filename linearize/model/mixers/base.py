"""What a mixer is: an exact window with sinks, a recurrence for what lies behind it, and how the two are joined.

Letters as in ops/: B rows, H query heads, G key/value heads, T tokens, K key width, V value width, W window, s sinks. A
mixer gets q, k, v as the source's own code made them (after biases, norms, RoPE) and returns what attention would; it
knows no architecture.

combine = memory, a delayed recurrence: token j enters the recurrent state when it leaves the window of the
query, so no token is counted twice and the first W + s tokens see exactly the source's attention. A recurrence that
knows how much it weighs shares one softmax with the window; any other is added through a gate per head that starts
closed. liger: 0.5·window + 0.5·recurrence over all tokens (arXiv 2503.01496). none: one branch alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ..cache import LinearizedCacheLayer, Stack, cache_layer
from ..decoding import Step
from ..ops.rows import Rows
from ..ops.window import slot_attention, window_attention
from ..tokens import Geometry, Tokens


@dataclass(frozen=True)
class MixerConfig:
    """What every mixer has; a mixer's file adds its own numbers. JSON-safe, stored in the checkpoint.

    Attributes:
        name: the mixer's file name.
        combine: memory | liger | none.
        window: W ≥ 1 tokens of exact attention, the query's own included.
        sinks: s ≥ 0 first tokens that stay exact.
        softmax_heads: key/value heads that stay softmax, with their query heads, ascending; see mixers/heads.py.
        calibrated: whether a memory that has a log weight also has a weight `gate` [H] that is added to it, one number
            per head, as `linearize calibrate` fits it. A memory without a log weight always has its gate.
    """

    name: str = ""
    combine: str = "memory"
    window: int = 64
    sinks: int = 4
    softmax_heads: tuple[int, ...] = ()
    calibrated: bool = False

    @classmethod
    def preset(cls, combine: str) -> dict[str, Any]:
        """Defaults that differ for one way of combining."""
        return {}

    def problems(self) -> list[str]:
        """What is wrong with the values, each as `key: found; expected`."""
        found = []
        if self.window < 1:
            found.append(f"window: found {self.window}; expected at least 1")
        if self.sinks < 0:
            found.append(f"sinks: found {self.sinks}; expected at least 0")
        if list(self.softmax_heads) != sorted({g for g in self.softmax_heads if g >= 0}):
            found.append(f"softmax_heads: found {list(self.softmax_heads)}; expected different indices, ascending")
        return found

    def _above_zero(self, *keys: str) -> list[str]:
        """The problems of numbers that must be above 0."""
        values = {key: getattr(self, key) for key in keys}
        return [f"{key}: found {x}; expected above 0" for key, x in values.items() if not x > 0]

    def to_dict(self) -> dict[str, Any]:
        """Without the heads that stay softmax where there are none, as folders were before they were possible."""
        values = asdict(self)
        heads = list(values.pop("softmax_heads"))
        return {**values, "softmax_heads": heads} if heads else values


@dataclass
class Context:
    """What the surroundings know about one call.

    Attributes:
        layer_idx: the layer's index in the cache.
        scaling, softcap, extra: the source's score scale, soft cap and [H] logits without a value (or None).
        unrotate: queries or keys -> the same before RoPE, fp32.
        rows: left-aligned view of a padded or packed batch, or None.
        cache: the Cache to continue and update, or None.
        branch: all | window (memory off) | memory (window off).
        attend: the source's own attention over (q, k, v), for the control; y [B, H, T, V].
        steps: layer index -> the decoding step it shares with other layers, and its place among them.
    """

    layer_idx: int
    scaling: float
    softcap: float | None
    extra: Tensor | None
    unrotate: Callable[[Tensor], Tensor]
    rows: Rows | None
    cache: Cache | None
    branch: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    steps: dict[int, tuple[Step, int]] = field(default_factory=dict)


Near = tuple[Tensor, Tensor | None] | None
"""The window's y [B, H, T, V] and, where a weight is to be shared, its log-sum-exp [B, H, T]; None where it is off."""
Far = tuple[Tensor, Tensor | None] | None
"""The recurrence's y [B, H, T, V] and its log weight [B, H, T], if it has one; None where nothing left the window."""


class Mixer(nn.Module):
    """Base of all mixers. A recurrent one defines the first group of methods; the rest is here.

    The one rule of a recurrence: a token that does not exist leaves the state as it was.

    Attributes:
        window, sinks: in force now; those of the configuration, unless `modeling.windows` cuts them.
        windowed: whether it has a window. delayed: whether a token enters the state only when it leaves the window.
        gate: [H] or None. A memory with a log weight gets it added (`calibrated`); any other is multiplied by tanh of
            it, which starts at 0: the plain window.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MixerConfig]] = MixerConfig
    combines: ClassVar[tuple[str, ...]] = ("memory", "liger", "none")
    recurrent: ClassVar[bool] = True
    scheduled: ClassVar[bool] = False
    """Whether what a head writes depends on its number in the layer; then see `Geometry.schedule`."""

    config: Any

    def __init__(self, config: MixerConfig, geometry: Geometry):
        super().__init__()
        self.config, self.geometry = config, geometry
        self.window, self.sinks = config.window, config.sinks
        self.windowed = config.combine != "none" or not self.recurrent
        self.delayed = self.recurrent and config.combine == "memory"
        gated = self.delayed and (config.calibrated or not self.weighted)
        self.gate = nn.Parameter(torch.zeros(geometry.heads)) if gated else None

    # --- what a recurrent mixer's file defines

    @property
    def weighted(self) -> bool:
        """Whether `recur` returns the log weight of the memory beside the window's log-sum-exp."""
        return False

    def query(self, q: Tensor, context: Context) -> Tensor:
        """Queries [B, H, T, K] -> what reads the state [B, H, T, ·]."""
        return q

    def carry(self, k: Tensor, unrotate: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Keys [B, G, T, K] -> what `write` will need beside k and v [B, G, T, C], kept until the token leaves."""
        return None

    def write(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """What the recurrence takes in, [B, G, T, ·] each; for a token that does not exist, what changes nothing."""
        raise TypeError(f"{self.name} has no recurrence")

    def recur(
        self, read: Tensor, writes: tuple[Tensor, ...], state: tuple[Tensor, ...], context: Context
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Run it over T tokens; token t's write is visible to query t.

        Returns:
            y [B, H, T, V] fp32; its log weight [B, H, T] beside the window's log-sum-exp, or None where the recurrence
            has no normaliser; and the state after the last token.
        """
        raise TypeError(f"{self.name} has no recurrence")

    def absorb(self, writes: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> None:
        """The writes of one token per row, into the state, in place."""
        raise TypeError(f"{self.name} has no recurrence")

    def look(self, read: Tensor, state: tuple[Tensor, ...], context: Context) -> Tensor:
        """What one token per row reads: y [B, H, 1, V] fp32, with its log weight as one more column if `weighted`."""
        raise TypeError(f"{self.name} has no recurrence")

    @property
    def carry_width(self) -> int:
        """C of `carry`."""
        return 0

    def empty_state(self, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        """The fp32 state of rows that have seen nothing."""
        return ()

    def content(self, state: tuple[Tensor, ...]) -> Tensor:
        """What a state holds of the text, without the sums of weights beside it: a matrix per head [B, G, ·, V], or a
        vector [B, G, V]. To look at, not to compute with."""
        return state[0][..., : self.geometry.value_width]

    # --- the hybrid

    @cached_property
    def token_shape(self) -> tuple[int, int]:
        """(heads, width) of what the cache keeps of each token in reach; width 0 where no token is kept."""
        g = self.geometry
        carry = self.carry_width if self.delayed else 0
        return g.kv_heads, g.key_width + g.value_width + 2 + carry if self.windowed else 0

    @cached_property
    def alike(self) -> tuple | None:
        """Equal for mixers that write the same way; None for one that writes with weights of its own."""
        own = any(name != "gate" for name, _ in self.named_parameters())
        g = self.geometry if self.scheduled else replace(self.geometry, missing=())
        return None if own else (type(self), replace(self.config, softmax_heads=()), g)

    def state_bytes(self, batch: int, dtype_bytes: int) -> int:
        """Bytes of cache of one layer, whatever the context length; heads that stay softmax are not its own."""
        heads, width = self.token_shape
        kept = heads * width * (self.config.window + self.config.sinks) * dtype_bytes
        state = sum(x.nbytes for x in self.empty_state(1, torch.device("meta")))
        return batch * (kept + state + torch.int64.itemsize)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """q [B, H, T, K], k [B, G, T, K], v [B, G, T, V] -> y [B, H, T, V] in v's dtype."""
        rows, layer = context.rows, None
        if context.cache is not None:
            layer = cache_layer(context.cache, context.layer_idx, self.window, self.sinks)
            layer.check_start(rows)
        past = layer if layer is not None and layer.is_initialized else None
        T = q.shape[2]
        if past is not None and T == 1 and rows is None:
            return self._step(q, k, v, context, past)
        read, tokens = self._prepare(q, k, v, context)
        lengths = torch.full((q.shape[0],), T, device=q.device)
        real = None
        if rows is not None:
            q, read, tokens.x = (rows.gather(x) for x in (q, read, tokens.x))
            real, lengths = rows.valid, rows.valid.sum(1)
        near, far, state = self._block(q, read, tokens, context, past, real)
        y = self._join(near, far, q, context)
        if layer is not None:
            if past is None:
                states = self.empty_state(q.shape[0], q.device)
                layer.lazy_initialization(q.shape[0], tokens.x, self.token_shape, states)
            if self.windowed:
                layer.extend(tokens.x[..., : self.token_shape[1]], lengths)
            for kept, final in zip(layer.state, state, strict=True):
                kept.copy_(final.detach())
            layer.advance(lengths, T)
            if rows is not None and rows.packed:
                layer.batch_select_indices(rows.last)
        return y if rows is None else rows.scatter(y)

    def branches(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Near, Far]:
        """The two branches of rows that start here and have no padding, as they are before `_join`."""
        near, far, _ = self._block(q, *self._prepare(q, k, v, context), context, None, None)
        return near, far

    def _prepare(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tokens]:
        read = self.query(q, context) if self.recurrent else q
        carry = self.carry(k, context.unrotate) if self.recurrent else None
        return read, Tokens.join(k, v, carry, k.new_ones(*k.shape[:3], 1), self.geometry)

    def _block(
        self, q: Tensor, read: Tensor, tokens: Tokens,
        context: Context, past: LinearizedCacheLayer | None, real: Tensor | None,
    ) -> tuple[Near, Far, tuple[Tensor, ...]]:  # fmt: skip
        """Several tokens at once: both branches, and the state after the last real token of each row."""
        W, s = self.window, self.sinks
        T, x = q.shape[2], tokens.x
        seen = 0 if past is None else past.tensors["count"]
        state = self.empty_state(q.shape[0], q.device) if past is None else past.state
        near = far = None

        if self.windowed:
            before = x.new_zeros(*x.shape[:2], W, x.shape[3]) if past is None else past.in_order().to(x.dtype)
            if before.shape[3] < x.shape[3]:  # a carry that no cache keeps
                x = x[..., : before.shape[3]]
            local = Tokens(torch.cat([before, x], dim=2), self.geometry)
            if context.branch != "memory":
                sinks = Tokens(self._sinks(x, past), self.geometry)
                near = window_attention(
                    q, local.k, local.v, sinks.k, sinks.v,
                    seen=seen, window=W, scaling=context.scaling, softcap=context.softcap, extra=context.extra,
                )  # fmt: skip
        # Of a fresh row, only tokens s … T − W − 1 leave the window, and only queries from W + s on can see them.
        skip = W + s if self.delayed and past is None else 0
        if self.recurrent and skip < T:
            entering = tokens.x
            keep = None if real is None else real[:, skip:]
            if self.delayed:
                entering = local.x[:, :, skip:T]
                if past is not None or keep is not None:
                    token = torch.as_tensor(seen, device=q.device).view(-1, 1) - W
                    left = token + torch.arange(skip, T, device=q.device) >= s
                    keep = left if keep is None else keep & left
            if keep is not None:
                entering = entering * keep[:, None, :, None]
            writes = self.write(Tokens(entering, self.geometry))
            y, weight, state = self.recur(read[:, :, skip:], writes, state, context)
            if skip:
                y = F.pad(y, (0, 0, skip, 0))
                weight = None if weight is None else F.pad(weight, (skip, 0), value=float("-inf"))
            far = y, weight
        return near, far, state

    def _sinks(self, new: Tensor, past: LinearizedCacheLayer | None) -> Tensor:
        """The first s tokens of each row, some of which may be among the new ones."""
        s, T = self.sinks, new.shape[2]
        first = new[:, :, :s] if s <= T else F.pad(new, (0, 0, 0, s - T))
        if past is None or s == 0:
            return first
        count = past.tensors["count"][:, None]
        slot = torch.arange(s, device=new.device)
        index = (slot - count).clamp(min=0, max=T - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        old = past.tensors["tokens"][:, :, :s].to(new.dtype)
        return torch.where((slot < count)[:, None, :, None], old, new.gather(2, index))

    def _step(self, q: Tensor, k: Tensor, v: Tensor, context: Context, past: LinearizedCacheLayer) -> Tensor:
        """One decoding step. The token that the new one overwrites in the ring has entered the memory before."""
        together = context.steps.get(context.layer_idx)
        step, place = together or (Step(self, Stack.of([past])), 0)
        near = far = memory = None
        late = self.carry(k, context.unrotate) if self.recurrent and not self.delayed else None
        new = Tokens.join(k, v, late, step.one, self.geometry)
        if self.recurrent:
            if not self.delayed:
                self.absorb(self.write(new), past.state)
            found = self.look(self.query(q, context), past.state, context)
            if self.weighted and self.delayed and context.branch == "all":
                memory = found
                if self.gate is not None:
                    memory[..., -1] += self.gate.float()[:, None]
            far = (found[..., :-1] if self.weighted else found), None
        if self.windowed:
            kept = past.tensors["tokens"]
            width = min(new.x.shape[-1], kept.shape[-1])
            kept.scatter_(2, step.slot[..., :width], new.x[..., :width])
        if self.windowed and context.branch != "memory":
            y = slot_attention(
                q, *step.slots[place], step.bias,
                scaling=context.scaling, softcap=context.softcap, extra=context.extra, memory=memory,
            )  # fmt: skip
            near = y, None
        if together is None:
            step.finish(context.unrotate)
        return y if memory is not None else self._join(near, far, q, context)

    def _join(self, near: Near, far: Far, q: Tensor, context: Context) -> Tensor:
        """One output [B, H, T, V] from the two branches."""
        combine = self.config.combine
        if context.branch == "window":
            far = None
        if far is not None and combine == "memory":
            m, weight = far
            gate = 0.0 if self.gate is None else self.gate.to(m.dtype)[:, None]
            if not self.weighted:
                assert isinstance(gate, Tensor)
                far = m * gate.unsqueeze(-1).tanh(), None
            elif near is not None:
                # (e^lse y + e^w m) / (e^lse + e^w): one softmax over window and memory.
                y, lse = near
                assert weight is not None and lse is not None
                weight = weight + gate
                return torch.lerp(y.to(m.dtype), m, (weight - lse).sigmoid().unsqueeze(-1)).to(q.dtype)
        parts = [branch[0] for branch in (near, far) if branch is not None]
        if not parts:
            return q.new_zeros(*q.shape[:3], self.geometry.value_width)
        total = parts[0] + parts[1] if len(parts) == 2 else parts[0]
        return (0.5 * total if combine == "liger" else total).to(q.dtype)
