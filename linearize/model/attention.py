"""Attention modules of a source with their forward kept and their attention function routed to a mixer."""

import copy
import sys
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Cache,
    PreTrainedConfig,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import architectures, softmax_heads
from .decoding import steps
from .mixers import MIXERS, Context, MixerConfig
from .ops.rows import Rows

IMPLEMENTATION = "linearize"
# The mixed-in classes rely on the source's class that follows them; a type checker is told so.
if TYPE_CHECKING:
    from typing import Any as _Source
else:
    _Source = object


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
        return architectures.unrotate(module, x, call.position_embeddings)

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
        y = softmax_heads.run(module.mixer, module.softmax_heads, query, key, value, context)
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


def swap_attention(model: nn.Module, path: str, config: PreTrainedConfig, mixer: MixerConfig) -> None:
    """Turn one attention module of a source into a linearized one, or give a linearized one another mixer."""
    module: Any = model.get_submodule(path)
    layer = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(module, LinearizedAttention):
        if architectures.arch_of(config).drops_arguments:
            layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
        module.source_config = config
        module.rotates = architectures.arch_of(config).rotates(module)
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = IMPLEMENTATION
        module.__class__ = _attention_class(type(module))
    reference = next(module.parameters())
    whole = architectures.reach(config, module.layer_idx) is None
    geometry = softmax_heads.others(architectures.geometry(config, module), mixer.softmax_heads, whole)
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
        step.finish(architectures.unrotate_layers([(modules[i], where) for i, where in step.positions.items()]))


def hook_decoder(model: Any) -> None:
    entered = architectures.arch_of(model.config).enters
    decoder: Any = model.get_submodule(entered) if entered else model.base_model
    decoder.linearized = linearized_modules(model)
    if _before_decoder not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
        decoder.register_forward_hook(_after_decoder, with_kwargs=True)


def linearized_modules(model: nn.Module) -> list[Any]:
    """All linearized attention modules, also below wrappers such as peft's."""
    return [m for m in model.modules() if isinstance(m, LinearizedAttention)]
