"""What a mixer is: an exact window with sinks, a recurrence for what lies behind it, and how the two are joined.

Letters as in ops/: B rows, H query heads, G key/value heads, T tokens, K key width, V value width, W window, s sinks. A mixer
gets q, k, v as the source's own code made them (after biases, norms, RoPE) and returns what attention would; it knows no architecture.

combine = memory (DESIGN: delayed recurrence): token j enters the recurrent state when it leaves the window of the query, so no token is
counted twice and the first W + s tokens see exactly the source's attention. liger: 0.5·window + 0.5·recurrence over
all tokens (arXiv 2503.01496). none: one branch alone.
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
        unrotate: (q, k) -> (q, k) before RoPE.
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
    unrotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    rows: Rows | None
    cache: Cache | None
    branch: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    shared: dict = field(default_factory=dict)


class Mixer(nn.Module):
    """Base of all mixers. A recurrent one defines `write`, `read`, `recur` and `empty_state`; the rest is here.

    The one rule of a recurrence: a token whose writes are all zero leaves the state exactly as it was.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MixerConfig]] = MixerConfig
    combines: ClassVar[tuple[str, ...]] = ("memory", "liger", "none")
    recurrent: ClassVar[bool] = True
    windowed: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, geometry: Geometry):
        super().__init__()
        self.config, self.geometry = config, geometry
        self.windowed_now = self.windowed and config.combine != "none" or not self.recurrent
        self.delayed = self.recurrent and config.combine == "memory"

    # --- what a recurrent mixer's file defines -------------------------------------------------------------------------

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Unrotated keys [B, G, T, K] and values [B, G, T, V] -> what the recurrence needs of each token, [B, G, T, ·] each."""
        raise TypeError(f"{self.name} has no recurrence")

    def read(self, q: Tensor) -> Tensor:
        """Unrotated queries [B, H, T, K] -> what reads the state."""
        raise TypeError(f"{self.name} has no recurrence")

    def recur(
        self, q: Tensor, writes: tuple[Tensor, ...], state: tuple[Tensor, ...] | None, decoding: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run it over T tokens; token t's write is visible to query t. `decoding`: T = 1, `state` is updated in place.

        Returns:
            what `join` needs, [B, H, T, ·] fp32, and the state after the last token.
        """
        raise TypeError(f"{self.name} has no recurrence")

    def join(self, y: Tensor | None, lse: Tensor | None, memory: Tensor | None) -> Tensor:
        """Window output y [B, H, T, V] with lse [B, H, T], and what `recur` returned; None for a branch that is off."""
        if self.config.combine == "memory":
            return join_normalised(y, lse, memory, self.log_strength())
        parts = [x if self.config.combine == "none" else 0.5 * x for x in (y, memory) if x is not None]
        return torch.stack(parts).sum(0)

    def log_strength(self) -> Tensor | float:
        """c of the shared normaliser: a number, or [H]."""
        raise TypeError(f"{self.name} has no shared normaliser")

    def empty_state(self, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        """The fp32 state of rows that have seen nothing."""
        return ()

    # --- the hybrid ----------------------------------------------------------------------------------------------------

    def slots(self) -> dict[str, tuple[int, int]]:
        """What the cache keeps per token in reach: name -> (heads, width)."""
        g = self.geometry
        if not self.windowed_now:
            return {}
        slots = {"k": (g.kv_heads, g.key_width), "v": (g.kv_heads, g.value_width)}
        if self.delayed:
            slots["raw_k"] = (g.kv_heads, g.key_width)
        return slots

    def state_bytes(self, batch: int, dtype_bytes: int) -> int:
        """Bytes of cache of one layer, whatever the context length."""
        tokens = self.config.window + self.config.sinks
        kept = sum(heads * width for heads, width in self.slots().values()) * tokens * dtype_bytes
        state = sum(x.nbytes for x in self.empty_state(1, torch.device("meta")))
        return batch * (kept + state + torch.int64.itemsize)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """q [B, H, T, K], k [B, G, T, K], v [B, G, T, V] -> y [B, H, T, V] in v's dtype."""
        raw_q, raw_k = context.unrotate(q, k) if self.recurrent else (None, None)
        rows, layer = context.rows, None
        if context.cache is not None:
            layer = cache_layer(context.cache, context.layer_idx, self.config.window, self.config.sinks)
        if layer is not None and layer.is_initialized and q.shape[2] == 1 and rows is None:
            return self._step(q, k, v, raw_q, raw_k, context, layer)
        T = q.shape[2]
        lengths = torch.full((q.shape[0],), T, device=q.device)
        real = None
        if rows is not None:
            if rows.packed and layer is not None and layer.is_initialized:
                raise ValueError("packed documents can only start an empty cache")
            q, k, v = rows.gather(q), rows.gather(k), rows.gather(v)
            if self.recurrent:
                raw_q, raw_k = rows.gather(raw_q), rows.gather(raw_k)
            real, lengths = rows.valid, rows.valid.sum(1)
        y, finals = self._block(q, k, v, raw_q, raw_k, context, layer, real)
        if layer is not None:
            new = {"k": k, "v": v, "raw_k": raw_k}
            if not layer.is_initialized:
                states = self.empty_state(q.shape[0], q.device)
                layer.lazy_initialization(q.shape[0], k, self.slots(), {f"state_{i}": x for i, x in enumerate(states)})
            layer.extend({n: new[n] for n in self.slots()}, lengths)
            for kept, final in zip(layer.state, finals, strict=True):
                kept.copy_(final.detach())
            layer.advance(lengths, T)
            if rows is not None and rows.packed:
                layer.batch_select_indices(rows.last)
        return y if rows is None else rows.scatter(y)

    def _block(self, q, k, v, raw_q, raw_k, context: Context, layer, real) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Several tokens at once: outputs, and the state after the last real token of each row."""
        W, s = self.config.window, self.config.sinks
        B, _, T, _ = q.shape
        fresh = layer is None or not layer.is_initialized
        seen = 0 if fresh else layer.tensors["count"]
        state = None if fresh else layer.state

        def local(name: str, new: Tensor) -> Tensor:
            return F.pad(new, (0, 0, W, 0)) if fresh else torch.cat([layer.in_order(name).to(new.dtype), new], dim=2)

        y = lse = memory = None
        if self.windowed_now:
            local_v = local("v", v)
            if context.branch != "memory":
                sink_k, sink_v = (self._sinks(n, x, layer, fresh) for n, x in (("k", k), ("v", v)))
                y, lse = window_attention(
                    q, local("k", k), local_v, sink_k, sink_v,
                    seen=seen, window=W, scaling=context.scaling, softcap=context.softcap, extra=context.extra,
                )  # fmt: skip
        if not self.recurrent:
            return y, ()
        if not self.delayed:
            writes = self.write(raw_k, v)
            if real is not None:
                writes = tuple(w * real[:, None, :, None] for w in writes)
            memory, state = self.recur(self.read(raw_q), writes, state, decoding=False)
        elif fresh and T <= W + s:
            state = self.empty_state(B, q.device)
        else:
            # Of a fresh row, only tokens s … T − W − 1 leave the window, and only queries from W + s on can see them.
            skip = W + s if fresh else 0
            leaving_k, leaving_v = local("raw_k", raw_k)[:, :, skip:T], local_v[:, :, skip:T]
            writes = self.write(leaving_k, leaving_v)
            if not fresh or real is not None:
                e = torch.arange(skip, T, device=q.device)
                keep = torch.as_tensor(seen, device=q.device).view(-1, 1) + e - W >= s
                keep = keep if real is None else keep & real[:, skip:]
                writes = tuple(w * keep[:, None, :, None] for w in writes)
            memory, state = self.recur(self.read(raw_q[:, :, skip:]), writes, state, decoding=False)
            memory = F.pad(memory, (0, 0, skip, 0))
        if context.branch == "window":
            memory = None
        return self.join(y, lse, memory).to(v.dtype), state

    def _sinks(self, name: str, new: Tensor, layer, fresh: bool) -> Tensor:
        """Keys or values of the first s tokens of each row, some of which may be among the new ones."""
        s, T = self.config.sinks, new.shape[2]
        first = new[:, :, :s] if T >= s else F.pad(new, (0, 0, 0, s - T))
        if fresh or s == 0:
            return first
        count = layer.tensors["count"][:, None]
        slot = torch.arange(s, device=new.device)
        index = (slot - count).clamp(min=0, max=T - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        old = layer.tensors[name][:, :, :s].to(new.dtype)
        return torch.where((slot < count)[:, None, :, None], old, new.gather(2, index))

    def _step(self, q, k, v, raw_q, raw_k, context: Context, layer: LinearizedCacheLayer) -> Tensor:
        """One decoding step: the token that the new one overwrites in the ring is the one that enters the memory."""
        W, s = self.config.window, self.config.sinks
        kept = layer.tensors
        key = ("step", W, s, q.device)
        if key not in context.shared:
            context.shared[key] = (
                layer.slot_of_next()[:, None, None, None],
                layer.filled(),
                (kept["count"] >= W + s)[:, None, None, None],
            )
        slot, filled, leaving = context.shared[key]
        writes = ()
        if self.delayed:
            old = [kept[n].gather(2, slot.expand(-1, *kept[n].shape[1:2], 1, kept[n].shape[3])) for n in ("raw_k", "v")]
            writes = tuple(w * leaving for w in self.write(*old))
        elif self.recurrent:
            writes = self.write(raw_k, v)
        new = {"k": k, "v": v, "raw_k": raw_k}
        for name in self.slots():
            x = new[name].to(kept[name].dtype)
            kept[name].scatter_(2, slot.expand_as(x), x)
        y = lse = memory = None
        if self.windowed_now and context.branch != "memory":
            y, lse = slot_attention(
                q, kept["k"], kept["v"], filled,
                scaling=context.scaling, softcap=context.softcap, extra=context.extra,
            )  # fmt: skip
        if self.recurrent:
            memory, _ = self.recur(self.read(raw_q), writes, layer.state, decoding=True)
        layer.advance(1, 1)
        if not self.recurrent:
            return y
        return self.join(y, lse, None if context.branch == "window" else memory).to(v.dtype)


def join_normalised(
    y: Tensor | None, lse: Tensor | None, memory: Tensor | None, log_strength: Tensor | float
) -> Tensor:
    """One softmax-like average over window and memory: (e^lse y + e^c Σ w v) / (e^lse + e^c Σ w).

    Args:
        y, lse: window output [B, H, T, V] and log normaliser [B, H, T], or None.
        memory: [B, H, T, V + 1] fp32, Σ w v with Σ w in the last column, or None.
        log_strength: c, a number or [H].
    """
    if memory is None:
        return y
    num, den = memory[..., :-1], memory[..., -1:]
    if y is None:
        return num / den.clamp(min=torch.finfo(den.dtype).tiny)
    c = torch.as_tensor(log_strength, device=den.device, dtype=den.dtype).view(-1, 1, 1)
    ratio = (c - lse.unsqueeze(-1)).exp()
    return (y + ratio * num) / (1 + ratio * den)
