"""What an architecture needs told, and how to find out the rest by looking.

Almost everything comes from the source's own code; a row here holds only what cannot be seen in a module.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearize.errors import InputError
from linearize.mixers.base import Geometry


@dataclass(frozen=True)
class Arch:
    """One row.

    Attributes:
        rotates: attention module -> whether this layer applies RoPE (some skip it in some layers).
        roles: role -> names of the modules below the block that play it, where they are not called as in Llama.
    """

    rotates: Callable[[Any], bool] = lambda attention: True
    roles: dict[str, tuple[str, ...]] | None = None


ROLES = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}

ARCHS: dict[str, Arch] = {
    "cohere2": Arch(rotates=lambda attention: attention.sliding_window is not None),
    "exaone4": Arch(rotates=lambda attention: attention.sliding_window is None or attention.is_sliding),
    "smollm3": Arch(rotates=lambda attention: bool(attention.use_rope)),
}


def arch_of(config: PreTrainedConfig) -> Arch:
    """The row of a source or linearized configuration, the default where there is none."""
    block = getattr(config, "linearize", None)
    return ARCHS.get(block["source"]["model_type"] if block else config.model_type, Arch())


def model_types() -> list[str]:
    """Model types of causal language models whose attention goes through transformers' interface, so can be replaced.

    Read from the text of transformers' modeling files, because importing them all takes minutes. Whether the conversion
    of one is exact, the softmax control shows.
    """
    folder = Path(transformers.__file__).parent / "models"
    files = {kind: model_type_to_module_name(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    paths = {kind: folder / module / f"modeling_{module}.py" for kind, module in files.items()}
    return [
        kind for kind, path in sorted(paths.items()) if path.is_file() and "ALL_ATTENTION_FUNCTIONS" in path.read_text()
    ]


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


def check_layers(paths: dict[int, str], layers: list[int] | None, config: PreTrainedConfig) -> list[int]:
    """The chosen layers, in order.

    Raises:
        InputError: an index that names no attention layer.
    """
    chosen = sorted(set(paths if layers is None else layers))
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
    width = cos.shape[-1]
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

    Args:
        model: a linearized model.
        roles: of q, k, v, o, mlp.

    Raises:
        InputError: an unknown role, or one that no module plays.
    """
    names = {**ROLES, **(arch_of(model.config).roles or {})}  # type: ignore[arg-type]
    linearized = {int(i) for i in model.config.linearize["layers"]}  # type: ignore[union-attr]
    blocks = {p.rpartition(".")[0] + "." for i, p in attention_layers(model).items() if i in linearized}
    modules = [n for n, m in model.named_modules() if hasattr(m, "weight") and any(n.startswith(b) for b in blocks)]
    found: list[str] = []
    for role in roles:
        if role not in names:
            raise InputError(f"roles: unknown role {role!r}; expected some of {', '.join(names)}")
        hits = [n for n in modules if n.rpartition(".")[2] in names[role]]
        if not hits:
            raise InputError(f"roles: {role!r} targets no module of this model; looked for {', '.join(names[role])}")
        found += [h for h in hits if h not in found]
    return found
