"""A linearized model: the source's own classes of transformers with other attention, for trust_remote_code.

Put together by linearize 0.1.0 (Apache-2.0) from its own modules, unchanged: those in _MODULES, and modeling.py
below them. Mixers here: gated_deltanet, softmax, window. With the package `linearize` installed this file is not read.
"""

import importlib
import importlib.util
import re
import sys

_PACKAGES = ['mixers', 'ops']
_MODULES = {"": ""}

_MODULES['archs'] = r'''"""What an architecture needs told, and how to find out the rest by looking.

Almost everything comes from the source's own code; a row here holds only what cannot be seen in a module.
"""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from linearize.errors import InputError
from linearize.mixers.base import Geometry

RECORD = Path(__file__).with_name("archs.json")
"""Which architectures passed `linearize.probe`, and why the others did not; written by scripts/probe_archs.py."""
UNTRIED = "no tiny model"
"""How the reason begins where there was nothing to judge."""


@dataclass(frozen=True)
class Arch:
    """One row.

    Attributes:
        rotates: attention module -> whether this layer applies RoPE (some skip it in some layers).
        half_angles: cos and sin come once per pair of channels, half as wide as what they rotate.
        drops_arguments: the decoder layer does not pass keyword arguments that it does not know on to its attention.
        enters: path of the module that the causal LM calls with the padding mask, where that is not its base model.
    """

    rotates: Callable[[Any], bool] = lambda attention: True
    half_angles: bool = False
    drops_arguments: bool = False
    enters: str | None = None


_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
# What the modules inside an attention that play a role are called, and those of the MLP beside it.
ROLES = {
    "q": ("q_proj", *_FUSED),
    "k": ("k_proj", *_FUSED),
    "v": ("v_proj", *_FUSED),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "Wo"),
}
MLP = (
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    *("fc1", "fc2", "c_fc", "c_proj", "dense_h_to_4h", "dense_4h_to_h", "Wi"),
)


def _slides(attention: Any) -> bool:
    return attention.sliding_window is not None


def _local(attention: Any) -> bool:
    return attention.sliding_window is None or attention.is_sliding


ARCHS: dict[str, Arch] = {
    "afmoe": Arch(rotates=lambda attention: attention.is_local_attention),
    "cohere2": Arch(rotates=_slides),
    "cohere2_moe": Arch(rotates=lambda attention: _slides(attention) or attention.force_rope),
    "exaone4": Arch(rotates=_local),
    "exaone_moe": Arch(rotates=_local),
    "flint": Arch(rotates=_slides),
    "gpt_oss": Arch(half_angles=True),
    "nemotron": Arch(drops_arguments=True),
    "opt": Arch(enters="model.decoder"),
    "smollm3": Arch(rotates=lambda attention: bool(attention.use_rope)),
    "stablelm": Arch(drops_arguments=True),
}


def arch_of(config: PreTrainedConfig) -> Arch:
    """The row of a source or linearized configuration, the default where there is none."""
    block = getattr(config, "linearize", None)
    return ARCHS.get(block["source"]["model_type"] if block else config.model_type, Arch())


@cache
def record() -> dict[str, Any]:
    """Which model types passed the probe with which version of transformers, and why the others did not."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def check_supported(model_type: str) -> None:
    """Refuse an architecture that is known not to work; one that nobody has tried is not refused.

    Raises:
        InputError: the probe failed on it.
    """
    why = record()["fails"].get(model_type, UNTRIED)
    if not why.startswith(UNTRIED):
        raise InputError(
            f"model type {model_type!r}: does not pass the probe ({why}); `linearize archs` lists what can, "
            "`linearize archs --probe MODEL` shows what is missing in another version of transformers"
        )


def attention_layers(model: nn.Module) -> dict[int, str]:
    """Layer index -> path of its attention module, found by what attention modules have in transformers.

    Raises:
        InputError: no module that calls a registered attention function.
    """
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "is_causal") and index not in found and _routable(module):
            found[index] = path
    if not found:
        kind = model.config.model_type  # type: ignore[union-attr]
        raise InputError(
            f"model type {kind!r}: its attention does not go through transformers' attention interface, so it cannot "
            "be replaced without copying its code; `linearize archs` lists what can"
        )
    return dict(sorted(found.items()))


def _routable(module: nn.Module) -> bool:
    cls = getattr(type(module), "source_class", type(module))
    takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls.forward).parameters.values())
    return takes_kwargs and hasattr(sys.modules[cls.__module__], "ALL_ATTENTION_FUNCTIONS")


def reach(config: PreTrainedConfig, layer: int) -> int | None:
    """Tokens that the source's attention in a layer keeps: its sliding window, None for all, 0 where it has none."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return window
    if kinds[layer] in ("sliding_attention", "chunked_attention"):
        return window if kinds[layer] == "sliding_attention" else getattr(config, "attention_chunk_size", None)
    return None if "attention" in kinds[layer] and kinds[layer] != "linear_attention" else 0


def full_layers(paths: dict[int, str], config: PreTrainedConfig) -> list[int]:
    """The attention layers that see the whole text; those of a source that slides a window in every layer are all."""
    return [i for i in paths if reach(config, i) is None] or list(paths)


def check_layers(paths: dict[int, str], layers: list[int] | None, config: PreTrainedConfig) -> list[int]:
    """The chosen layers, in order; None chooses those of `full_layers`.

    Raises:
        InputError: an index that names no attention layer.
    """
    chosen = sorted(set(full_layers(paths, config) if layers is None else layers))
    wrong = [i for i in chosen if i not in paths]
    if wrong:
        raise InputError(
            f"layers: found {', '.join(map(str, wrong))}; this model has attention in layers {min(paths)} to "
            f"{max(paths)}"
        )
    if not chosen:
        raise InputError("layers: none is left to linearize; expected at least one")
    return chosen


def geometry(config: PreTrainedConfig, module: Any = None) -> Geometry:
    """Heads and widths of an attention layer, from the module where it knows better than the configuration."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if module is not None:
        kv_heads = heads // getattr(module, "num_key_value_groups", 1)
    widths = (getattr(o, n, None) for o, n in ((module, "head_dim"), (module, "head_size"), (config, "head_dim")))
    width = next((w for w in widths if w), config.hidden_size // heads)
    return Geometry(heads, kv_heads, width, width)


def unrotate(module: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys [B, heads, T, K] as they were before RoPE, in fp32: the source's own rotation, run backwards."""
    x = x.float()
    if position_embeddings is None or not module.rotates:
        return x
    cos, sin = (e.float() for e in position_embeddings)
    sin = -sin
    apply = sys.modules[module.source_class.__module__].apply_rotary_pos_emb
    width = cos.shape[-1] * (2 if arch_of(module.source_config).half_angles else 1)
    if any(kind in str(getattr(module.source_config, "rope_parameters", "")) for kind in ("yarn", "longrope")):
        # These multiply cos and sin by a factor; its square divides out.
        square = cos[..., :1] ** 2 + sin[..., :1] ** 2
        cos, sin = cos / square, sin / square
    # It rotates queries and keys; the second place gets no heads.
    raw = apply(x[..., :width], x[:, :0, :, :width], cos, sin)[0]
    return raw if width == x.shape[-1] else torch.cat([raw, x[..., width:]], -1)


def unrotate_layers(layers: list[tuple[Any, Any]]) -> Callable[[Tensor], Tensor]:
    """`unrotate` for one token of several layers at once, each an attention module and its position embeddings: keys
    [L·B, G, 1, K] of the layers one after the other."""

    def run(x: Tensor) -> Tensor:
        K = x.shape[-1]
        # [B, L, G, K]: layers beside heads, so that a rotation they share is one product.
        x = x.float().unflatten(0, (len(layers), -1)).squeeze(3).transpose(0, 1)
        basis = torch.eye(K, device=x.device).view(1, K, 1, K)
        known: dict[Any, Tensor] = {}
        matrices = []
        for module, where in layers:
            angles = where[0] if where is not None and module.rotates else None
            key = None if angles is None else id(angles)
            if key not in known:
                batch = 1 if angles is None else angles.shape[0]
                known[key] = unrotate(module, basis.expand(batch, -1, -1, -1), where).squeeze(2)
            matrices.append(known[key])
        if len(known) == 1:
            raw = (x.flatten(1, 2) @ matrices[0]).view(x.shape)
        else:
            raw = x @ torch.stack([m.expand(x.shape[0], -1, -1) for m in matrices], 1)
        return raw.transpose(0, 1).unsqueeze(3).flatten(0, 1)

    return run


def role_modules(model: nn.Module, roles: list[str] | tuple[str, ...]) -> list[str]:
    """Full names of the linear modules that play the given roles in the linearized layers, for peft's target_modules.

    A projection that makes queries, keys and values at once plays all three roles.

    Args:
        model: a linearized model.
        roles: of q, k, v, o, mlp.

    Raises:
        InputError: an unknown role, or one that no module plays.
    """
    linearized = {int(i) for i in model.config.linearize["layers"]}  # type: ignore[union-attr]
    attentions = [f"{path}." for i, path in attention_layers(model).items() if i in linearized]
    blocks = [attention[:-1].rpartition(".")[0] + "." for attention in attentions]
    modules = [n for n, m in model.named_modules() if hasattr(m, "weight") and n.startswith(tuple(blocks))]
    inside = [n for n in modules if n.startswith(tuple(attentions))]
    outside = [n for n in modules if n not in inside]
    found: list[str] = []
    for role in roles:
        if role != "mlp" and role not in ROLES:
            raise InputError(f"roles: unknown role {role!r}; expected some of {', '.join((*ROLES, 'mlp'))}")
        names = MLP if role == "mlp" else ROLES[role]
        hits = [n for n in (outside if role == "mlp" else inside) if n.rpartition(".")[2] in names]
        if not hits:
            raise InputError(f"roles: {role!r} targets no module of this model; looked for {', '.join(names)}")
        found += [h for h in hits if h not in found]
    return found
'''

_MODULES['errors'] = r'''"""The one exception that reaches a user, and help with misspelt names. Standard library only."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(Exception):
    """The user asked for something that cannot be done.

    The text is one paragraph, *where: what was found; what is allowed; what to do*. The command line prints it to
    stderr and exits with code 2. Any other exception that reaches the user is a bug of this package.
    """


def suggest(name: str, options: Iterable[str]) -> str:
    """Name the options nearest to a misspelt name, then all of them.

    Args:
        name: what was typed.
        options: the names that exist.

    Returns:
        For example ``Did you mean 'gla'? Available: gla, softmax, window``.

    Example:
        >>> suggest("glaa", ["window", "gla"])
        "Did you mean 'gla'? Available: gla, window"
    """
    options = sorted(options)
    folded = {option.lower(): option for option in options}
    near = [folded[match] for match in get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
    guess = f"Did you mean {' or '.join(repr(option) for option in near)}? " if near else ""
    return f"{guess}Available: {', '.join(options) or 'none'}"
'''

_MODULES['mixers.base'] = r'''"""What a mixer is: an exact window with sinks, a recurrence for what lies behind it, and how the two are joined.

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

from linearize.cache import LinearizedCacheLayer, Stack, cache_layer
from linearize.mixers.step import Step
from linearize.mixers.tokens import Geometry, Tokens
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
'''

_MODULES['mixers'] = r'''"""The mixers a user can name. One file each; the file name is the mixer's name."""
from dataclasses import MISSING, fields
from typing import Any
from linearize.errors import InputError, suggest
from linearize.mixers import delta_net, gated_deltanet, softmax, window
from linearize.mixers.base import Context, Geometry, Mixer, MixerConfig
_FILES = (softmax, window, delta_net, gated_deltanet)
MIXERS: dict[str, type[Mixer]] = {m.Mixer.name: m.Mixer for m in _FILES}
__all__ = ['MIXERS', 'Context', 'Geometry', 'Mixer', 'MixerConfig', 'build_config']

def build_config(values: dict[str, Any]) -> MixerConfig:
    """The checked configuration of the mixer that `values["name"]` names.

    Raises:
        InputError: one paragraph that lists every problem: unknown name, unknown key, wrong type, value out of range.
    """
    name = values.get('name')
    if name not in MIXERS:
        raise InputError(f'mixer.name: unknown mixer {name!r}. {suggest(str(name), list(MIXERS))}')
    cls = MIXERS[name].Config
    known = {f.name: f for f in fields(cls)}
    problems = [f'mixer.{k}: unknown key. {suggest(k, list(known))}' for k in values if k not in known]
    good = {}
    for key, value in values.items():
        if key not in known:
            continue
        expected = type(known[key].default) if known[key].default is not MISSING else str
        if expected is float and isinstance(value, int) and (not isinstance(value, bool)):
            value = float(value)
        if expected is tuple and isinstance(value, list) and all((type(x) is int for x in value)):
            value = tuple(value)
        what = 'a list of whole numbers' if expected is tuple else expected.__name__
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            problems.append(f'mixer.{key}: found {value!r}; expected {what}')
        else:
            good[key] = value
    config = cls(**cls.preset(good.get('combine', cls.combine)) | good)
    problems += [f'mixer.{p}' for p in config.problems()]
    if config.combine not in MIXERS[name].combines:
        problems.append(f"mixer.combine: {config.combine!r} is not possible for {name}; allowed: {', '.join(MIXERS[name].combines)}")
    if problems:
        raise InputError('; '.join(problems))
    return config
'''

_MODULES['mixers.gated_deltanet'] = r'''"""The delta rule with a decay per head (Gated DeltaNet, arXiv 2412.06464).

S_t = α_t (I − β_t k̂_t k̂_tᵀ) S_{t-1} + β_t k̂_t v_tᵀ,  α_t = σ(k̄_t)^{1/τ},  y_t = S_tᵀ q̂_t.

k̄, β, k̂ and q̂ are those of delta_net, rotated keys and queries too: a decay that all channels share does not disturb
relative positions.

State per layer: 4·G·K·V bytes. New weights: 0; combine: memory adds the gate, one number per query head, that starts
closed, and keeps one number (k̄) per token of the window.
"""

from dataclasses import dataclass

from torch.nn import functional as F

from linearize.mixers import delta_net


@dataclass(frozen=True)
class Config(delta_net.Config):
    """Attributes:
    gate_normalizer: τ. Where the mean of a key's channels is 0, the half-life is τ tokens.
    """

    gate_normalizer: float = 8192.0

    def problems(self):
        return super().problems() + self._above_zero("gate_normalizer")


class Mixer(delta_net.Mixer):
    name = "gated_deltanet"
    Config = Config

    def log_decay(self, tokens):
        return F.logsigmoid(tokens.carry.float()) / self.config.gate_normalizer
'''

_MODULES['mixers.delta_net'] = r'''"""The delta rule: a write replaces what its key read before (DeltaNet, arXiv 2406.06484; β up to 2, arXiv 2411.12537).

S_t = (I − β_t k̂_t k̂_tᵀ) S_{t-1} + β_t k̂_t v_tᵀ,  β_t = σ(k̄_t), or 2σ(k̄_t) for negative eigenvalues,  y_t = S_tᵀ q̂_t.

k̄ is the mean of the key's channels before RoPE. Queries and keys are taken as the source rotates them, and divided by
their length: rotations leave lengths as they are, and products of rotated keys depend on the distance of their tokens
alone, so the rule sees relative positions as the source does. With keys and queries of length 1, no write makes the
state longer, and a query that repeats a key reads the value written there.

State per layer: 4·G·K·V bytes. New weights: 0; combine: memory adds the gate, one number per query head, that starts
closed, and keeps one number (k̄) per token of the window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers import base
from linearize.ops import delta, run_delta
from linearize.ops.additive import look


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    negative_eigenvalues: β = 2σ(k̄) instead of σ(k̄): above 1, a write turns the sign of what its key read.
    """

    negative_eigenvalues: bool = False


class Mixer(base.Mixer):
    name = "delta_net"
    Config = Config

    @property
    def carry_width(self):
        return 1

    def query(self, q, context):
        return delta.unit(q)

    def carry(self, k, unrotate):
        return unrotate(k).mean(-1, keepdim=True)

    def log_decay(self, tokens) -> Tensor | None:
        """g ≤ 0, [B, G, T, 1 or K], of the tokens' carry; None for none."""
        return None

    def key(self, tokens) -> Tensor:
        return tokens.k

    def strength(self, tokens) -> Tensor:
        """β before the choice of its range, [B, G, T, 1]."""
        return tokens.carry.float().sigmoid()

    def write(self, tokens):
        beta = self.strength(tokens) * tokens.present
        g = self.log_decay(tokens)
        return (
            delta.unit(self.key(tokens)),
            tokens.v,
            2 * beta if self.config.negative_eigenvalues else beta,
            None if g is None else g * tokens.present,
        )

    def recur(self, read, writes, state, context):
        y, final = run_delta(read, *writes, state=state[0])
        return y, None, (final,)

    def absorb(self, writes, state):
        delta.absorb(*writes, state=state[0])

    def look(self, read, state, context):
        return look(read, state[0])

    def empty_state(self, batch, device):
        g = self.geometry
        return (torch.zeros(batch, g.kv_heads, g.key_width, g.value_width, device=device),)
'''

_MODULES['ops.delta'] = r'''"""The delta rule S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ, read as y_t = q_tᵀ S_t.

One family for DeltaNet (no decay, arXiv 2406.06484; β up to 2 for negative eigenvalues, arXiv 2411.12537), Gated
DeltaNet (one g per head, arXiv 2412.06464) and Kimi Delta Attention (one g per channel, arXiv 2510.26692). Letters and
shapes as in ops/additive.py: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V], beta [B, G, T, 1], log_decay g ≤ 0 of
shape [B, G, T, K], [B, G, T, 1], anything that broadcasts to it, or None; state [B, G, K, V] fp32. All forms compute in
fp32 (fp64 for fp64 inputs) and return (y [B, H, T, V] in q's dtype, state). The caller normalises the keys: the rule is
a contraction where β |k|² ≤ 2 and grows without bound beyond. A token with k or β zero and g = 0 leaves no trace.

In closed form, a token writes k_t u_tᵀ as in the additive recurrence, u_t = β_t (v_t − k_tᵀ diag(e^{g_t}) S_{t-1}), and
the u of a chunk solve one unit lower triangular system (the WY or UT transform of arXiv 2406.06484). So a chunk is
an affine map of the state, S -> M S + R, and only these maps are sequential. `solve_chunks` is this algebra;
ops/dplr.py uses it too.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.additive import CHUNK, LEAF, _pairs, _pairs_by_halves, _prepare, _to_ends, look

SMALLEST = 1e-6
"""Added to a square before its root is divided by: a key of zeros stays one, and its gradient is finite."""


def unit(x: Tensor) -> Tensor:
    """x / |x| over the channels, fp32 (fp64 for fp64 inputs): a key, or query, as the rule needs it."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + SMALLEST).rsqrt()


def naive_recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the other forms."""
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    beta = beta.to(v.dtype)
    y = []
    for t in range(q.shape[3]):
        if g is not None:
            S = S * g[:, :, t, :, None].exp()
        key = k[:, :, t, None]
        S = S + key.mT @ (beta[:, :, t, None] * (v[:, :, t, None] - key @ S))
        y.append(q[:, :, :, t] @ S)
    out = torch.stack(y, dim=3) if y else q.new_zeros(shape)
    return out.reshape(shape).to(dtype), S


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token (T = 1), updating `state` in place: the decoding step."""
    if state is None:
        return naive_recurrent(q, k, v, beta, log_decay)
    absorb(k, v, beta, log_decay, state)
    return look(q, state), state


def absorb(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    """The writes of one token, into `state`, in place. What it reads is `additive.look`."""
    dtype = state.dtype
    if log_decay is not None:
        state.mul_(log_decay.to(dtype).exp().mT)
    k = k.to(dtype)
    u = beta.to(dtype) * (v.to(dtype) - k @ state)
    state.flatten(0, 1).baddbmm_(k.flatten(0, 1).mT, u.flatten(0, 1))


def parallel(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once through T×T matrices, pair by pair: quadratic, for tests and for distillation."""
    return _in_chunks(q, k, v, beta, log_decay, state, q.shape[2], _pairs)


def materialise(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The mixer as an explicit matrix A [B, H, T, T], y = A v: what it makes of the unit vectors."""
    B, G, T, _ = k.shape
    unit = torch.eye(T, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device).expand(B, G, T, T)
    return torch.tril(parallel(q, k, unit, beta, log_decay)[0])


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens: a triangular system inside, a K×K map between them. Linear in T; exponents as in additive."""
    return _in_chunks(q, k, v, beta, log_decay, state, chunk_size(q.shape[2], chunk), pairs_of(log_decay))


def _in_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None, C: int,
    pairs: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype, (B, H, T, _) = q.dtype, q.shape
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    if T == 0:
        return q.new_zeros(B, H, T, v.shape[-1]).to(dtype), S
    q, k, v, beta = (into_chunks(x, C) for x in (q, k, v, beta.to(v.dtype)))
    g = None if g is None else into_chunks(g, C)
    rows = torch.cat([q.transpose(2, 3), k.unsqueeze(3)], dim=3)
    reach, kept, whole = _to_ends(rows, k, g)
    matrix = pairs(rows, k, g)
    y, S = solve_chunks(
        beta * matrix[..., -1, :, :],
        beta * v,
        beta * reach[..., -1, :, :],
        kept,
        whole,
        reach[..., :-1, :, :],
        torch.tril(matrix[..., :-1, :, :]),
        S,
    )
    return out_of_chunks(y, T).to(dtype), S


def chunk_size(T: int, chunk: int) -> int:
    """The chunk for T tokens: no larger than the next power of two."""
    return min(chunk, max(LEAF, 1 << (T - 1).bit_length()))


def pairs_of(log_decay: Tensor | None) -> Callable[..., Tensor]:
    """How a chunk's matrix of read-write products is made: directly unless every channel decays on its own."""
    return _pairs if log_decay is None or log_decay.shape[-1] == 1 else _pairs_by_halves


def into_chunks(x: Tensor, C: int) -> Tensor:
    """[..., T, ·] -> [..., N, C, ·], the last chunk filled with zeros, which leave no trace."""
    pad = -x.shape[-2] % C
    return (F.pad(x, (0, 0, 0, pad)) if pad else x).unflatten(-2, (-1, C))


def out_of_chunks(y: Tensor, T: int) -> Tensor:
    """[B, G, N, r, C, V] -> [B, H, T, V]."""
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :T]


def solve_chunks(
    L: Tensor, x: Tensor, w: Tensor, kept: Tensor, whole: Tensor, reach: Tensor, inside: Tensor, state: Tensor,
    write: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per chunk, U = (I + L)⁻¹ (x − w S), y = reach S + inside U, and S <- whole ∘ S + keptᵀ U + write.

    Args:
        L: [B, G, N, C, C], of which the part below the diagonal is used.
        x: [B, G, N, C, V]; w, kept: [B, G, N, C, K]; whole: broadcasts to [B, G, N, K, 1].
        reach: [B, G, N, r, C, K]; inside: [B, G, N, r, C, C].
        state: [B, G, K, V].
        write: [B, G, N, K, V], what enters the state beside U.

    Returns:
        y [B, G, N, r, C, V] and the last state.
    """
    K, V = w.shape[-1], x.shape[-1]
    U, W = torch.linalg.solve_triangular(L, torch.cat([x, w], -1), upper=False, unitriangular=True).split([V, K], -1)
    added = kept.mT @ U if write is None else kept.mT @ U + write
    moved = torch.diag_embed(whole.squeeze(-1).expand(*W.shape[:3], K)) - kept.mT @ W
    before = []
    for M, R in zip(moved.unbind(2), added.unbind(2), strict=True):
        before.append(state)
        state = R + M @ state
    starts = torch.stack(before, dim=2)
    U = U - W @ starts
    y = reach.flatten(3, 4) @ starts + inside.flatten(3, 4) @ U
    return y.unflatten(3, reach.shape[3:5]), state
'''

_MODULES['ops'] = r'''"""Recurrences, one family per file, and the choice of what runs them: PyTorch, or Triton kernels of
flash-linear-attention.

Mixers call `run_additive`, `run_delta`, or `run` of a family's own file. The kernels run on CUDA tensors where fla and
triton can be imported; everything else runs as the chunked form in PyTorch. The environment variable LINEARIZE_BACKEND,
or the keyword `backend`, forces one of the two.
"""

import functools
import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from linearize.errors import InputError, suggest
from linearize.ops import additive, delta, fla_backend

BACKENDS = ("torch", "fla")

_asked: ContextVar[list[str | None] | None] = ContextVar("asked", default=None)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def has_kernels(call: Callable[[], Any]) -> bool:
    """Whether there are kernels for a recurrence that `call` runs, wherever they can run."""
    asked: list[str | None] = []
    token = _asked.set(asked)
    try:
        call()
    finally:
        _asked.reset(token)
    return bool(asked)


def chooses_fla(x: Tensor, restriction: str | None, backend: str | None = None) -> bool:
    """Whether a call runs on fla's kernels.

    Args:
        x: one of the call's tensors.
        restriction: what about this call the kernels cannot do, or None.
        backend: torch | fla, or None for LINEARIZE_BACKEND and, without it, whatever is faster and there.

    Raises:
        InputError: the backend is unknown, or fla is forced where it cannot run.
    """
    asked = _asked.get()
    if asked is not None:
        asked.append(restriction)
    wanted = backend or os.environ.get("LINEARIZE_BACKEND") or None
    if wanted not in (None, *BACKENDS):
        raise InputError(f"LINEARIZE_BACKEND: unknown backend {wanted!r}. {suggest(wanted, BACKENDS)}")
    if wanted == "torch" or (wanted is None and not on_gpu(x)):
        return False
    missing = None if on_gpu(x) else f"the tensors are on {x.device}, and the kernels need a CUDA device"
    missing = missing or fla_backend.missing()
    if wanted == "fla" and (missing or restriction):
        raise InputError(
            f"LINEARIZE_BACKEND: found 'fla', but {missing or restriction}; allowed here: torch; unset the variable "
            "(or the keyword `backend`) to have the kernels where they can run and PyTorch elsewhere"
        )
    if missing is None and restriction is not None:
        _warn(restriction)
    return missing is None and restriction is None


@functools.cache
def _warn(restriction: str) -> None:
    """Once per restriction, not once per layer and step."""
    warnings.warn(f"fla's kernels are not used: {restriction}. PyTorch runs this recurrence instead", stacklevel=4)


def run_additive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    decoding: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The additive recurrence (ops/additive.py has the shapes), by whatever runs it here.

    Args:
        decoding: T = 1 and the state is updated in place.
        backend: as `chooses_fla`.

    Raises:
        InputError: as `chooses_fla`.
    """
    if chooses_fla(q, fla_backend.restriction(q, v), backend):
        return fla_backend.additive(q, k, v, log_decay, state, decoding)
    form = additive.step if decoding else additive.chunked
    return form(q, k, v, log_decay, state)


def run_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule over several tokens (ops/delta.py has the shapes), by whatever runs it here.

    Args:
        backend: as `chooses_fla`.

    Raises:
        InputError: as `chooses_fla`.
    """
    if chooses_fla(q, fla_backend.restriction(q, v), backend):
        return fla_backend.delta(q, k, v, beta, log_decay, state)
    return delta.chunked(q, k, v, beta, log_decay, state)
'''

_MODULES['ops.additive'] = r'''"""The additive recurrence S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ, read as y_t = q_tᵀ S_t.

One family for linear attention (no decay), RetNet (fixed g), Mamba-2 and Lightning (one g per head), GLA and HGRN-2
(one g per channel). Letters: B rows, H query heads, G key/value heads (H = r·G, a group of r queries reads one state),
T tokens, K key width, V value width, C chunk. Shapes: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V], log_decay g ≤ 0
of shape [B, G, T, K], [B, G, T, 1], anything that broadcasts to it, or None; state [B, G, K, V] fp32. All forms compute
in fp32 (fp64 for fp64 inputs) and return (y [B, H, T, V] in q's dtype, state). A token with k = 0 and g = 0 leaves no
trace.

`_prepare`, `_to_ends`, `_pairs`, `_pairs_by_halves`, `_leaf` and what they call are the algebra of decay that the other
families of this folder share.

Sources: GLA, arXiv 2312.06635 (chunked form with secondary chunks); SSD, arXiv 2405.21060.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
PIECE = 1024
"""Tokens whose intermediate results are made at once: what is larger is a fresh mapping for the allocator every time,
and at 16,384 tokens mapping pages took a third of the time."""
LEAF = 8
"""Width of the diagonal blocks that are computed without a reference point."""
STRONG = -60.0
"""Log decay of a block beyond which it is not factorised. Up to there its two factors stay below e^30, and rounding the
exponents costs a pair at most 30 · 2^-23 = 4e-6 of itself."""


def _prepare(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None):
    """Upcast; fold query groups: q -> [B, G, r, T, K]; broadcast the decay to [B, G, T, 1 or K]; make the state."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    B, H, T, K = q.shape
    G, V = k.shape[1], v.shape[-1]
    q = q.to(dtype).view(B, G, H // G, T, K)
    k, v = k.to(dtype), v.to(dtype)
    if log_decay is not None:
        log_decay = log_decay.to(dtype).expand(B, G, T, log_decay.shape[-1])
    state = k.new_zeros(B, G, K, V) if state is None else state.to(dtype)
    return q, k, v, log_decay, state


def naive_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the other forms."""
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    y = []
    for t in range(q.shape[3]):
        if g is not None:
            S = S * g[:, :, t, :, None].exp()
        S = S + k[:, :, t, :, None] * v[:, :, t, None, :]
        y.append(q[:, :, :, t] @ S)
    out = torch.stack(y, dim=3) if y else q.new_zeros(shape)
    return out.reshape(shape).to(dtype), S


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token (T = 1), updating `state` in place: the decoding step."""
    if state is None:
        return naive_recurrent(q, k, v, log_decay)
    absorb(k, v, log_decay, state)
    return look(q, state), state


def absorb(k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    """The writes of one token, into `state`, in place."""
    if log_decay is not None:
        state.mul_(log_decay.to(state.dtype).exp().mT)
    state.flatten(0, 1).baddbmm_(k.to(state.dtype).flatten(0, 1).mT, v.to(state.dtype).flatten(0, 1))


def look(q: Tensor, state: Tensor) -> Tensor:
    """What one token reads: q [B, H, 1, K] -> [B, H, 1, V]."""
    B, H, _, K = q.shape
    G = state.shape[1]
    y = torch.bmm(q.to(state.dtype).reshape(B * G, H // G, K), state.flatten(0, 1))
    return y.view(B, H, 1, -1).to(q.dtype)


def materialise(q: Tensor, k: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The mixer as an explicit matrix A [B, H, T, T], y = A v: every pairwise exponent is ≤ 0, so nothing overflows."""
    dtype = q.dtype
    B, H, T, _ = q.shape
    q, k, _, g, _ = _prepare(q, k, k, log_decay, None)
    return torch.tril(_pairs(q, k, g)).view(B, H, T, T).to(dtype)


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once through the T×T matrix: quadratic, for tests and for distillation."""
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    A = torch.tril(_pairs(q, k, g))
    inter, kept, whole = _to_ends(q, k, g)
    y = A @ v[:, :, None] + inter @ S[:, :, None]
    S = S * whole + kept.mT @ v
    return y.reshape(shape).to(dtype), S


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens: quadratic inside, recurrent between them. Linear in T; no exponent above −STRONG / 2."""
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v, g, S = _prepare(q, k, v, log_decay, state)
    if shape[2] == 0:
        return q.new_zeros(shape).to(dtype), S
    queries, keys, values = (x.split(PIECE, -2) for x in (q, k, v))
    decays = [None] * len(queries) if g is None else g.split(PIECE, -2)
    y = []
    for piece in zip(queries, keys, values, decays, strict=True):
        out, S = _in_chunks(*piece, S, chunk)
        y.append(out)
    return torch.cat(y, dim=2).to(dtype), S


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """One piece of `chunked`, of at least one token, on prepared tensors."""
    T = q.shape[3]
    C = min(chunk, max(LEAF, 1 << (T - 1).bit_length()))
    pad = -T % C
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        g = None if g is None else F.pad(g, (0, 0, 0, pad))
    N = (T + pad) // C
    q = q.unflatten(3, (N, C)).transpose(2, 3)
    k, v = k.unflatten(2, (N, C)), v.unflatten(2, (N, C))
    g = None if g is None else g.unflatten(2, (N, C))

    inter, kept, whole = _to_ends(q, k, g)
    before = []
    # Not whole[:, :, n]: the gradient of every index would be a tensor of all chunks.
    for decay, update in zip(whole.unbind(2), (kept.mT @ v).unbind(2), strict=True):
        before.append(S)
        S = torch.addcmul(update, S, decay)
    inside = torch.tril(_pairs(q, k, g) if g is None or g.shape[-1] == 1 else _pairs_by_halves(q, k, g))
    y = inside @ v[:, :, :, None] + inter @ torch.stack(before, dim=2)[:, :, :, None]
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :T], S


def _to_ends(q: Tensor, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries decayed from the start of their chunk, keys decayed to its end, and the decay of the whole chunk [..., K,
    1]."""
    if g is None:
        return q, k, k.new_ones(*k.shape[:-2], 1, 1)
    return q * g.cumsum(-2).exp().unsqueeze(-3), k * _after(g).exp(), g.sum(-2, keepdim=True).exp().mT


def _after(g: Tensor) -> Tensor:
    """Σ_{l > j} g_l along the tokens. Summed from the end: a difference of two prefix sums would cancel under strong
    decay."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _between(g: Tensor) -> Tensor:
    """Σ_{j < l ≤ i} g_l for all pairs: g [..., C, K] -> [..., C (i), C (j), K], without cancellation; 0 where j ≥ i."""
    C = g.shape[-2]
    below = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)[:, :, None]
    return torch.where(below, g.unsqueeze(-2), 0.0).cumsum(-3)


def _pairs(q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    """A_ij = Σ_K q_i k_j e^{g_{j+1} + … + g_i} for j ≤ i (what lies above the diagonal is finite and meaningless).

    q [..., r, C, K], k [..., C, K], g [..., C, 1 or K] -> [..., r, C, C].
    """
    if g is None:
        return q @ k.unsqueeze(-3).mT
    decay = _between(g).exp()
    if g.shape[-1] == 1:
        return (q @ k.unsqueeze(-3).mT) * decay.squeeze(-1).unsqueeze(-3)
    return torch.einsum("...rik,...ijk->...rij", q, decay * k.unsqueeze(-3))


def _leaf(g: Tensor) -> int:
    """Width of the largest blocks in which no channel decays by more than e^STRONG; 0 where even LEAF tokens do."""
    if torch.compiler.is_compiling():
        return 0  # a choice by value would break the graph
    leaf, width, total = 0, LEAF, g.detach().unflatten(-2, (-1, LEAF)).sum(-2)
    while float(total.amin()) >= STRONG:
        leaf, width = width, 2 * width
        if width > g.shape[-2]:
            break
        total = total.unflatten(-2, (-1, 2)).sum(-2)
    return leaf


def _centred(g: Tensor) -> Tensor:
    """Σ_{l ≤ i} g_l less half of the whole sum: within ±STRONG / 2 in a mild block."""
    total = g.cumsum(-2)
    return total - total[..., -1:, :] / 2


def _pairs_by_halves(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """`_pairs` with a decay per channel, without the C×C×K tensor.

    The square below the diagonal factorises around the last token of the first half: q decayed from there, k decayed to
    there, both exponents ≤ 0 however strong the decay. The two halves are squares of the same kind. A mild block
    (`_leaf`) factorises as a whole, around half of its decay; elsewhere the blocks of LEAF are direct.
    """
    return _halves(q, k, g, _leaf(g))


def _halves(q: Tensor, k: Tensor, g: Tensor, leaf: int) -> Tensor:
    C = q.shape[-2]
    if leaf >= C:
        G = _centred(g)
        return (q * G.exp().unsqueeze(-3)) @ (k * G.neg().exp()).unsqueeze(-3).mT
    if C <= LEAF:
        return _pairs(q, k, g)
    h = C // 2
    q2, k2, g2 = (x.unflatten(-2, (2, h)) for x in (q, k, g))
    diagonal = _halves(q2.transpose(-4, -3), k2, g2, leaf)
    first = g2[..., 0, :, :]
    into = k2[..., 0, :, :] * _after(first).exp()
    outof = q2[..., 1, :, :] * g2[..., 1, :, :].cumsum(-2).exp().unsqueeze(-3)
    below = outof @ into.unsqueeze(-3).mT
    upper = torch.cat([diagonal[..., 0, :, :, :], below.new_zeros(below.shape)], dim=-1)
    return torch.cat([upper, torch.cat([below, diagonal[..., 1, :, :, :]], dim=-1)], dim=-2)
'''

_MODULES['ops.fla_backend'] = r'''"""All calls of flash-linear-attention's Triton kernels: our layout in, our layout out.

fla takes [B, T, H, ·] with as many heads of keys as of queries, decays in log space, a scale (ours is in the queries
already: 1.0) and fp32 states [B, H, K, V]. Without triton `import fla` works and is empty, so what is probed is the
module with the kernels; it is imported on the first call with a CUDA tensor, not before (it takes seconds).

Shapes as in ops/additive.py. Written against fla-core 0.6.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

WIDEST = 256
"""Largest key width of the kernels: those of the delta rule assert it, the others slow down beyond it."""


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot be imported, or None."""
    try:
        import_module("fla.ops.gla")
    except ImportError as error:
        return f"fla.ops.gla cannot be imported ({error}); pip install 'linearize[cuda]' installs it"
    return None


def restriction(q: Tensor, v: Tensor) -> str | None:
    """What about these queries and values the kernels cannot do, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"they compute in 32 bits or fewer, and the queries are {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads may be {WIDEST} wide, and these are {q.shape[-1]} (keys) and {v.shape[-1]} (values)"
    if q.shape[2] == 0:
        return "they need at least one token"
    return None


def kernel(module: str, name: str) -> Callable[..., tuple[Tensor, Any]]:
    """fla.ops.MODULE.NAME. Not an import statement: fla's decorators hide the signatures from type checkers."""
    return getattr(import_module(f"fla.ops.{module}"), name)


def additive(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, decoding: bool = False
) -> tuple[Tensor, Tensor]:
    """`ops.additive.chunked`, or `step` if decoding."""
    form = "fused_recurrent" if decoding else "chunk"
    tensors = _to_fla(q, k, v, state)
    if log_decay is not None and log_decay.shape[-1] > 1:
        g = {"gk" if decoding else "g": _decay(q, k, log_decay)}
        y, final = kernel("gla", f"{form}_gla")(**tensors, **g)
    else:
        g = None if log_decay is None else _decay(q, k, log_decay).squeeze(-1)
        y, final = kernel("simple_gla", f"{form}_simple_gla")(**tensors, g=g)
    return _from_fla(y, final, q, k, state if decoding else None)


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The delta rule in chunks: S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ; beta [B, G, T, 1]."""
    tensors = _to_fla(q, k, v, state)
    tensors["beta"] = _heads(beta, q).transpose(1, 2).squeeze(-1).contiguous()
    if log_decay is not None and log_decay.shape[-1] > 1:
        y, final = kernel("kda", "chunk_kda")(**tensors, g=_decay(q, k, log_decay))
    elif log_decay is None and v.dtype != torch.float32:
        y, final = kernel("delta_rule", "chunk_delta_rule")(**tensors)
    else:
        # chunk_delta_rule refuses fp32; with a decay of 1 this is the same rule.
        g = torch.zeros_like(beta) if log_decay is None else log_decay
        y, final = kernel("gated_delta_rule", "chunk_gated_delta_rule")(**tensors, g=_decay(q, k, g).squeeze(-1))
    return _from_fla(y, final, q, k)


def slots(
    q: Tensor, k: Tensor, v: Tensor, write: Tensor, log_decay: Tensor, state: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`ops.slots.chunked`. The kernel expands the groups by itself."""
    tensors = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "s": write.to(v.dtype), "g": log_decay.float()}
    tensors = {name: x.transpose(1, 2).contiguous() for name, x in tensors.items()}
    state = (state[0].float(), state[1].float())
    y, final = kernel("gsa", "chunk_gsa")(**tensors, scale=1.0, initial_state=state, output_final_state=True)
    return y.transpose(1, 2).to(q.dtype), (final[0], final[1])


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """[B, G, ...] -> [B, H, ...]: each key head once for every query head that reads it."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _to_fla(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> dict:
    """The arguments that all kernels share. They want one dtype: the values'."""
    return {
        "q": q.to(v.dtype).transpose(1, 2).contiguous(),
        "k": _heads(k.to(v.dtype), q).transpose(1, 2).contiguous(),
        "v": _heads(v, q).transpose(1, 2).contiguous(),
        "scale": 1.0,
        "initial_state": None if state is None else _heads(state.float(), q).contiguous(),
        "output_final_state": True,
    }


def _decay(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """[B, G, T, 1 or K], or what broadcasts to it -> fp32 [B, T, H, 1 or K]."""
    log_decay = log_decay.float().expand(*k.shape[:3], log_decay.shape[-1])
    return _heads(log_decay, q).transpose(1, 2).contiguous()


def _from_fla(y: Tensor, final: Tensor, q: Tensor, k: Tensor, in_place: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y [B, H, T, V] in q's dtype, and one state per key head: all query heads of a group have the same."""
    final = final[:, :: q.shape[1] // k.shape[1]]
    return y.transpose(1, 2).to(q.dtype), final if in_place is None else in_place.copy_(final)
'''

_MODULES['mixers.softmax'] = r'''"""Control: the source's own attention, routed through the converted layer. Must reproduce the source exactly.

y_t = Σ_{j ≤ t} softmax(a_t)_j v_j. Cache: the source's growing one. No new weights.
"""

from dataclasses import dataclass

from torch import Tensor

from linearize.mixers import base, window


@dataclass(frozen=True)
class Config(window.Config):
    def problems(self):
        found = ["softmax_heads: all heads stay softmax here; leave it out"] if self.softmax_heads else []
        return super().problems() + found


class Mixer(base.Mixer):
    name = "softmax"
    Config = Config
    combines = ("none",)
    recurrent = False

    def slots(self):
        return {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: base.Context) -> Tensor:
        if context.cache is not None:
            k, v = context.cache.update(k, v, context.layer_idx)
        return context.attend(q, k, v)
'''

_MODULES['mixers.window'] = r'''"""Control: the source's softmax attention over the last W tokens and s sinks, nothing behind them (StreamingLLM, arXiv
2309.17453).

y_t = Σ_{j ∈ E_t} softmax(a_t)_j v_j. Cache per layer: (W + s) keys and values. No new weights. What a linearized model
must beat.
"""

from dataclasses import dataclass

from linearize.mixers import base


@dataclass(frozen=True)
class Config(base.MixerConfig):
    combine: str = "none"


class Mixer(base.Mixer):
    name = "window"
    Config = Config
    combines = ("none",)
    recurrent = False
'''

_MODULES['cache'] = r'''"""The cache of one linearized layer: sinks, a ring of the last W tokens, and the recurrent state. Its size never grows,
but for heads that stay softmax (mixers/heads.py), where there are some.

Slots lie in one buffer of s + W: slot t holds token t for t < s; token t ≥ s lies in slot s + (t − s) mod W. A token
that is overwritten is exactly the one that leaves the window, so it is read there, once, to enter the memory. Every row
counts its own real tokens, so rows of very different length share a batch. All updates are in place on tensors of fixed
address.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin, StaticLayer

from linearize.ops.rows import Rows


class LinearizedCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """A transformers cache layer that `Cache` objects of any kind accept.

    Args:
        window: W ≥ 1 slots of the ring (0 for a mixer without a window).
        sinks: s slots of the first tokens.
        static: whether lengths are reported as tensors, as transformers' static layers do (no recompilation per step).

    Attributes:
        grown: [B, heads, N, width], all tokens of heads that stay softmax, token t of a row in slot t; None without
            such heads. The one part that grows.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, window: int, sinks: int, static: bool = False):
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=0)
        self.window, self.sinks, self.static = window, sinks, static
        self.tensors: dict[str, Tensor] = {}
        self.grown: Tensor | None = None
        self.stack: Stack | None = None
        self.is_initialized = False
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
        self.tensors = {"tokens": like.new_zeros(batch, heads, self.sinks + self.window, width)}
        self.state_names = [f"state_{i}" for i in range(len(state))]
        self.tensors |= dict(zip(self.state_names, state, strict=True))
        self.tensors["count"] = torch.zeros(batch, dtype=torch.int64, device=like.device)
        if self.static:
            self._length = torch.zeros((), dtype=torch.int64, device=like.device)
        if not torch.compiler.is_compiling():
            for x in self.tensors.values():
                torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    @property
    def is_croppable(self) -> bool:
        """Never: the recurrent state has absorbed its tokens."""
        return False

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
        if self.window == 0:
            return t.clamp(max=self.sinks - 1)
        return torch.where(t < self.sinks, t, self.sinks + (t - self.sinks).remainder(self.window))

    def filled(self) -> Tensor:
        """[B, s + W] bool: which slots hold a token once the next one is written."""
        return torch.arange(self.sinks + self.window, device=self.device) <= self.tensors["count"][:, None]

    def in_order(self) -> Tensor:
        """The W tokens before the next one, oldest first, [B, heads, W, width]; rows with fewer hold zeros or sinks
        there."""
        x = self.tensors["tokens"]
        token = self.tensors["count"][:, None] - self.window + torch.arange(self.window, device=x.device)
        slot = self.sinks + (token - self.sinks).remainder(self.window)
        return x.gather(2, slot[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def extend(self, new: Tensor, lengths: Tensor) -> None:
        """Write a block of tokens new [B, heads, T, width], of which the first lengths [B] of each row are real."""
        slot = torch.arange(self.sinks + self.window, device=self.device)
        count = self.tensors["count"][:, None]
        after = count + lengths[:, None]
        # The newest token that belongs in each slot, or one before the block where the slot stays as it is.
        ring = after - 1 - (after - 1 - slot).remainder(max(self.window, 1))
        token = torch.where(slot < self.sinks, slot, ring)
        take = (token >= count) & (token < after) & ((slot < self.sinks) | (token >= self.sinks))
        source = (token - count).clamp(min=0, max=new.shape[2] - 1)
        old = self.tensors["tokens"]
        index = source[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
        old.copy_(torch.where(take[:, None, :, None], new.detach().gather(2, index).to(old.dtype), old))

    def grow(self, new: Tensor) -> Tensor:
        """Append a block of tokens new [B, heads, T, width] for heads that stay softmax; `advance` counts them later.

        Returns:
            All slots [B, heads, N + T, width]. Those of a row behind its tokens hold anything: the next block's first
            token takes the place of this one's padding.
        """
        x = new
        if self.grown is not None:
            x = torch.cat([self.grown, torch.zeros_like(new)], 2)
            slot = self.tensors["count"][:, None] + torch.arange(new.shape[2], device=new.device)
            x.scatter_(2, slot[:, None, :, None].expand_as(new), new)
        self.grown = x.detach()
        return x

    def check_start(self, rows: Rows | None) -> None:
        """Refuse packed documents behind other tokens: they become rows of their own."""
        if rows is not None and rows.packed and self.is_initialized:
            raise ValueError("packed documents can only start an empty cache")

    def advance(self, lengths: Tensor | int, tokens: int) -> None:
        """Count `lengths` real tokens per row, out of `tokens` positions of the batch."""
        self.tensors["count"] += lengths
        self._length += tokens

    # --- the contract of transformers

    def update(self, *args: Any, **kwargs: Any):
        raise RuntimeError("a linearized layer's cache is written by its mixer; Cache.update has no meaning here")

    update_conv_state = update_recurrent_state = update

    def get_seq_length(self) -> int | Tensor:
        """Positions seen, padding included, as for every other layer."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is needed: sizes for which transformers builds none."""
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        for x in self.tensors.values():
            x.zero_()
        self.grown = None
        self._length = self._length * 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise RuntimeError(
                "a linearized cache cannot be cropped: its recurrent state has already absorbed the tokens; "
                "use generation without assisted decoding"
            )

    def activate_past_recording(self) -> None:
        raise RuntimeError("a linearized cache cannot be rolled back, so assisted decoding is not possible")

    def _map(self, f) -> None:
        self.tensors = {n: f(x) for n, x in self.tensors.items()}
        self.grown = None if self.grown is None else f(self.grown)
        self.stack = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda x: x.to(self.device, non_blocking=True))


class Stack:
    """The tensors of alike layers, one layer after the other along the batch: what all layers do at the same time is
    then one operation. Each layer keeps its own rows as views.

    Attributes:
        tensors: as of a layer, [L·B, ...] each.
    """

    def __init__(self, layers: list[LinearizedCacheLayer]):
        self.layers = layers
        self.tensors = layers[0].tensors
        if len(layers) > 1:
            self.tensors = {n: torch.cat([layer.tensors[n] for layer in layers]) for n in layers[0].tensors}
            views = ({n: x.chunk(len(layers)) for n, x in self.tensors.items()}).items()
            for i, layer in enumerate(layers):
                layer.tensors = {n: parts[i] for n, parts in views}
        for layer in layers:
            layer.stack = self

    @classmethod
    def of(cls, layers: list[LinearizedCacheLayer]) -> "Stack":
        """The stack of exactly these layers, made anew where one has left it."""
        stack = layers[0].stack
        same = stack is not None and stack.layers == layers and all(layer.stack is stack for layer in layers)
        return stack if stack is not None and same else cls(layers)

    @property
    def state(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors[n] for n in self.layers[0].state_names)

    def advance(self) -> None:
        """Count one token per row, in every layer."""
        self.tensors["count"] += 1
        for layer in self.layers:
            layer._length += 1


def cache_layer(
    cache: Cache, layer_idx: int, window: int, sinks: int, grows: bool = False
) -> LinearizedCacheLayer:  # fmt: skip
    """The linearized layer at `layer_idx` of any Cache, put there on first use; `grows` with heads that stay softmax.

    Raises:
        RuntimeError: the layer there holds tokens already, or has a fixed size and must grow.
    """
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cast(Any, cache.layer_class_to_replicate)())
    layer: Any = cache.layers[layer_idx]
    if not isinstance(layer, LinearizedCacheLayer):
        if layer.get_seq_length():
            raise RuntimeError(
                f"layer {layer_idx} of this cache was filled by softmax attention; start with an empty cache"
            )
        layer = cache.layers[layer_idx] = LinearizedCacheLayer(window, sinks, isinstance(layer, StaticLayer))
    if grows and layer.static:
        raise RuntimeError(
            f"layer {layer_idx} has heads that stay softmax, whose cache grows with the text, so a static cache cannot "
            "hold it; use a dynamic cache"
        )
    return layer
'''

_MODULES['ops.rows'] = r'''"""Padded and packed batches as left-aligned rows of real tokens.

A recurrence, a ring and "the first s tokens" are simple on a row that starts at its first real token and has its
padding at the end: causality hides the padding from every real query. So left padding, right padding, holes and packed
documents all become rows once per forward pass, and no mixer knows any of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rows:
    """How B×T token positions map to R rows of L: R = B for padding, one row per document for packing.

    Attributes:
        index: [R, L] int64, flat position b·T + t of each row's token (0 where there is none).
        valid: [R, L] bool, True at real tokens, left-aligned.
        back: [B, T] int64, flat row position r·L + l of each token (0 at padding).
        real: [B, T] bool, False at padding.
        last: [B] int64, the row in which each batch item ends.
        packed: whether any item holds several documents.
    """

    index: Tensor
    valid: Tensor
    back: Tensor
    real: Tensor
    last: Tensor
    packed: bool

    @classmethod
    def from_padding(cls, real: Tensor) -> "Rows":
        """From a mask [B, T], non-zero at real tokens."""
        real = real.bool()
        B, T = real.shape
        offset = torch.arange(B, device=real.device)[:, None] * T
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        rank = real.cumsum(1) - 1
        valid = torch.arange(T, device=real.device) < real.sum(1, keepdim=True)
        back = torch.where(real, rank, 0) + offset
        return cls(order + offset, valid, back, real, torch.arange(B, device=real.device), False)

    @classmethod
    def from_positions(cls, position_ids: Tensor) -> "Rows | None":
        """From position ids [B, T] that restart at every document; None when none restarts."""
        B, T = position_ids.shape
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if int(starts.sum()) == B:
            return None
        row = starts.flatten().cumsum(0) - 1
        first = starts.flatten().nonzero().flatten()
        within = torch.arange(B * T, device=row.device) - first[row]
        length = int(within.max()) + 1
        back = row * length + within
        index = back.new_zeros(len(first) * length)
        valid = torch.zeros_like(index, dtype=torch.bool)
        index[back] = torch.arange(B * T, device=row.device)
        valid[back] = True
        shape = (len(first), length)
        return cls(
            index.view(shape), valid.view(shape), back.view(B, T), torch.ones_like(starts), row.view(B, T)[:, -1], True
        )

    def gather(self, x: Tensor) -> Tensor:
        """x [B, H, T, D] -> [R, H, L, D]."""
        return x.transpose(1, 2).flatten(0, 1)[self.index].transpose(1, 2)

    def scatter(self, y: Tensor) -> Tensor:
        """y [R, H, L, D] -> [B, H, T, D], zero at padding."""
        y = y.transpose(1, 2).flatten(0, 1)[self.back]
        return (y * self.real[:, :, None, None]).transpose(1, 2)
'''

_MODULES['mixers.step'] = r'''"""One decoding step of the layers that are alike.

A token enters the memory W steps after it arrived, so nothing of that depends on the layers before: it is done for all
layers at once, before the first of them runs, and what the new token will be remembered by is computed after the last.
What remains inside a layer is attention over its slots and one look into its state. On a small model, decoding time is
the number of operations.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.cache import LinearizedCacheLayer, Stack
from linearize.mixers.tokens import Tokens

if TYPE_CHECKING:
    from linearize.mixers.base import Mixer


class Step:
    """One token of each row, in all layers of a stack.

    Args:
        mixer: of any of these layers.
        stack: their caches.

    Attributes:
        slot: [B, G, 1, D] int64, where the new token goes in each layer's slots.
        bias: [B·G, 1, s + W] fp32, 0 where a slot will be filled, −inf elsewhere.
        one: [B, G, 1, 1], in the dtype of the slots.
        slots: layer's place in the stack -> its keys [B·G, K, s + W] and values [B·G, s + W, V], new token included.
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
            size = B * heads
            self.slots = list(zip(kept.k.flatten(0, 1).mT.split(size), kept.v.flatten(0, 1).split(size), strict=True))
        if mixer.delayed:
            leaving = Tokens(tokens.gather(2, self._slot), mixer.geometry)
            mixer.absorb(mixer.write(leaving), stack.state)

    def finish(self, unrotate: Callable[[Tensor], Tensor]) -> None:
        """Once the new token lies in the slots of every layer.

        Args:
            unrotate: keys [L·B, G, 1, K] of the layers one after the other -> the same before RoPE, fp32.
        """
        if self.mixer.delayed and self.mixer.carry_width:
            tokens = self.stack.tensors["tokens"]
            arrived = Tokens(tokens.gather(2, self._slot), self.mixer.geometry)
            carry = self.mixer.carry(arrived.k, unrotate)
            assert carry is not None
            place = tokens[..., -self.mixer.carry_width :]
            place.scatter_(2, self._slot[..., : self.mixer.carry_width], carry.to(place.dtype))
        self.stack.advance()


def steps(mixers: "dict[int, Mixer]", layers: list) -> "dict[int, tuple[Step, int]]":
    """Layer index -> its step, one for all layers that are alike, and its place in the stack.

    A mixer with weights of its own writes in its own way, and a layer that has seen nothing has no slots: they are left
    out.

    Args:
        mixers: layer index -> mixer.
        layers: of the Cache.
    """
    groups: dict[tuple, list[int]] = {}
    for index, mixer in mixers.items():
        layer = layers[index] if index < len(layers) else None
        if isinstance(layer, LinearizedCacheLayer) and layer.is_initialized and mixer.alike:
            groups.setdefault((*mixer.alike, layer.device, layer.dtype), []).append(index)
    found = {}
    for indices in groups.values():
        step = Step(mixers[indices[0]], Stack.of([layers[i] for i in indices]))
        found |= {index: (step, place) for place, index in enumerate(indices)}
    return found
'''

_MODULES['mixers.tokens'] = r'''"""What is kept of each token until it leaves the window."""

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
        value heads of the layer, by their number."""
        whole = self.kv_heads + len(self.missing)
        return make(whole)[[g for g in range(whole) if g not in self.missing]]


class Tokens:
    """Columns [k | 1 | v | 1 | carry] of one tensor x [B, G, T, K + V + 2 + C].

    A token that does not exist (padding, an empty slot) is a row of zeros. The ones lie so that a key and a value each
    have theirs at hand, which is how sums of weights are carried beside sums of values.
    """

    def __init__(self, x: Tensor, geometry: Geometry):
        self.x, self.K, self.V = x, geometry.key_width, geometry.value_width

    @classmethod
    def join(cls, k: Tensor, v: Tensor, carry: Tensor | None, one: Tensor, geometry: Geometry) -> "Tokens":
        """From keys [B, G, T, K], values [B, G, T, V], carry [B, G, T, C] or None and ones [B, G, T, 1]."""
        return cls(torch.cat([k, one, v, one] if carry is None else [k, one, v, one, carry.to(k.dtype)], -1), geometry)

    @property
    def k(self) -> Tensor:
        return self.x[..., : self.K]

    @property
    def k1(self) -> Tensor:
        """[k | 1]"""
        return self.x[..., : self.K + 1]

    @property
    def v(self) -> Tensor:
        return self.x[..., self.K + 1 : self.K + 1 + self.V]

    @property
    def v1(self) -> Tensor:
        """[v | 1]"""
        return self.x[..., self.K + 1 : self.K + self.V + 2]

    @property
    def present(self) -> Tensor:
        """[B, G, T, 1]: 1, or 0 for a token that does not exist."""
        return self.x[..., self.K : self.K + 1]

    @property
    def carry(self) -> Tensor:
        return self.x[..., self.K + self.V + 2 :]
'''

_MODULES['ops.window'] = r'''"""Sliding-window softmax attention with sinks, in O(T·W) time and memory.

Letters: B rows, H query heads, G key/value heads (H = r·G), T new tokens, K key width, V value width, W window, s
sinks, C block. Query t sees token j ≤ t when t − j < W or j < s; every token counts once. Keys come in two parts: the
sinks, and `local`, the W tokens before the new ones followed by the new ones, so that local index e is token n + e − W,
n being the number of tokens that came before. A query block of C needs C + W neighbouring local keys, whatever T is.

Source of the pattern: StreamingLLM, arXiv 2309.17453.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 32
"""Queries per block: 32 makes the matrix products large enough for a CPU while W = 64 wastes only a third of each
block."""


def scores(q: Tensor, k: Tensor, bias: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """The source's own attention scores, at least in fp32, of R heads that share their keys: q [..., R, M, K] and
    k [..., N, K] -> [..., R, M, N], plus `bias`, which broadcasts to it: 0 where a key is seen and −inf elsewhere."""
    shape = *q.shape[:-1], k.shape[-2]
    rows, keys = q.reshape(-1, shape[-3] * shape[-2], q.shape[-1]), k.reshape(-1, *k.shape[-2:])
    dtype = torch.promote_types(q.dtype, torch.float32)
    if softcap is None and q.dtype == dtype:
        # The product is added to the bias in place: two passes over the scores less, and as many in the gradient.
        a = bias.to(dtype).expand(shape).clone(memory_format=torch.contiguous_format)
        return a.view(*rows.shape[:2], -1).baddbmm_(rows, keys.mT, alpha=scaling).view(shape)
    a = (rows @ keys.mT).to(dtype).view(shape) * scaling
    return (a if softcap is None else softcap * torch.tanh(a / softcap)) + bias


def bias_of(seen: Tensor) -> Tensor:
    """fp32: 0 where `seen`, −inf elsewhere."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))


def normalise(a: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of fp32 scores a [..., N] and their log-sum-exp [...]; `extra` [..., 1] is a logit without a value."""
    if extra is not None:
        a = torch.cat([a, extra.expand(*a.shape[:-1], 1)], dim=-1)
    p, lse = _Softmax.apply(a)  # type: ignore[misc]
    return p if extra is None else p[..., :-1], lse


class _Softmax(torch.autograd.Function):
    """Both at once: autograd would go through the largest scores, which takes longer than the softmax itself."""

    @staticmethod
    def forward(ctx, a):  # type: ignore[override]
        p = a.softmax(-1)
        ctx.save_for_backward(p)
        # For the largest score a, p = e^{a − lse}: two reductions instead of the dozen steps of logsumexp.
        return p, a.amax(-1) - p.amax(-1).log()

    @staticmethod
    def backward(ctx, p_grad, lse_grad):  # type: ignore[override]
        (p,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(p_grad, p, -1, p.dtype).addcmul_(p, lse_grad.unsqueeze(-1))


def window_attention(
    q: Tensor,
    local_k: Tensor,
    local_v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    *,
    seen: Tensor | int,
    window: int,
    scaling: float,
    softcap: float | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention of each new token over its window and the sinks.

    Args:
        q: [B, H, T, K] queries as the source would use them (after norm and RoPE).
        local_k, local_v: [B, G, W + T, K or V], the W tokens before the new ones (anything where there are none) and
            the new ones.
        sink_k, sink_v: [B, G, s, K or V], the first s tokens of each row.
        seen: tokens before the new ones, [B] int64, or one int for all rows.
        window: W ≥ 1, counting the query's own token.
        scaling, softcap: the source's.
        extra: [H] logits that take part in the normaliser only (gpt_oss), or None.

    Returns:
        y [B, H, T, V] in q's dtype and lse [B, H, T] fp32, the log of the normaliser.
    """
    B, H, T, K = q.shape
    G, s, V = local_k.shape[1], sink_k.shape[2], local_v.shape[-1]
    C = min(BLOCK, T)
    N = -(-T // C)
    pad = N * C - T
    rep = H // G

    qb = F.pad(q, (0, 0, 0, pad)).view(B, G, rep, N, C, K).transpose(2, 3)

    def blocks(local: Tensor, sink: Tensor) -> Tensor:
        near = F.pad(local, (0, 0, 0, pad)).unfold(2, C + window, C).mT
        return torch.cat([sink[:, :, None].expand(-1, -1, N, -1, -1), near], 3)

    kb, vb = blocks(local_k, sink_k), blocks(local_v, sink_v)
    i = torch.arange(C, device=q.device)
    e = torch.arange(C + window, device=q.device)
    near = (e > i[:, None]) & (e <= i[:, None] + window)
    seen = torch.as_tensor(seen, device=q.device).view(-1, 1)
    block = torch.arange(N, device=q.device) * C
    token = seen[:, :, None] + (block[:, None] + e) - window
    t = seen[:, :, None] + (block[:, None] + i)
    mask = torch.cat([torch.arange(s, device=q.device) <= t[..., None], (token >= s)[:, :, None] & near], -1)
    extra = None if extra is None else extra.float().view(G, 1, rep, 1, 1)
    p, lse = normalise(scores(qb, kb, bias_of(mask)[:, None, :, None], scaling, softcap), extra)
    y = p.to(q.dtype).flatten(3, 4) @ vb
    y = y.view(B, G, N, rep, C, V).transpose(2, 3).reshape(B, H, N * C, V)[:, :, :T]
    return y, lse.transpose(2, 3).reshape(B, H, N * C)[:, :, :T]


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    extra: Tensor | None = None,
    memory: Tensor | None = None,
) -> Tensor:
    """One decoding step over cached slots, in whatever order they lie.

    Args:
        q: [B, H, 1, K]; k: [B·G, K, S] and v: [B·G, S, V], as `Step` views them.
        bias: [B·G, 1, S] fp32, 0 where a slot is filled and −inf elsewhere.
        memory: one more place to attend to, [B, H, 1, V + 1] fp32: its value, and its logit in the last column.

    Returns:
        y [B, H, 1, V] in q's dtype.
    """
    B, H, _, K = q.shape
    groups, S, V = v.shape
    grouped = q.reshape(groups, -1, K)
    if softcap is None and q.dtype == torch.float32:
        a = torch.baddbmm(bias, grouped, k, alpha=scaling)  # the same in one call: calls are what a step takes
    else:
        a = scores(grouped.unsqueeze(1), k.mT, bias.unsqueeze(1), scaling, softcap).squeeze(1)
    m = None if memory is None else memory.view(groups, -1, V + 1)
    if m is not None:
        a = torch.cat([a, m[..., V:]], -1)
    if extra is not None:
        a = torch.cat([a, extra.to(a.dtype).repeat(B).view(groups, -1, 1)], -1)
    p = a.softmax(-1)
    near = p[..., :S].to(v.dtype)
    if m is None:
        y = torch.bmm(near, v)
    else:
        far = m[..., :V] * p[..., S : S + 1]
        y = torch.baddbmm(far, near, v) if v.dtype == far.dtype else far + torch.bmm(near, v)
    return y.view(B, H, 1, V).to(q.dtype)


def naive_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    scaling: float,
    softcap: float | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: the same over whole rows q [B, H, T, K], k, v [B, G, T, ·] with an explicit T×T mask."""
    B, H, T, K = q.shape
    G = k.shape[1]
    t = torch.arange(T, device=q.device)
    distance = t[:, None] - t
    mask = (distance >= 0) & ((distance < window) | (t < sinks))
    a = scores(q.view(B, G, H // G, T, K), k, bias_of(mask), scaling, softcap)
    extra = None if extra is None else extra.float().view(G, H // G, 1, 1)
    p, lse = normalise(a, extra)
    return (p.to(q.dtype) @ v[:, :, None]).reshape(B, H, T, -1), lse.reshape(B, H, T)
'''

_MODULES['mixers.heads'] = r'''"""Heads that stay softmax inside a linearized layer: some key/value heads, with their query heads, keep the source's
attention over all tokens and a cache that grows; the mixer has the others, as if the layer had no more than those.

Few heads of a model look far back, and they are spread over its layers (RecurFormer, arXiv 2410.12850; DuoAttention,
arXiv 2410.10819).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from linearize.cache import cache_layer
from linearize.errors import InputError
from linearize.mixers.base import Context
from linearize.mixers.tokens import Geometry
from linearize.ops.causal import causal_attention


def others(geometry: Geometry, kept: Sequence[int], whole: bool = True) -> Geometry:
    """The shapes of a layer without the heads that stay softmax; `whole`: the source's attention sees the whole text.

    Raises:
        InputError: an index that no key/value head has, or none is left for the mixer; or a sliding window.
    """
    if kept and not whole:
        raise InputError(
            "mixer.softmax_heads: the source's attention slides a window in a layer of these, so there is no cache of "
            "all tokens to keep; name layers whose attention sees the whole text (layers: full)"
        )
    G = geometry.kv_heads
    if any(g >= G for g in kept) or len(kept) == G:
        raise InputError(
            f"mixer.softmax_heads: found {list(kept)}; the layer has {G} key/value heads, so indices from 0 to {G - 1} "
            "are possible, and one head at least must be left for the mixer (where all stay softmax, leave the layer "
            "out)"
        )
    left = G - len(kept)
    return replace(geometry, heads=geometry.heads // G * left, kv_heads=left, missing=tuple(kept))


@lru_cache
def _places(kept: tuple[int, ...], groups: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the kept heads, of the others, and what puts the two, joined, back into order."""
    rest = [g for g in range(groups) if g not in kept]
    there = torch.tensor([*kept, *rest], device=device)
    return there[: len(kept)], there[len(kept) :], there.argsort()


def pick(x: Tensor, groups: int, index: Tensor) -> Tensor:
    """Of x [B, n·groups, ...], the n entries of each group in `index`."""
    return x.unflatten(1, (groups, -1)).index_select(1, index).flatten(1, 2)


def run(mixer: Any, kept: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """A layer's attention, q [B, H, T, K], k [B, G, T, K], v [B, G, T, V] -> y [B, H, T, V].

    Args:
        mixer: of the other heads, or what stands in its place; it is called as a mixer is.
        kept: key/value heads that stay softmax.
        q, k, v: of all heads, as the source made them.
        context: of the whole layer.
    """
    if not kept:
        return mixer(q, k, v, context)
    G = k.shape[1]
    own, rest, order = _places(kept, G, q.device)

    def part(index: Tensor) -> tuple[list[Tensor], Context]:
        extra = None if context.extra is None else pick(context.extra[None], G, index)[0]
        # The source knows all of its heads, and no fewer.
        inside = replace(context, extra=extra, attend=lambda *_: pick(context.attend(q, k, v), G, index))
        return [pick(x, G, index) for x in (q, k, v)], inside

    (qs, ks, vs), inside = part(own)
    rows, layer = context.rows, None
    if context.cache is not None:
        layer = cache_layer(context.cache, context.layer_idx, mixer.window, mixer.sinks, grows=True)
        layer.check_start(rows)
    if rows is not None:
        qs, ks, vs = (rows.gather(x) for x in (qs, ks, vs))
    x, seen = torch.cat([ks, vs], -1), 0
    if layer is not None and layer.is_initialized:
        seen = layer.tensors["count"]
    if layer is not None:
        x = layer.grow(x)
    ks, vs = x.split([ks.shape[-1], vs.shape[-1]], -1)
    y = causal_attention(
        qs, ks, vs, seen=seen, scaling=context.scaling, softcap=context.softcap, extra=inside.extra
    )  # fmt: skip
    y = y if rows is None else rows.scatter(y)
    # Behind it: this counts the new tokens.
    arguments, inside = part(rest)
    both = [each.unflatten(1, (len(index), -1)) for each, index in ((y, own), (mixer(*arguments, inside), rest))]
    return torch.cat(both, 1).index_select(1, order).flatten(1, 2)
'''

_MODULES['ops.causal'] = r'''"""The source's softmax attention over all past tokens, for rows of different length.

Letters as in ops/window.py, N slots: slot j of a row holds its token j.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.window import bias_of, normalise, scores

ELEMENTS = 2**22
"""Scores that exist at a time (16 MiB)."""


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seen: Tensor | int,
    scaling: float,
    softcap: float | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    """Exact attention of the new tokens over all tokens of their row.

    Args:
        q: [B, H, T, K], of T new tokens.
        k, v: [B, G, N, K or V], slots with the new tokens in them, N = T + slots that were there before.
        seen: tokens before the new ones, [B] int64, or one int for all rows; at most N − T.
        scaling, softcap: the source's.
        extra: [H] logits that take part in the normaliser only (gpt_oss), or None.

    Returns:
        y [B, H, T, V] in q's dtype.
    """
    B, H, T, K = q.shape
    G, N, V = k.shape[1], k.shape[2], v.shape[-1]
    if T == N and T > 1 and softcap is None and extra is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=H != G)
    rep, C = H // G, max(1, ELEMENTS // (B * H * N))
    extra = None if extra is None else extra.float().view(G, rep, 1, 1)
    seen = torch.as_tensor(seen, device=q.device).view(-1, 1, 1)
    parts = []
    for start in range(0, T, C):
        new = q[:, :, start : start + C]
        n = new.shape[2]
        end = N - T + start + n  # no row sees a slot behind it
        token = seen + start + torch.arange(n, device=q.device)[:, None]
        bias = bias_of(torch.arange(end, device=q.device) <= token)[:, None, None]
        p, _ = normalise(scores(new.view(B, G, rep, n, K), k[:, :, :end], bias, scaling, softcap), extra)
        parts.append((p.to(q.dtype).view(B, G, rep * n, end) @ v[:, :, :end]).view(B, H, n, V))
    return torch.cat(parts, 2)
'''


class _Finder:
    """Lets Python import the modules above, as a package of this file's own."""

    package = re.sub("[^a-zA-Z0-9_]", "_", f"{__name__}_runtime")

    def find_spec(self, fullname, path=None, target=None):
        name = fullname.removeprefix(self.package).removeprefix(".")
        if fullname.partition(".")[0] != self.package or name not in _MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=name in ("", *_PACKAGES))

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__.removeprefix(self.package).removeprefix(".")
        text = re.sub("^( *from )linearize(?=[. ])", rf"\g<1>{self.package}", _MODULES[name], flags=re.MULTILINE)
        module.__file__ = __file__
        exec(compile(text, f"{__file__}:{name}", "exec"), module.__dict__)


sys.meta_path.insert(0, _Finder())


def _runtime(name):
    return importlib.import_module(f"{_Finder.package}.{name}")



"""Class surgery: any transformers causal LM becomes a linearized one, with its own code, weights and names.

`linearize_` swaps the class of each attention module for a subclass that keeps the source's forward (projections,
biases, norms, RoPE, output projection) and routes the attention function inside it to a mixer. `LinearizedConfig` and
`LinearizedForCausalLM` are made on demand as subclasses of the source's own classes and registered with the Auto
classes, so that a saved folder opens with plain `AutoModelForCausalLM.from_pretrained` after `import linearize`.
Nothing here names an architecture.
"""

import copy
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

archs = _runtime('archs')
cache_layer = _runtime('cache').cache_layer
InputError = _runtime('errors').InputError
MIXERS = _runtime('mixers').MIXERS
Context = _runtime('mixers').Context
MixerConfig = _runtime('mixers').MixerConfig
build_config = _runtime('mixers').build_config
heads = _runtime('mixers.heads')
steps = _runtime('mixers.step').steps
Rows = _runtime('ops.rows').Rows

FORMAT = 1
"""Version of the `linearize` block in config.json."""

# A copy of this text may run from a folder that brings its code along (bundle.py): then saving takes it along again.
_AUTO = {} if __name__.startswith("linearize.") else {"config": "AutoConfig", "model": "AutoModelForCausalLM"}

IMPLEMENTATION = "linearize"
# The mixed-in classes rely on the source's class that follows them; a type checker is told so.
if TYPE_CHECKING:
    from typing import Any as _Source
else:
    _Source = object

BRANCHES = ("all", "source", "window", "memory")


# --- attention


class LinearizedAttention(_Source):
    """Mixed into the source's attention class. Holds `mixer` and, for the branches, which path runs now."""

    branch: str = "all"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any):
        mask = kwargs.pop("attention_mask", None)
        if isinstance(mask, _Carried):
            kwargs |= mask.arguments
            mask = mask.mask
        told = "linearize_rows" in kwargs
        rows, steps = kwargs.pop("linearize_rows", None), kwargs.pop("linearize_steps", None)
        if self.branch == "source":
            return super().forward(hidden_states, *args, attention_mask=mask, **kwargs)
        if not told:
            raise RuntimeError(
                f"{type(self).__name__}: the decoder layer does not pass keyword arguments on, so padding cannot be "
                "seen; its architecture needs a row in linearize/archs.py with drops_arguments"
            )
        past = kwargs.pop("layer_past" if "layer_past" in kwargs else "past_key_values", None)
        call = _Call(past, rows, mask, kwargs.get("position_embeddings"), steps or {})
        if self.layer_idx in call.steps:
            call.steps[self.layer_idx][0].positions[self.layer_idx] = call.position_embeddings
        return super().forward(hidden_states, *args, attention_mask=None, linearize_call=call, **kwargs)


class _Carried:
    """A mask with arguments for the attention on it, through decoder layers that drop arguments they do not know."""

    def __init__(self, mask: Tensor | None, arguments: dict[str, Any]):
        self.mask, self.arguments = mask, arguments


class _Call:
    """What the swapped forward hands to `attention` through the source's own forward."""

    def __init__(self, past, rows, mask, position_embeddings, steps):
        self.past, self.rows, self.mask = past, rows, mask
        self.position_embeddings, self.steps = position_embeddings, steps


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, linearize_call=None, **kwargs: Any
):
    """The registered attention function: query [B, H, T, K], key [B, G, T, K], value [B, G, T, V] -> [B, T, H, V]."""
    if linearize_call is None:
        return _source_attention(module)(module, query, key, value, attention_mask, **kwargs)
    call: _Call = linearize_call

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _source_attention(module)(module, q, k, v, call.mask, **kwargs)[0].transpose(1, 2)

    def unrotate(x: Tensor) -> Tensor:
        return archs.unrotate(module, x, call.position_embeddings)

    scaling = kwargs.get("scaling")
    context = Context(
        layer_idx=module.layer_idx,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        extra=kwargs.get("s_aux"),
        unrotate=unrotate,
        rows=call.rows,
        cache=call.past,
        branch=module.branch,
        attend=attend,
        steps=call.steps,
    )
    device = query.device.type
    # Autocast would take the products of fp32 states through bf16.
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        y = heads.run(module.mixer, module.softmax_heads, query, key, value, context)
        return y.transpose(1, 2).contiguous(), None


def _source_attention(module: Any):
    implementation = module.source_config._attn_implementation
    eager = sys.modules[module.source_class.__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@cache
def _attention_class(source: type[nn.Module]) -> type[nn.Module]:
    name = f"Linearized{source.__name__}"
    return type(name, (LinearizedAttention, source), {"source_class": source, "__module__": __name__})


def _swap(model: nn.Module, path: str, config: PreTrainedConfig, mixer: MixerConfig) -> None:
    """Turn one attention module of a source into a linearized one, or give a linearized one another mixer."""
    module: Any = model.get_submodule(path)
    layer = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(module, LinearizedAttention):
        if archs.arch_of(config).drops_arguments:
            layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
        module.source_config = config
        module.rotates = archs.arch_of(config).rotates(module)
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = IMPLEMENTATION
        module.__class__ = _attention_class(type(module))
    reference = next(module.parameters())
    whole = archs.reach(config, module.layer_idx) is None
    geometry = heads.others(archs.geometry(config, module), mixer.softmax_heads, whole)
    module.mixer, module.softmax_heads = MIXERS[mixer.name](mixer, geometry).to(reference.device), mixer.softmax_heads


def _before_decoder(decoder: Any, args: tuple, kwargs: dict[str, Any]):
    """Once per forward: left-aligned rows for padding or packing; for a decoding step, what all layers do at once."""
    tokens = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
    T = tokens.shape[1]
    mask = kwargs.pop("linearize_mask", kwargs.get("attention_mask"))
    positions, rows = kwargs.get("position_ids"), None
    compiling = torch.compiler.is_compiling()
    if isinstance(mask, Tensor) and mask.ndim == 2:
        new = mask[:, -T:]
        if not (compiling and T == 1 or bool(new.all())):
            rows = Rows.from_padding(new)
    elif mask is None and positions is not None and T > 1 and not compiling:
        rows = Rows.from_positions(positions.expand(tokens.shape[0], -1))
    kwargs["linearize_rows"] = rows
    past = kwargs.get("past_key_values")
    # A compiler joins the layers' operations itself.
    if T == 1 and rows is None and isinstance(past, Cache) and not compiling:
        mixers = {m.layer_idx: m.mixer for m in decoder.linearized if m.branch != "source"}
        kwargs["linearize_steps"] = steps(mixers, past.layers)
    return args, kwargs


def _before_layer(layer: Any, args: tuple, kwargs: dict[str, Any]):
    """Put what the attention needs on the mask, which every layer passes on."""
    arguments = {name: kwargs.pop(name) for name in ("linearize_rows", "linearize_steps") if name in kwargs}
    kwargs["attention_mask"] = _Carried(kwargs.get("attention_mask"), arguments)
    return args, kwargs


def _after_decoder(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    modules = {m.layer_idx: m for m in decoder.linearized}
    for step in dict.fromkeys(step for step, _ in kwargs.get("linearize_steps", {}).values()):
        step.finish(archs.unrotate_layers([(modules[i], where) for i, where in step.positions.items()]))


# --- factories


class LinearizedConfig(PreTrainedConfig):
    """Opens the config.json of a linearized folder: a subclass of the source's own configuration, made on demand."""

    model_type = "linearized"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        block = config_dict.get("linearize")
        if not isinstance(block, dict) or "source" not in block or "layers" not in block:
            raise InputError(
                "config.json: model_type is 'linearized' but there is no complete `linearize` block; "
                "expected format, source and layers; convert the source again"
            )
        if block.get("format", 0) > FORMAT:
            raise InputError(
                f"config.json: linearize.format is {block['format']}; this version reads up to {FORMAT}; "
                "upgrade linearize"
            )
        for values in block["layers"].values():
            build_config(values)
        source = block["source"]["model_type"]
        if source not in CONFIG_MAPPING:
            raise InputError(
                f"config.json: linearize.source.model_type is {source!r}, which this version of "
                "transformers does not know"
            )
        return config_class(CONFIG_MAPPING[source]).from_dict(config_dict, **kwargs)


@cache
def config_class(source: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The linearized subclass of a source's configuration class, registered together with its model class."""
    # One __name__ for all, because saving and registering compare names; a distinct __qualname__, because registries of
    # recorded outputs are keyed by it.
    names: dict[str, Any] = {"__module__": __name__, "__qualname__": f"LinearizedConfig[{source.model_type}]"}
    names["_auto_class"] = _AUTO.get("config")
    linearized = type("LinearizedConfig", (source,), {"model_type": "linearized", **names})
    model = MODEL_FOR_CAUSAL_LM_MAPPING[source]
    AutoModelForCausalLM.register(linearized, model_class(model, linearized), exist_ok=True)
    return linearized


class LinearizedForCausalLM(_Source):
    """Mixed into the source's causal LM class; `AutoModelForCausalLM.from_pretrained` returns such a model."""

    _is_stateful = True
    config: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        paths = archs.attention_layers(self)
        for index, values in config.linearize["layers"].items():
            _swap(self, paths[int(index)], config, build_config(values))
        _hook(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any):
        _inherit_conversions(cls)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {k: sorted(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(k)}
        if wrong:
            found = "; ".join(
                f"{k.replace('_', ' ')}: {', '.join(map(str, v[:5]))} ({len(v)})" for k, v in wrong.items()
            )
            raise InputError(f"{args[0]}: the tensors do not fit its config.json: {found}; convert the source again")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        _inherit_conversions(type(self))
        super().save_pretrained(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        raise ValueError(
            "continuous batching pages a softmax cache, which a linearized model does not have; use `generate` with a "
            "padded batch"
        )

    def prepare_inputs_for_generation(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any):
        inputs = super().prepare_inputs_for_generation(*args, attention_mask=attention_mask, **kwargs)
        # With a static cache the padding is already folded into a 4-D mask, where rows of real tokens cannot be seen
        # any more.
        if attention_mask is not None and inputs.get("attention_mask") is not attention_mask:
            inputs["linearize_mask"] = attention_mask
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args: Any, **kwargs: Any):
        # Layers are swapped before the first step: a static cache would otherwise answer for the masks as if it were
        # softmax.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        past = model_kwargs.get("past_key_values")
        if past is not None and not self.training:
            for module in linearized_modules(self):
                if module.mixer.name != "softmax" and module.branch != "source":
                    grows = bool(module.softmax_heads)
                    cache_layer(past, module.layer_idx, module.mixer.window, module.mixer.sinks, grows)


def _inherit_conversions(cls: type) -> None:
    """Let transformers rename and join the checkpoint's tensors as it does for the source (fused experts, old names).

    It finds these rules by class name or model type, and all linearized classes share both; so they are set anew
    whenever a model is opened or saved.
    """
    source: Any = cls.__mro__[2]
    names = (source.__name__, source.config_class.model_type)
    rules = next((rules for name in names if (rules := get_checkpoint_conversion_mapping(name)) is not None), [])
    register_checkpoint_conversion_mapping("LinearizedForCausalLM", rules, overwrite=True)


@cache
def model_class(source: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    names: dict[str, Any] = {"__module__": __name__, "__qualname__": f"LinearizedForCausalLM[{source.__name__}]"}
    names["_auto_class"] = _AUTO.get("model")
    return type("LinearizedForCausalLM", (LinearizedForCausalLM, source), {"config_class": config, **names})


AutoConfig.register("linearized", LinearizedConfig, exist_ok=True)


# --- verbs


def linearize_(
    model: PreTrainedModel,
    mixer: MixerConfig | dict[str, Any],
    layers: list[int] | None = None,
    source: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Replace the attention of a causal LM by a mixer, in place; the weights stay where they are.

    Args:
        model: a source model, or a linearized one, whose named layers then get another mixer.
        mixer: which, and its numbers.
        layers: indices of the layers to replace; None means those whose attention sees the whole text: sliding-window
            layers stay, unless the source has no others.
        source: where the weights came from (id, revision, path, …), stored in the configuration.

    Returns:
        The same object.

    Raises:
        InputError: a layer out of range, an unknown mixer, or an architecture whose attention cannot be routed.

    Example:
        >>> linearize_(model, {"name": "gla", "window": 64, "sinks": 4})
    """
    config = build_config(mixer) if isinstance(mixer, dict) else mixer
    paths = archs.attention_layers(model)
    chosen = archs.check_layers(paths, layers, model.config)
    block = getattr(model.config, "linearize", None)
    if block is None:
        origin = {"model_type": model.config.model_type, "id": model.config._name_or_path or None, **(source or {})}
        model.config.__class__ = config_class(type(model.config))
        model.__class__ = model_class(type(model), type(model.config))
        model.config.linearize = block = {"format": FORMAT, "source": origin, "layers": {}}
        model.config.architectures = ["LinearizedForCausalLM"]
    for index in chosen:
        _swap(model, paths[index], model.config, config)
        block["layers"][str(index)] = config.to_dict()
    block["layers"] = {str(i): block["layers"][str(i)] for i in sorted(map(int, block["layers"]))}
    _hook(model)
    return model


def _hook(model: Any) -> None:
    entered = archs.arch_of(model.config).enters
    decoder: Any = model.get_submodule(entered) if entered else model.base_model
    decoder.linearized = linearized_modules(model)
    if _before_decoder not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
        decoder.register_forward_hook(_after_decoder, with_kwargs=True)


def linearized_modules(model: nn.Module) -> list[Any]:
    """All linearized attention modules, also below wrappers such as peft's."""
    return [m for m in model.modules() if isinstance(m, LinearizedAttention)]


@contextmanager
def branches(model: nn.Module, branch: str, layers: Collection[int] | None = None) -> Iterator[None]:
    """Run another path through the same weights for a while.

    Args:
        model: a linearized model, wrapped or not.
        branch: `source`: the source's own softmax attention; `window`: memory off; `memory`: window off; `all`: as
            converted.
        layers: indices of the layers that take it, the others go on as before; None: all.

    Raises:
        ValueError: an unknown branch, or a model with no linearized layer.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch is {branch!r}; expected one of {', '.join(BRANCHES)}")
    modules = linearized_modules(model)
    if not modules:
        raise ValueError("this model has no linearized layer")
    modules = [m for m in modules if layers is None or m.layer_idx in layers]
    before = [m.branch for m in modules]
    try:
        for m in modules:
            m.branch = branch
        yield
    finally:
        for m, b in zip(modules, before, strict=True):
            m.branch = b


def state_bytes(config: PreTrainedConfig, context: int, batch: int = 1, dtype_bytes: int = 2) -> dict[str, Any]:
    """Bytes of cache after `context` tokens, by arithmetic from a linearized configuration; recurrent layers of the
    source itself are left out.

    Args:
        config: a configuration with a `linearize` block.
        context: tokens per row.
        batch: rows.
        dtype_bytes: bytes per cached key or value element (the state itself is fp32).

    Returns:
        source_kv: bytes of the source's key/value cache; linearized: bytes of this model's; per_layer: the latter by
            layer.
    """
    per_layer = []
    total = 0
    g = archs.geometry(config)
    for index in range(config.get_text_config().num_hidden_layers):
        reach = archs.reach(config, index)
        kept = context if reach is None else min(context, reach)
        grown = batch * kept * g.kv_heads * (g.key_width + g.value_width) * dtype_bytes
        total += grown
        values = config.linearize["layers"].get(str(index))
        if values is None or values["name"] == "softmax":
            per_layer.append(grown)
        else:
            mixer = build_config(values)
            with torch.device("meta"):
                own = MIXERS[mixer.name](mixer, heads.others(g, mixer.softmax_heads)).state_bytes(batch, dtype_bytes)
            per_layer.append(own + grown * len(mixer.softmax_heads) // g.kv_heads)
    return {"source_kv": total, "linearized": sum(per_layer), "per_layer": per_layer}
