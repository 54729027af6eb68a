"""What vLLM calls when it starts: its entry point `vllm.general_plugins`."""

import logging
from typing import Any

from ..errors import InputError
from ..model.transformers_api import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from .refusals import ELSEWHERE, check_layers, check_settings

NAME = "LinearizedForCausalLM"
VERSION = "0.32"
"""Of vLLM: what the plugin uses of it changes from one to the next."""
LOG = logging.getLogger("vllm.linearize")


def source_architecture(config: Any) -> str:
    """vLLM's name for what a folder was converted from; no model is imported.

    Args:
        config: with its `linearize` block.

    Raises:
        InputError: vLLM has no class of its own for it.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    kind = config.linearize["source"]["model_type"]
    name = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]].__name__
    own = getattr(ModelRegistry.models.get(name), "module_name", None)
    if own is None or own.startswith("vllm.model_executor.models.transformers"):  # the latter runs transformers' code
        raise InputError(
            f"{name}: this version of vLLM has no class of its own for the source's architecture ({kind}); {ELSEWHERE}"
        )
    return name


class Settings:
    """What vLLM calls once its configuration is complete, before it loads anything."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what a linearized model cannot do, and turn off what is on by default.

        Args:
            vllm_config: of everything.

        Raises:
            InputError: one paragraph.
        """
        from vllm import __version__

        if not __version__.startswith(f"{VERSION}."):
            raise InputError(f"vLLM {__version__}: linearized folders need {VERSION}; pip install 'vllm=={VERSION}.*'")
        check_settings(vllm_config)
        config = vllm_config.model_config.hf_text_config
        source_architecture(vllm_config.model_config.hf_config)
        linearized = check_layers(config)
        if kinds := getattr(config, "layer_types", None):  # vLLM counts layers with a state by them
            config.source_layer_types = getattr(config, "source_layer_types", kinds)
            config.layer_types = ["linear_attention" if i in linearized else kind for i, kind in enumerate(kinds)]
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching:
            LOG.warning(
                "prefix caching is turned off: what a linearized layer keeps of a text cannot be cut at a block"
            )
            cache.enable_prefix_caching = False

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing: vLLM asks for it."""


def register() -> None:
    """Tell vLLM of linearized folders. It runs in every process of vLLM, and imports no model."""
    import linearize.model.modeling  # noqa: F401  registers model type `linearized` with transformers

    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
    except ImportError as error:  # other models are served all the same
        LOG.warning("linearized folders cannot be served: they need vLLM %s.*, and here: %s", VERSION, error)
        return
    if not hasattr(MambaAttentionBackendEnum, "LINEARIZED"):
        MambaAttentionBackendEnum.register("LINEARIZED", "linearize.serving.vllm_layer.Backend")
    ModelRegistry.register_model(NAME, f"linearize.serving.vllm_model:{NAME}")
    MODELS_CONFIG_MAP[NAME] = Settings  # pyright: ignore[reportArgumentType]
