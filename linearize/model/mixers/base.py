"""What a mixer is: an exact window with sinks, a recurrence for what lies behind it, and how the two are joined.

Letters as in ops/: B rows, H query heads, G key/value heads, T tokens, K key width, V value width, W window, s sinks. A
mixer gets q, k, v as the source's own code made them (after biases, norms, RoPE) and returns what attention would; it
knows no architecture.

combine = memory, a delayed recurrence: token j enters the recurrent state when it leaves the window of the
query, so no token is counted twice and the first W + s tokens see exactly the source's attention. A recurrence that
knows how much it weighs shares one softmax with the window; any other is added through a gate per head that starts
closed. liger: 0.5·window + 0.5·recurrence over all tokens (arXiv 2503.01496). none: one branch alone.
"""

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cache import LinearizedCacheLayer, cache_layer
from ..decoding import Step
from ..ops.rows import Rows, in_parts
from ..ops.window import slot_attention, window_attention
from ..passes import Branch, Context, Pass
from ..stack import Stack
from ..tokens import Geometry, Tokens
from .config import MixerConfig
from .exact import Kept


class Mixer(Kept):
    """Base of all mixers; recurrence.py has what a recurrent one defines, exact.py what a cache keeps of it.

    Attributes:
        window: in force now; that of the configuration, unless `branches.windows` cuts it.
        sinks: the same.
        windowed: whether it has a window.
        delayed: whether a token enters the state only when it leaves the window.
        kept_width: C of `kept_features`.
        gate: [H] or None. A memory with a log weight gets it added (`calibrated`); any other is multiplied by tanh of
            it, which starts at 0: the plain window.
    """

    def __init__(self, config: MixerConfig, geometry: Geometry):
        super().__init__(config, geometry)
        self.window, self.sinks = config.window, config.sinks
        self.windowed = config.combine != "none" or not self.recurrent
        self.delayed = self.recurrent and config.combine == "memory"
        gated = self.delayed and (config.calibrated or not self.weighted)
        self.gate = nn.Parameter(torch.zeros(geometry.heads)) if gated else None
        kept = self.kept_features(torch.zeros(1, geometry.kv_heads, 1, geometry.key_width), lambda k: k)
        self.kept_width = 0 if kept is None else kept.shape[-1]

    # --- the hybrid

    @property
    def late(self) -> bool:
        """Whether the cache can take tokens back: none is in the state before it leaves the window."""
        return self.windowed and (self.delayed or not self.recurrent)

    @cached_property
    def token_shape(self) -> tuple[int, int]:
        """(heads, width) of what the cache keeps of each token in reach; width 0 where no token is kept."""
        g = self.geometry
        kept = self.kept_width if self.delayed else 0
        return g.kv_heads, g.key_width + g.value_width + 2 + kept if self.windowed else 0

    @cached_property
    def alike(self) -> tuple | None:
        """Equal for mixers whose updates are the same function; None for one with weights of its own."""
        own = any(name not in self.read_by for name, _ in self.named_parameters())
        g = self.geometry if self.scheduled else replace(self.geometry, missing=())
        return None if own else (type(self), replace(self.config, softmax_heads=()), g)

    def state_bytes(self, batch: int, dtype_bytes: int) -> int:
        """Bytes of cache of one layer, whatever the context length; heads that stay softmax are not its own.

        Args:
            batch: rows.
            dtype_bytes: of an element of the kept tokens.
        """
        heads, width = self.token_shape
        kept = heads * width * (self.config.window + self.config.sinks) * dtype_bytes
        state = sum(x.nbytes for x in self.stored_state(1, torch.device("meta")))
        return batch * (kept + state + torch.int64.itemsize)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """What attention would return.

        Args:
            q: [B, H, T, K] as the source rotates them.
            k: [B, G, T, K], the same.
            v: [B, G, T, V].
            context: of the call. Its cache is continued and updated.

        Returns:
            y [B, H, T, V] in v's dtype.
        """
        rows, layer = context.rows, None
        if context.cache is not None:
            layer = cache_layer(context.cache, context.layer_idx, self.window, self.sinks, late=self.late)
            layer.check_start(rows)
        past = layer if layer is not None and layer.is_initialized else None
        T = q.shape[2]
        if past is not None and T == 1 and rows is None:
            return self._step(q, k, v, context, past)
        query, tokens = self._prepare(q, k, v, context)

        def run(part: Rows | None, layer: LinearizedCacheLayer | None) -> Tensor:
            if part is None:
                lengths = torch.full((q.shape[0],), T, device=q.device)
                return self._pass(Pass(q, query, tokens.x, None, lengths), context, layer)
            own = [part.gather(x) for x in (q, query, tokens.x)]
            block = Pass(own[0], own[1], own[2], part.valid, part.valid.sum(1))
            return part.scatter(self._pass(block, context, layer))

        y = in_parts(rows, layer, run)
        if layer is not None:
            layer.advance(0, T)
            layer.remember(None if rows is None or rows.packed else rows.real, T)
        return y

    def _pass(self, block: "Pass", context: Context, layer: LinearizedCacheLayer | None) -> Tensor:
        """A block of tokens, of an empty cache, or behind those in the layer, which then holds them; y [B, H, T, V]."""
        if layer is None:
            return self._join(*self._block(block, context, None)[:2], block.q, context)
        if layer.rollback and block.q.shape[2] > layer.rollback:
            certain, rest, put_together = block.parted(layer.rollback)
            passed = certain.q.shape[2]
            before = self._cached(certain, context, layer, True)
            return put_together(before, self._cached(rest, context, layer, False, passed))
        return self._cached(block, context, layer, not layer.rollback)

    def _cached(
        self, block: "Pass", context: Context, layer: LinearizedCacheLayer, certain: bool, passed: int = 0
    ) -> Tensor:
        """A block of tokens behind those in the cache, which then holds them too; y [B, H, T, V].

        Args:
            block: the tokens.
            context: of the call.
            layer: of the cache.
            passed: tokens of the same forward pass that came before.
            certain: whether none of them will be taken back, so that the state may take in what leaves the window.
        """
        near, far, state = self._block(block, context, layer if layer.is_initialized else None, passed)
        y = self._join(near, far, block.q, context)
        if not layer.is_initialized:
            states = self.stored_state(block.q.shape[0], block.q.device)
            layer.lazy_initialization(block.q.shape[0], block.x, self.token_shape, states)
        if self.windowed:
            layer.extend(block.x[..., : self.token_shape[1]], block.lengths)
        layer.advance(block.lengths, 0)
        if certain:
            for cached, final in zip(layer.state, self.stored(state), strict=True):
                cached.copy_(final.detach())
            layer.settle()
        return y

    def branches(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context
    ) -> tuple[Branch | None, Branch | None]:  # fmt: skip
        """Window and recurrence as they are before they are joined, for rows that start here and have no padding;
        None for one that is off or has seen no token. Arguments as of `forward`."""
        query, tokens = self._prepare(q, k, v, context)
        return self._block(Pass(q, query, tokens.x, None, q.new_empty(0)), context, None)[:2]

    def _prepare(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tokens]:
        query = self.query(q, context) if self.recurrent else q
        kept = self.kept_features(k, context.unrotate) if self.recurrent else None
        return query, Tokens.join(k, v, kept, k.new_ones(*k.shape[:3], 1), self.geometry)

    def _block(
        self, block: "Pass", context: Context, past: LinearizedCacheLayer | None, passed: int = 0
    ) -> tuple[Branch | None, Branch | None, tuple[Tensor, ...]]:
        """Several tokens at once: both branches, and the state after the last real token of each row."""
        W, s = self.window, self.sinks
        q, query, x, real, _ = block
        T = q.shape[2]
        seen = 0 if past is None else past.tensors["count"]
        wait = 0 if past is None or not self.delayed else past.pending()
        state = self.empty_state(q.shape[0], q.device) if past is None else self.opened(past.state)
        near = far = None

        if self.windowed:
            before = x.new_zeros(*x.shape[:2], W, x.shape[3]) if past is None else past.in_order(wait).to(x.dtype)
            if before.shape[3] < x.shape[3]:  # features that no cache keeps
                x = x[..., : before.shape[3]]
            x = torch.cat([before, x], dim=2)
            local = Tokens(x[:, :, wait:], self.geometry)
            if context.branch != "memory":
                sinks = Tokens(self._sinks(local.x[:, :, W:], past), self.geometry)
                near = Branch(*window_attention(
                    q, local.k, local.v, sinks.k, sinks.v,
                    seen=seen, window=W, scaling=context.scaling, softcap=context.softcap, extra=context.extra,
                ))  # fmt: skip
        # Of a fresh row, only tokens s … T − W − 1 leave the window, and only queries from W + s on can see them.
        skip = W + s if self.delayed and past is None else 0
        if self.recurrent and skip < T:
            entering, keep = block.x, None if real is None else real[:, skip:]
            if self.delayed:
                # Those that wait come first, with queries that ask nothing.
                entering, query = x[:, :, skip : wait + T], F.pad(query, (0, 0, wait, 0))
                if past is not None or keep is not None:
                    token = (seen.view(-1, 1) if isinstance(seen, Tensor) else seen) - W
                    left = token + torch.arange(skip - wait, T, device=q.device) >= s
                    if wait and past is not None:
                        new = token + torch.arange(-wait, T, device=q.device) >= past.tensors["settled"][:, None] - W
                        left &= new
                    keep = left if keep is None else F.pad(keep, (wait, 0), value=True) & left
            if keep is not None:
                entering = entering * keep[:, None, :, None]
            most = 0 if past is None else past.entered(self.delayed, passed)
            given = replace(context, taken=most, whole=past is None and keep is None)
            asking = F.pad(q[:, :, skip:], (0, 0, wait, 0)) if wait else q[:, :, skip:]
            far, kept, state = self.run(asking, query[:, :, skip:], Tokens(entering, self.geometry), state, given)
            far = far.placed(wait, skip)
            if kept is not None and near is not None and context.branch == "all":
                near = near.joined(kept.placed(wait, skip))
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
        step, index = together or (Step(self, Stack.of([past])), 0)
        near = far = memory = None
        late = self.kept_features(k, context.unrotate) if self.recurrent and not self.delayed else None
        new = Tokens.join(k, v, late, step.one, self.geometry)
        if self.recurrent:
            if not self.delayed:
                self.take_in(new, past.state)
            state = self.opened(step.state(index, past))
            answer, kept = self.answer(q, self.query(q, context), state, context)
            if self.weighted and self.delayed and context.branch == "all":
                memory = answer
                if self.gate is not None:
                    memory = memory + F.pad(self.gate.float()[:, None, None], (memory.shape[-1] - 1, 0))
            if kept is not None and context.branch == "all":
                kept = kept if memory is None else kept.joined(Branch(memory[..., :-1], memory[..., -1]))
                memory = self.joined(*kept)
            far = Branch(answer[..., :-1] if self.weighted else answer, None)
        if self.windowed:
            cached = past.tensors["tokens"]
            width = min(new.x.shape[-1], cached.shape[-1])
            cached.scatter_(2, step.slot[..., :width], new.x[..., :width])
        if self.windowed and context.branch != "memory":
            keys, values = step.slots[index]
            y = slot_attention(
                q, keys, values, step.bias,
                scaling=context.scaling, softcap=context.softcap, extra=context.extra, memory=memory,
            )  # fmt: skip
            near = Branch(y, None)
        if together is None:
            step.finish(context.unrotate)
        return y if self.weighted and memory is not None else self._join(near, far, q, context)

    def _join(self, near: Branch | None, far: Branch | None, q: Tensor, context: Context) -> Tensor:
        """One output [B, H, T, V] from the two branches."""
        combine = self.config.combine
        if context.branch == "window":
            far = None
        if far is not None and combine == "memory":
            m, weight = far
            gate = m.new_zeros(1, 1) if self.gate is None else self.gate.to(m.dtype)[:, None]
            if not self.weighted:
                far = Branch(m * gate.unsqueeze(-1).tanh(), None)
            elif weight is not None and near is not None and near.log_weight is not None:
                return near.joined(Branch(m, weight + gate)).y.to(q.dtype)
        parts = [branch.y for branch in (near, far) if branch is not None]
        if not parts:
            return q.new_zeros(*q.shape[:3], self.geometry.value_width)
        total = parts[0] + parts[1] if len(parts) == 2 else parts[0]
        return (0.5 * total if combine == "liger" else total).to(q.dtype)
