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

from linearize import archs
from linearize.cache import cache_layer
from linearize.errors import InputError
from linearize.mixers import MIXERS, Context, MixerConfig, build_config, heads
from linearize.mixers.step import steps
from linearize.ops.rows import Rows

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
