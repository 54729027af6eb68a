"""Every name that a linearized model needs of transformers and that its documentation does not promise.

One reason each; tests/model/test_transformers_api.py has one test each, which says what a new version has changed. What
transformers itself looks up on a model is overridden where it belongs: `_is_stateful`, `_prepare_cache_for_generation`,
`init_continuous_batching` and `_auto_class` in modeling.py, the methods of a cache layer in cache.py.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

# A cache layer has to be one of these, so that every kind of Cache takes it; a static one is told by its class. Layers
# of hybrids are copied and saved by what they hold.
from transformers.cache_utils import (
    CacheLayerMixin,  # noqa: F401
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,  # noqa: F401
    LinearAttentionLayer,
    StaticLayer,  # noqa: F401
)

# Rules by which tensors of a checkpoint are renamed and joined when it is read, and back when it is written.
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# How the cache is called has changed with 5.24, everywhere: as an argument, and in what a forward returns.
from transformers.generation.utils import ALL_CACHE_NAMES

# Masks are made by attention implementation; ours needs the one that SDPA gets.
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: F401

# The source's own attention function, which the control and the branch `source` run.
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# From the model type in a folder to the source's configuration class, and from that to its causal LM.
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: F401
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: F401

_RULES = threading.RLock()

CACHE: str = ALL_CACHE_NAMES[0]
"""Name of a model's cache, as an argument and in what it returns: `past_key_values`, since 5.24 `cache`."""
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""Every name by which a source hands its cache from the model to a layer."""

DYNAMIC_LAYERS = (
    *(DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer),
    LinearAttentionAndSlidingWindowAttentionLayer,
)
"""Kinds of layers of a dynamic cache that hold keys and values, or states, and nothing else."""


def set_attention(config: PreTrainedConfig, implementation: str) -> None:
    """Choose the attention function of one module's configuration.

    The public setter writes into nested configurations too, which the module's copy shares with the model's.

    Args:
        config: the module's own copy.
        implementation: name of a registered attention function.
    """
    config._attn_implementation_internal = implementation


def source_attention(config: Any, source: type[nn.Module]) -> Callable[..., Any]:
    """The attention function that a source's attention module would call.

    Args:
        config: of the source, which names it.
        source: the attention class, whose file holds the eager one.
    """
    eager = sys.modules[source.__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)


def offer(model: type) -> None:
    """Let transformers' server, where it runs, find a class: it looks for the one that a configuration names in its
    package, of which there are two in memory (processing_utils.py imports it again).

    Args:
        model: the class, by its own name.
    """
    if server := sys.modules.get("transformers.cli.serving.model_manager"):
        setattr(server.transformers, model.__name__, model)


def routable(source: type[nn.Module]) -> bool:
    """Whether an attention class looks its attention function up by name, which its file then imports."""
    return hasattr(sys.modules[source.__module__], "ALL_ATTENTION_FUNCTIONS")


def rotation(source: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """A source's own function for RoPE, (q, k, cos, sin) -> (q, k); its file has it under this name, or none."""
    return getattr(sys.modules[source.__module__], "apply_rotary_pos_emb", None)


def cache_of(given: Any) -> Any:
    """The cache among keyword arguments, or in what was returned, by whatever name; None where there is none.

    Args:
        given: a mapping: arguments of a forward or of `generate`, or the output of one.
    """
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def name_of(config: PreTrainedConfig) -> str | None:
    """Folder or Hub id that a model was opened from."""
    return config._name_or_path or None


def new_layer(cache: Cache) -> Any:
    """One more layer of the kind that a cache makes for itself."""
    make: Any = cache.layer_class_to_replicate
    return make()


@contextmanager
def conversion_rules(name: str, source: Any) -> Iterator[None]:
    """For the time of one call, rename and join the tensors of a linearized model as those of its source.

    transformers finds these rules (fused experts, old names) by class name or model type, in one table of the process;
    all linearized classes share both. So the entry stands there only while a model is opened or saved, for one thread
    at a time, and what stood there before comes back.

    Args:
        name: of the linearized class.
        source: the source's causal LM class.
    """
    with _RULES:
        before = get_checkpoint_conversion_mapping(name)
        candidates = map(get_checkpoint_conversion_mapping, (source.__name__, source.config_class.model_type))
        rules = next((each for each in candidates if each is not None), [])
        register_checkpoint_conversion_mapping(name, rules, overwrite=True)
        try:
            yield
        finally:
            register_checkpoint_conversion_mapping(name, before or [], overwrite=True)
