"""What an architecture needs told, and how to find out the rest by looking.

Almost everything comes from the source's own code; a row here holds only what cannot be seen in a module.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import InputError
from . import transformers_api
from .tokens import Geometry

RECORD = Path(__file__).with_name("architectures.json")
"""Which architectures passed the probe, and why the others did not; written by scripts/probe_archs.py."""
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
    """The row of a source or linearized configuration, or of the text model inside; the default where there is none."""
    block = getattr(config, "linearize", None)
    kinds = block["source"]["model_type"] if block else config.model_type, config.get_text_config().model_type
    return next((ARCHS[kind] for kind in kinds if kind in ARCHS), Arch())


@cache
def record() -> dict[str, Any]:
    """Which model types passed the probe with which version of transformers, and why the others did not."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def attention_layers(model: nn.Module) -> dict[int, str]:
    """Layer index -> path of its attention module, found by what attention modules have in transformers.

    Raises:
        InputError: no module that calls a registered attention function.
    """
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "is_causal") and index not in paths and _routable(module):
            paths[index] = path
    if not paths:
        kind = model.config.model_type  # type: ignore[union-attr]
        raise InputError(
            f"model type {kind!r}: its attention does not go through transformers' attention interface, so it cannot "
            "be replaced without copying its code; `linearize archs` lists what can"
        )
    return dict(sorted(paths.items()))


def _routable(module: nn.Module) -> bool:
    cls = getattr(type(module), "source_class", type(module))
    takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls.forward).parameters.values())
    return takes_kwargs and transformers_api.routable(cls)


def reach(config: PreTrainedConfig, layer: int) -> int | None:
    """Tokens that the source's attention in a layer keeps.

    Args:
        config: of a source or a linearized model.
        layer: its index.

    Returns:
        The width of its sliding window in tokens; None where it sees all; 0 where the layer has no attention.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return window
    if kinds[layer] in ("sliding_attention", "chunked_attention"):
        return window if kinds[layer] == "sliding_attention" else getattr(config, "attention_chunk_size", None)
    return None if "attention" in kinds[layer] and kinds[layer] != "linear_attention" else 0


def full_layers(paths: dict[int, str], config: PreTrainedConfig) -> list[int]:
    """The attention layers that see the whole text; all of them in a source that slides a window in every layer.

    Args:
        paths: of `attention_layers`.
        config: of the same model.

    Returns:
        Their indices, ascending.
    """
    return [i for i in paths if reach(config, i) is None] or list(paths)


def check_layers(paths: dict[int, str], layers: list[int] | None, config: PreTrainedConfig) -> list[int]:
    """The chosen layers, each once and in order.

    Args:
        paths: of `attention_layers`.
        layers: indices; None chooses those of `full_layers`.
        config: of the same model.

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
    """Heads and widths of an attention layer.

    Args:
        config: of a source or a linearized model.
        module: the layer's attention, which may know better than the configuration.

    Raises:
        InputError: its heads are no multiple of its key/value heads.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if module is not None:
        groups = getattr(module, "num_key_value_groups", 1)
        kv_heads = heads // groups
        if kv_heads * groups != heads:
            raise InputError(
                f"{type(module).__name__}: {groups} query heads share a key/value head, but num_attention_heads is "
                f"{heads}; layers with different numbers of heads are not possible; leave this one out (layers)"
            )
    widths = (getattr(o, n, None) for o, n in ((module, "head_dim"), (module, "head_size"), (config, "head_dim")))
    width = next((w for w in widths if w), config.hidden_size // heads)
    return Geometry(heads, kv_heads, width, width)


class Rope(NamedTuple):
    """How one attention module rotates queries and keys.

    Attributes:
        applied: it does, where it is given angles or makes its own.
        inside: it may make angles of its own, which are not known outside.
        half_angles: see `Arch`.
        scaled: cos and sin are multiplied by a factor.
    """

    applied: bool
    inside: bool
    half_angles: bool
    scaled: bool


# Kinds of RoPE whose angles are not scaled; YaRN's and LongRoPE's are, and those of a kind unknown here may be.
_UNSCALED = {"default", "linear", "dynamic", "llama3", "proportional"}


def rope_of(module: nn.Module, config: PreTrainedConfig) -> Rope:
    """How a source's attention module rotates, from its code and its configuration.

    Args:
        module: of the source's own class.
        config: of the whole source.
    """
    cls, arch = type(module), arch_of(config)
    given = "position_embeddings" in inspect.signature(cls.forward).parameters
    methods = [f for base in cls.__mro__ if base not in nn.Module.__mro__ for f in vars(base).values()]
    names = {name.lower() for f in methods if inspect.isfunction(f) for name in f.__code__.co_names}
    # What applies angles waits for them; the rest would make them here.
    inside = any(part in name for name in names for part in ("rotary", "rotate", "apply_rope", "rope_emb"))
    if given:
        inside = any("rotary_emb" in name and not name.startswith("apply") for name in names)
    return Rope(arch.rotates(module), inside, arch.half_angles, _scales_angles(config))


def _scales_angles(config: PreTrainedConfig) -> bool:
    values = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # One set of numbers, or one for each type of layer.
    each = [value for value in values.values() if isinstance(value, dict)] or [values]
    return any(value.get("rope_type", value.get("type", "default")) not in _UNSCALED for value in each)


def unrotate(module: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys as they were before RoPE: the source's own rotation, run backwards.

    Args:
        module: a linearized attention module.
        x: [B, heads, T, K].
        position_embeddings: cos and sin [B, T, rotated channels], or half as many; None where the source gives none.

    Returns:
        fp32, like x.

    Raises:
        InputError: the source rotates in a way that cannot be run backwards from outside.
    """
    x, rope = x.float(), module.rope
    if not rope.applied or position_embeddings is None and not rope.inside:
        return x
    apply = transformers_api.rotation(module.source_class)
    if apply is None or not isinstance(position_embeddings, tuple | list) or len(position_embeddings) != 2:
        raise InputError(
            f"{module.source_class.__name__}: rotates queries and keys (RoPE) by angles of its own making, so keys "
            "before RoPE, which this mixer needs, are not known; expected cos and sin as `position_embeddings` and a "
            "function `apply_rotary_pos_emb` in its file; use the mixer `window`, or keep these layers softmax"
        )
    cos, sin = (e.float() for e in position_embeddings)
    sin = -sin
    width = cos.shape[-1] * (2 if rope.half_angles else 1)
    if rope.scaled:
        # The square of the factor divides out.
        square = cos[..., :1] ** 2 + sin[..., :1] ** 2
        cos, sin = cos / square, sin / square
    # It rotates queries and keys; the second argument gets no heads.
    raw = apply(x[..., :width], x[:, :0, :, :width], cos, sin)[0]
    return raw if width == x.shape[-1] else torch.cat([raw, x[..., width:]], -1)


def unrotate_layers(layers: list[tuple[Any, Any]]) -> Callable[[Tensor], Tensor]:
    """`unrotate` for one token of several layers at once.

    Args:
        layers: each an attention module and its position embeddings.

    Returns:
        Keys [L·B, G, 1, K] of the layers one after the other -> the same before RoPE, fp32.
    """

    def run(x: Tensor) -> Tensor:
        K = x.shape[-1]
        # [B, L, G, K]: layers beside heads, so that a rotation they share is one product.
        x = x.float().unflatten(0, (len(layers), -1)).squeeze(3).transpose(0, 1)
        basis = torch.eye(K, device=x.device).view(1, K, 1, K)
        known: dict[Any, Tensor] = {}
        matrices = []
        for module, embeddings in layers:
            angles = embeddings[0] if embeddings is not None and module.rope.applied else None
            key = None if angles is None else id(angles)
            if key not in known:
                batch = 1 if angles is None else angles.shape[0]
                known[key] = unrotate(module, basis.expand(batch, -1, -1, -1), embeddings).squeeze(2)
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

    Returns:
        Each name once, by role.

    Raises:
        InputError: an unknown role, or one that no module plays.
    """
    linearized = {int(i) for i in model.config.linearize["layers"]}  # type: ignore[union-attr]
    attentions = [f"{path}." for i, path in attention_layers(model).items() if i in linearized]
    blocks = [attention[:-1].rpartition(".")[0] + "." for attention in attentions]
    modules = [n for n, m in model.named_modules() if hasattr(m, "weight") and n.startswith(tuple(blocks))]
    inside = [n for n in modules if n.startswith(tuple(attentions))]
    outside = [n for n in modules if n not in inside]
    chosen: list[str] = []
    for role in roles:
        if role != "mlp" and role not in ROLES:
            raise InputError(f"roles: unknown role {role!r}; expected some of {', '.join((*ROLES, 'mlp'))}")
        names = MLP if role == "mlp" else ROLES[role]
        hits = [n for n in (outside if role == "mlp" else inside) if n.rpartition(".")[2] in names]
        if not hits:
            raise InputError(f"roles: {role!r} targets no module of this model; looked for {', '.join(names)}")
        chosen += [h for h in hits if h not in chosen]
    return chosen
