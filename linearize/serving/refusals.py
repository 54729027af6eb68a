"""What vLLM can be asked for and a linearized model cannot do there: one paragraph, before anything is loaded."""

from typing import Any

from ..errors import InputError
from ..model.mixers import MIXERS, build_config

ELSEWHERE = "serve this folder with transformers (linearize generate)"


def check_settings(config: Any) -> None:
    """Refuse settings that would be ignored, or give wrong text.

    Args:
        config: vLLM's, of everything.

    Raises:
        InputError: names every one.
    """
    parallel, cache, model, problems = config.parallel_config, config.cache_config, config.model_config, []
    if config.speculative_config is not None:
        problems.append(
            "speculative decoding is on, but tokens cannot be taken back out of a state; leave --speculative-config out"
        )
    for what in ("tensor", "pipeline", "decode_context", "prefill_context"):
        name = f"{what}_parallel_size"
        if (size := getattr(parallel, name, 1)) > 1:
            problems.append(f"{name} is {size}, and linearized layers run on one device; expected 1")
    if model.quantization is not None:
        problems.append(f"quantization is {model.quantization!r}; linearized models run unquantised")
    if model.runner_type != "generate":
        problems.append(f"runner is {model.runner_type!r}; linearized models write text, expected 'generate'")
    for name, kept in (
        ("kv_cache_dtype", str(model.dtype).removeprefix("torch.")), ("mamba_cache_dtype", "float32"),
        ("mamba_ssm_cache_dtype", "float32"),
    ):  # fmt: skip
        if (found := getattr(cache, name.removeprefix("kv_"))) not in ("auto", kept):
            problems.append(
                f"{name} is {found!r}; pages hold keys and values in the model's dtype, and states as the folder says "
                f"(state_dtype); leave --{name.replace('_', '-')} out"
            )
    if config.lora_config is not None:
        problems.append("LoRA is on; merge the adapter first (linearize merge) and leave --enable-lora out")
    if getattr(config, "kv_transfer_config", None) is not None:
        problems.append(
            "KV transfer is on, but there are no keys and values to transfer; leave --kv-transfer-config out"
        )
    if problems:
        raise InputError(f"vLLM settings: {'; '.join(problems)}")


def check_layers(config: Any) -> dict[int, dict[str, Any]]:
    """The linearized layers of a folder; those that keep the source's own cache are left to vLLM.

    Args:
        config: with its `linearize` block.

    Returns:
        Layer index -> its mixer's values.

    Raises:
        InputError: no linearized layer is left, or one has what only transformers can run.
    """
    wanted = {}
    for index, values in config.linearize["layers"].items():
        mixer = build_config(values)
        if mixer.softmax_heads:
            raise InputError(
                f"layer {index}: heads {', '.join(map(str, mixer.softmax_heads))} stay softmax inside a linearized "
                f"layer, and vLLM pages whole layers; keep whole layers instead (linearize select), or {ELSEWHERE}"
            )
        if not MIXERS[mixer.name].keeps_source_cache:
            wanted[int(index)] = values
    if not wanted:
        raise InputError("config.json: no layer has a state of its own; serve the source instead")
    return wanted
