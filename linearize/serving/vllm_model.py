"""vLLM's own model of the source's architecture, with `Attention` swapped where the folder says so. No model is copied:
the class is made on demand from vLLM's, as model/modeling.py makes it from transformers'.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import set_default_torch_dtype

from ..errors import InputError
from ..model import architectures
from ..model.mixers import MIXERS, Geometry, Mixer, build_config
from . import pages
from .refusals import ELSEWHERE, check_layers
from .vllm_layer import OPERATION, LinearizedLayer
from .vllm_plugin import source_architecture

ALIGNED = 16
"""Bytes that a page is a multiple of, so that each begins where any dtype can."""


def _mixer(values: dict[str, Any], geometry: Geometry) -> Mixer:
    config = build_config(values)
    return MIXERS[config.name](config, geometry)


def _largest_page(vllm_config: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The layout of the layer whose page takes the most bytes."""
    config, dtype = vllm_config.model_config.hf_text_config, vllm_config.model_config.dtype
    layers = check_layers(config)
    geometry = architectures.geometry(config)
    with torch.device("cpu"), set_default_torch_dtype(torch.float32):
        layouts = [pages.layout(_mixer(values, geometry), dtype) for values in layers.values()]
    return max(layouts, key=pages.page_bytes)


class Served(nn.Module):
    """Mixed into vLLM's class of the source's architecture.

    Attributes:
        source_class: that class.
        linearized: layer index -> what stands where its attention stood.
    """

    source_class: ClassVar[Any]

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # pyright: ignore[reportCallIssue]
        self.linearized = _swap(self, vllm_config)
        splits = vllm_config.compilation_config.splitting_ops
        if splits and (name := f"vllm::{OPERATION}") not in splits:
            splits.append(name)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the source's weights by vLLM's own rules, and the mixers'.

        Args:
            weights: names as in the folder.

        Returns:
            Names of the parameters that were loaded.

        Raises:
            InputError: weights of a mixer are missing, or left over.
        """
        own: dict[tuple[int, str], Tensor] = {}

        def sources() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                path, mixer, parameter = name.partition(".mixer.")
                if mixer:
                    own[extract_layer_index(path), parameter] = weight.clone()
                else:
                    yield name, weight

        loaded = super().load_weights(sources())  # type: ignore[misc]
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        expected = {
            (index, name): parameter
            for index, layer in self.linearized.items()
            for name, parameter in layer.mixer.named_parameters()
        }
        if own.keys() != expected.keys():
            wrong = sorted(own.keys() ^ expected.keys())
            raise InputError(
                f"weights of mixers: {wrong[:5]} ({len(wrong)}) (layer, name) are missing or left over; the folder "
                "does not fit its config.json; convert the source again"
            )
        for key, parameter in expected.items():
            parameter.data.copy_(own[key])
        return {*loaded, *(names[id(parameter)] for parameter in expected.values())}


def _swap(model: nn.Module, vllm_config: Any) -> dict[int, LinearizedLayer]:
    """Put a linearized layer where `config.json` asks for one, also in vLLM's list of layers."""
    config, dtype = vllm_config.model_config.hf_text_config, vllm_config.model_config.dtype
    known = vllm_config.compilation_config.static_forward_context
    wanted, swapped = check_layers(config), {}
    for path, attention in [(path, m) for path, m in model.named_modules() if isinstance(m, Attention)]:
        index = extract_layer_index(attention.layer_name)
        if index not in wanted:
            continue
        parent, _, child = path.rpartition(".")
        if attention.has_sink or getattr(attention.impl, "alibi_slopes", None) is not None:
            raise InputError(
                f"layer {index}: its attention has learned sinks or ALiBi, which this plugin does not hand to a mixer; "
                f"{ELSEWHERE}"
            )
        geometry = Geometry(attention.num_heads, attention.num_kv_heads, attention.head_size, attention.head_size_v)
        with set_default_torch_dtype(torch.float32):
            mixer = _mixer(wanted[index], geometry)
            rotary = _rotary(model.get_submodule(parent), mixer, config, index)
            layer = LinearizedLayer(attention, mixer.to(dtype), rotary, dtype)
        if index in swapped:
            raise InputError(f"layer {index} has two attentions in vLLM's {type(model).__name__}: {path} is the second")
        setattr(model.get_submodule(parent), child, layer)
        known[attention.layer_name] = swapped[index] = layer
    if missing := sorted(set(wanted) - set(swapped)):
        raise InputError(
            f"layers {', '.join(map(str, missing))}: vLLM's {type(model).__name__} has no attention of its usual kind "
            f"there, so they cannot be served linearized; {ELSEWHERE}"
        )
    largest = max(pages.page_bytes(layer.layout) for layer in swapped.values())
    for layer in swapped.values():
        layer.page_bytes = -(-largest // ALIGNED) * ALIGNED
    return swapped


def _rotary(parent: nn.Module, mixer: Mixer, config: PreTrainedConfig, index: int) -> nn.Module | None:
    """The source's rotation beside its attention, where the mixer needs keys before it."""
    if not _unrotates(mixer):
        return None
    rotary = getattr(parent, "rotary_emb", None)
    plain = hasattr(rotary, "cos_sin_cache") and hasattr(rotary, "is_neox_style")
    kind = config.linearize["source"]["model_type"]
    if not plain or kind in architectures.ARCHS:
        raise InputError(
            f"layer {index}: the mixer {mixer.name} needs keys as they were before RoPE, and how vLLM's "
            f"{type(parent).__name__} rotates ({kind}) is not known; {ELSEWHERE}, or convert with window or clusters, "
            "which need none"
        )
    return rotary


def _unrotates(mixer: Mixer) -> bool:
    """Whether a mixer asks for queries or keys before RoPE."""
    asked = []

    def unrotate(x: Tensor) -> Tensor:
        asked.append(x)
        return x.float()

    g = mixer.geometry
    if mixer.recurrent:
        mixer.kept_features(torch.zeros(1, g.kv_heads, 1, g.key_width), unrotate)
        context: Any = type("Asking", (), {"unrotate": staticmethod(unrotate), "scaling": 1.0})
        mixer.query(torch.zeros(1, g.heads, 1, g.key_width), context)
    return bool(asked)


@cache
def served_class(source: type[nn.Module]) -> type[nn.Module]:
    """vLLM's class of a source's architecture, linearized."""
    return type(f"Linearized{source.__name__}", (Served, source), {"source_class": source})


def source_class(vllm_config: Any) -> type[nn.Module]:
    """vLLM's class for the architecture that a folder was converted from."""
    return ModelRegistry.models[source_architecture(vllm_config.model_config.hf_config)].load_model_cls()


class LinearizedForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The door: what vLLM finds under the architecture in config.json, which makes the model of the right class."""

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        """The model: of `served_class`, and none of this class."""
        config, made = vllm_config.model_config.hf_text_config, served_class(source_class(vllm_config))
        counted = getattr(config, "layer_types", None)
        if counted:  # the plugin's; the source's code reads its own
            config.layer_types = config.source_layer_types
        try:
            return made(vllm_config=vllm_config, prefix=prefix)
        finally:
            if counted:
                config.layer_types = counted

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        raise TypeError("made by __new__")

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Of the largest page."""
        return tuple(shape for shape, _ in _largest_page(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """Of the largest page."""
        return tuple(dtype for _, dtype in _largest_page(vllm_config))

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ):
        """vLLM asks the class whether it has this and the two below; none is called, as no object is of this class."""
        raise TypeError("made by __new__")

    embed_input_ids = compute_logits = forward
