"""What vLLM calls when it starts: its entry point `vllm.general_plugins`."""

import logging
from typing import Any

from .refusals import check_layers, check_settings

NAME = "LinearizedForCausalLM"


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
        check_settings(vllm_config)
        config = vllm_config.model_config.hf_text_config
        linearized = check_layers(config)
        if getattr(config, "layer_types", None):  # vLLM counts layers with a state by them
            kinds = enumerate(config.layer_types)
            config.layer_types = ["linear_attention" if i in linearized else kind for i, kind in kinds]
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching:
            logging.getLogger("vllm.linearize").warning(
                "prefix caching is turned off: what a linearized layer keeps of a text cannot be cut at a block"
            )
            cache.enable_prefix_caching = False

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing: vLLM asks for it."""


def register() -> None:
    """Tell vLLM of linearized folders. It runs in every process of vLLM, and imports no model."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    import linearize.model.modeling  # noqa: F401  registers model type `linearized` with transformers

    if not hasattr(MambaAttentionBackendEnum, "LINEARIZED"):
        MambaAttentionBackendEnum.register("LINEARIZED", "linearize.serving.vllm_layer.Backend")
    ModelRegistry.register_model(NAME, f"linearize.serving.vllm_model:{NAME}")
    MODELS_CONFIG_MAP[NAME] = Settings  # pyright: ignore[reportArgumentType]
