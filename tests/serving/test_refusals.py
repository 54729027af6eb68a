"""What vLLM may not ask of a linearized folder, known before anything is loaded. Runs without vLLM."""

import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linearize.errors import InputError
from linearize.serving.refusals import check_layers, check_settings


def settings(**changes):
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    values = {
        "parallel_config": SimpleNamespace(**{**parallel, **changes.pop("parallel", {})}),
        "model_config": SimpleNamespace(
            **{"quantization": None, "runner_type": "generate", "dtype": torch.bfloat16} | changes.pop("model", {})
        ),
        "cache_config": SimpleNamespace(
            **dict.fromkeys(("cache_dtype", "mamba_cache_dtype", "mamba_ssm_cache_dtype"), "auto")
            | changes.pop("cache", {})
        ),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**{**values, **changes})


def folder(*mixers):
    return SimpleNamespace(linearize={"layers": {str(index): values for index, values in enumerate(mixers)}})


def test_plain_settings_pass() -> None:
    check_settings(settings())
    check_settings(settings(cache={"cache_dtype": "bfloat16", "mamba_ssm_cache_dtype": "float32"}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speculative_config": object()}, "speculative decoding is on"),
        ({"lora_config": object()}, "linearize merge"),
        ({"model": {"quantization": "fp8"}}, "quantization is 'fp8'"),
        ({"model": {"runner_type": "pooling"}}, "runner is 'pooling'"),
        ({"cache": {"cache_dtype": "fp8"}}, "--kv-cache-dtype out"),
        ({"cache": {"mamba_ssm_cache_dtype": "float16"}}, "--mamba-ssm-cache-dtype out"),
        ({"parallel": {"tensor_parallel_size": 2}}, "tensor_parallel_size is 2"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
    ],
)
def test_a_setting_that_would_give_wrong_text_is_refused(changes, says) -> None:
    with pytest.raises(InputError, match=says):
        check_settings(settings(**changes))


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(InputError, match="speculative.*quantization.*LoRA"):
        check_settings(settings(speculative_config=object(), model={"quantization": "fp8"}, lora_config=object()))


def test_layers_with_the_sources_own_cache_are_left_to_vllm() -> None:
    assert list(
        check_layers(folder({"name": "gla"}, {"name": "softmax", "combine": "none"}, {"name": "clusters"}))
    ) == [0, 2]
    with pytest.raises(InputError, match="serve the source"):
        check_layers(folder({"name": "softmax", "combine": "none"}))


def test_heads_that_stay_softmax_are_refused() -> None:
    with pytest.raises(InputError, match="layer 1: heads 0, 2 stay softmax"):
        check_layers(folder({"name": "gla"}, {"name": "gla", "softmax_heads": [0, 2]}))


def test_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["linearize"].partition(":")
    assert callable(getattr(import_module(module), name))
    assert "vllm" not in project["optional-dependencies"]  # it holds transformers below what the rest needs
