"""What a mixer is: an exact window with sinks, a recurrence for what lies behind it, and how the two are joined.

Letters as in ops/: B rows, H query heads, G key/value heads, T tokens, K key width, V value width, W window, s sinks. A
mixer gets q, k, v as the source's own code made them (after biases, norms, RoPE) and returns what attention would; it
knows no architecture.

combine = memory, a delayed recurrence: token j enters the recurrent state when it leaves the window of the
query, so no token is counted twice and the first W + s tokens see exactly the source's attention. liger: 0.5·window +
0.5·recurrence over all tokens (arXiv 2503.01496). none: one branch alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from linearize.cache import LinearizedCacheLayer, cache_layer
from linearize.ops.rows import Rows
from linearize.ops.window import slot_attention, window_attention


@dataclass(frozen=True)
class MixerConfig:
    """What every mixer has; a mixer's file adds its own numbers. JSON-safe, stored in the checkpoint.

    Attributes:
        name: the mixer's file name.
        combine: memory | liger | none.
        window: W ≥ 1 tokens of exact attention, the query's own included.
        sinks: s ≥ 0 first tokens that stay exact.
    """

    name: str = ""
    combine: str = "memory"
    window: int = 64
    sinks: int = 4

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
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Geometry:
    """Shapes of one attention layer: query heads H, key/value heads G, key width K, value width V."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int


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
        shared: what the layers of one forward pass may share.
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
    shared: dict = field(default_factory=dict)


class Mixer(nn.Module):
    """Base of all mixers. A recurrent one defines `prepare`, `write`, `recur` and `empty_state`; the rest is here.

    The one rule of a recurrence: a token whose writes are all zero leaves the state exactly as it was.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MixerConfig]] = MixerConfig
    combines: ClassVar[tuple[str, ...]] = ("memory", "liger", "none")
    recurrent: ClassVar[bool] = True

    config: Any

    def __init__(self, config: MixerConfig, geometry: Geometry):
        super().__init__()
        self.config, self.geometry = config, geometry
        self.windowed = config.combine != "none" or not self.recurrent
        self.delayed = self.recurrent and config.combine == "memory"

    # --- what a recurrent mixer's file defines

    def prepare(self, q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Once per token, as it arrives: queries [B, H, T, K] -> what reads the state [B, H, T, ·]; keys [B, G, T, K]
        -> what `write` will need beside k and v [B, G, T, C], kept until the token leaves the window."""
        raise TypeError(f"{self.name} has no recurrence")

    def write(self, k: Tensor, carry: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Keys [B, G, T, K], what `prepare` made of them, values [B, G, T, V] -> what the recurrence takes in."""
        raise TypeError(f"{self.name} has no recurrence")

    def recur(
        self, read: Tensor, writes: tuple[Tensor, ...], state: tuple[Tensor, ...], decoding: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Run it over T tokens; token t's write is visible to query t. `decoding`: T = 1, `state` is updated in place.

        Returns:
            y [B, H, T, V] fp32; its log weight [B, H, T] beside the window's log-sum-exp, or None where the recurrence
            has no normaliser; and the state after the last token.
        """
        raise TypeError(f"{self.name} has no recurrence")

    @property
    def carry_width(self) -> int:
        """C of `prepare`."""
        return self.geometry.key_width

    def empty_state(self, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        """The fp32 state of rows that have seen nothing."""
        return ()

    # --- the hybrid

    def slots(self) -> dict[str, tuple[int, int]]:
        """What the cache keeps per token in reach: name -> (heads, width)."""
        g = self.geometry
        if not self.windowed:
            return {}
        slots = {"k": (g.kv_heads, g.key_width), "v": (g.kv_heads, g.value_width)}
        if self.delayed:
            slots["carry"] = (g.kv_heads, self.carry_width)
        return slots

    def state_bytes(self, batch: int, dtype_bytes: int) -> int:
        """Bytes of cache of one layer, whatever the context length."""
        tokens = self.config.window + self.config.sinks
        kept = sum(heads * width for heads, width in self.slots().values()) * tokens * dtype_bytes
        state = sum(x.nbytes for x in self.empty_state(1, torch.device("meta")))
        return batch * (kept + state + torch.int64.itemsize)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """q [B, H, T, K], k [B, G, T, K], v [B, G, T, V] -> y [B, H, T, V] in v's dtype."""
        read, carry = self.prepare(q, k, context) if self.recurrent else (q, k)
        carry = carry.to(k.dtype)
        rows, layer = context.rows, None
        if context.cache is not None:
            layer = cache_layer(context.cache, context.layer_idx, self.config.window, self.config.sinks)
        past = layer if layer is not None and layer.is_initialized else None
        T = q.shape[2]
        if past is not None and T == 1 and rows is None:
            return self._step(q, k, v, read, carry, context, past)
        lengths = torch.full((q.shape[0],), T, device=q.device)
        real = None
        if rows is not None:
            if rows.packed and past is not None:
                raise ValueError("packed documents can only start an empty cache")
            q, k, v, read, carry = (rows.gather(x) for x in (q, k, v, read, carry))
            real, lengths = rows.valid, rows.valid.sum(1)
        y, state = self._block(q, k, v, read, carry, context, past, real)
        if layer is not None:
            if past is None:
                states = self.empty_state(q.shape[0], q.device)
                layer.lazy_initialization(q.shape[0], k, self.slots(), states)
            new = {"k": k, "v": v, "carry": carry}
            layer.extend({n: new[n] for n in self.slots()}, lengths)
            for kept, final in zip(layer.state, state, strict=True):
                kept.copy_(final.detach())
            layer.advance(lengths, T)
            if rows is not None and rows.packed:
                layer.batch_select_indices(rows.last)
        return y if rows is None else rows.scatter(y)

    def _block(
        self, q: Tensor, k: Tensor, v: Tensor, read: Tensor, carry: Tensor,
        context: Context, past: LinearizedCacheLayer | None, real: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Several tokens at once: outputs, and the state after the last real token of each row."""
        W, s = self.config.window, self.config.sinks
        T = q.shape[2]
        seen = 0 if past is None else past.tensors["count"]
        state = self.empty_state(q.shape[0], q.device) if past is None else past.state
        near = far = None

        def local(name: str, new: Tensor) -> Tensor:
            if past is None:
                return F.pad(new, (0, 0, W, 0))
            return torch.cat([past.in_order(name).to(new.dtype), new], dim=2)

        if self.windowed and context.branch != "memory":
            near = window_attention(
                q, local("k", k), local("v", v), self._sinks("k", k, past), self._sinks("v", v, past),
                seen=seen, window=W, scaling=context.scaling, softcap=context.softcap, extra=context.extra,
            )  # fmt: skip
        # Of a fresh row, only tokens s … T − W − 1 leave the window, and only queries from W + s on can see them.
        skip = W + s if self.delayed and past is None else 0
        if self.recurrent and skip < T:
            keep = None if real is None else real[:, skip:]
            if self.delayed:
                leaving = (local(n, x)[:, :, skip:T] for n, x in (("k", k), ("carry", carry), ("v", v)))
                writes = self.write(*leaving)
                if past is not None or keep is not None:
                    token = torch.as_tensor(seen, device=q.device).view(-1, 1) - W
                    left = token + torch.arange(skip, T, device=q.device) >= s
                    keep = left if keep is None else keep & left
            else:
                writes = self.write(k, carry, v)
            if keep is not None:
                writes = tuple(w * keep[:, None, :, None] for w in writes)
            y, weight, state = self.recur(read[:, :, skip:], writes, state, decoding=False)
            if skip:
                y = F.pad(y, (0, 0, skip, 0))
                weight = None if weight is None else F.pad(weight, (skip, 0), value=float("-inf"))
            far = y, weight
        return self._join(near, far, v, context), state

    def _join(self, near, far, v: Tensor, context: Context) -> Tensor:
        far = None if context.branch == "window" else far
        if near is None and far is None:
            return v.new_zeros(v.shape[0], self.geometry.heads, *v.shape[2:])
        return join(self.config.combine, near, far).to(v.dtype)

    def _sinks(self, name: str, new: Tensor, past: LinearizedCacheLayer | None) -> Tensor:
        """Keys or values of the first s tokens of each row, some of which may be among the new ones."""
        s, T = self.config.sinks, new.shape[2]
        first = new[:, :, :s] if s <= T else F.pad(new, (0, 0, 0, s - T))
        if past is None or s == 0:
            return first
        count = past.tensors["count"][:, None]
        slot = torch.arange(s, device=new.device)
        index = (slot - count).clamp(min=0, max=T - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        old = past.tensors[name][:, :, :s].to(new.dtype)
        return torch.where((slot < count)[:, None, :, None], old, new.gather(2, index))

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, read: Tensor, carry: Tensor,
        context: Context, past: LinearizedCacheLayer,
    ) -> Tensor:  # fmt: skip
        """One decoding step: the token that the new one overwrites in the ring is the one that enters the memory."""
        kept = past.tensors
        key = ("step", past.window, past.sinks, q.device)
        if key not in context.shared:
            # Every layer of one shape is at the same token, so the first one finds the slots for all.
            leaving = kept["count"] >= past.window + past.sinks
            context.shared[key] = (
                past.slot_of_next()[:, None, None, None],
                torch.zeros((), device=q.device).masked_fill(~past.filled(), float("-inf")).unsqueeze(1),
                leaving[:, None, None, None].to(k.dtype),
            )
        slot, bias, leaving = context.shared[key]
        writes, near, far = (), None, None
        if self.delayed:
            writes = tuple(w * leaving for w in self.write(*(_take(kept[n], slot) for n in ("k", "carry", "v"))))
        elif self.recurrent:
            writes = self.write(k, carry, v)
        new = {"k": k, "v": v, "carry": carry}
        for name in self.slots():
            x = new[name].to(kept[name].dtype)
            kept[name].scatter_(2, slot.expand_as(x), x)
        if self.windowed and context.branch != "memory":
            near = slot_attention(
                q, kept["k"], kept["v"], bias,
                scaling=context.scaling, softcap=context.softcap, extra=context.extra,
            )  # fmt: skip
        if self.recurrent:
            y, weight, _ = self.recur(read, writes, past.state, decoding=True)
            far = y, weight
        past.advance(1, 1)
        return self._join(near, far, v, context)


def _take(x: Tensor, slot: Tensor) -> Tensor:
    """The token in each row's slot [B, 1, 1, 1] of x [B, heads, S, width] -> [B, heads, 1, width]."""
    return x.gather(2, slot.expand(-1, x.shape[1], 1, x.shape[3]))


def join(combine: str, window: tuple[Tensor, Tensor] | None, memory: tuple[Tensor, Tensor | None] | None) -> Tensor:
    """One output [B, H, T, V] from the two branches; None for a branch that is off.

    Args:
        combine: memory: (e^lse y + e^w m) / (e^lse + e^w), one softmax over window and memory; otherwise the sum,
            halved for liger.
        window: y [B, H, T, V] and lse [B, H, T].
        memory: m [B, H, T, V] and its log weight w [B, H, T].
    """
    if combine == "memory" and window is not None and memory is not None:
        (y, lse), (m, weight) = window, memory
        assert weight is not None
        return torch.lerp(y.to(m.dtype), m, (weight - lse).sigmoid().unsqueeze(-1))
    parts = [branch[0] for branch in (window, memory) if branch is not None]
    total = parts[0] + parts[1] if len(parts) == 2 else parts[0]
    return 0.5 * total if combine == "liger" else total
