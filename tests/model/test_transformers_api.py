"""One test for each name of transformers that its documentation does not promise. A failure here says what changed."""

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

from linearize.model import transformers_api as api
from linearize.model.attention import IMPLEMENTATION
from linearize.model.modeling import LinearizedConfig, LinearizedForCausalLM, linearize_

MODEL = Path(api.__file__).parent
GLA = {"name": "gla", "window": 8, "sinks": 2}


def source_of(function: Any) -> str:
    return inspect.getsource(function)


def test_nothing_else_in_the_model_imports_from_inside_transformers() -> None:
    for file in MODEL.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.") and not node.level:
                assert file.name == "transformers_api.py", (
                    f"{file.name}: {node.module} belongs into transformers_api.py"
                )


@pytest.mark.parametrize("name", api.CACHE_NAMES)
def test_a_cache_is_seen_under_every_name_that_a_version_gives_it(name: str) -> None:
    model = linearize_(tiny_model("llama", layers=1), GLA)
    layer, hidden = model.model.layers[0].self_attn, torch.randn(1, 3, model.config.hidden_size)
    angles = model.model.rotary_emb(hidden, torch.arange(3)[None])
    given = {"attention_mask": None, "position_embeddings": angles, "linearize_rows": None}
    cache = DynamicCache()
    layer(hidden, **given, **{name: cache})
    assert cache.get_seq_length() == 3


def test_a_model_takes_and_returns_its_cache_by_the_name_of_this_version() -> None:
    model = tiny_model("llama", layers=1)
    cache = DynamicCache()
    made = model(torch.tensor([[3, 4]]), **{api.CACHE: cache}, use_cache=True)
    assert made[api.CACHE] is cache and cache.get_seq_length() == 2


def test_the_server_looks_for_the_class_in_its_own_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.cli.serving.model_manager"
    monkeypatch.setitem(sys.modules, name, server := ModuleType(name))
    server.transformers = ModuleType("transformers")  # type: ignore[attr-defined]
    LinearizedConfig.from_dict(linearize_(tiny_model(layers=1), GLA).config.to_dict())  # as opening a folder does
    assert server.transformers.LinearizedForCausalLM is LinearizedForCausalLM
    file = Path(transformers.__file__).parent / "cli" / "serving" / "model_manager.py"
    if file.exists():  # newer than the oldest version that is allowed
        assert "getattr(transformers, config.architectures[0])" in file.read_text()


def test_every_name_is_used() -> None:
    texts = [file.read_text() for file in MODEL.rglob("*.py") if file.name != "transformers_api.py"]
    texts.append(Path(api.__file__).read_text().partition("_RULES = ")[2])
    for name, value in vars(api).items():
        if (
            getattr(value, "__module__", "").startswith("transformers")
            or getattr(value, "__module__", "") == api.__name__
        ):
            assert any(name in text for text in texts), f"transformers_api.{name} is not used any more"


def test_config_mapping_knows_a_model_type() -> None:
    assert api.CONFIG_MAPPING["llama"] is type(tiny_config("llama"))
    assert "linearized" in api.CONFIG_MAPPING and "no such type" not in api.CONFIG_MAPPING


def test_model_mapping_knows_the_causal_lm_of_a_configuration() -> None:
    assert api.MODEL_FOR_CAUSAL_LM_MAPPING[type(tiny_config("llama"))] is LlamaForCausalLM


def test_conversion_rules_are_copies_found_by_class_name_before_model_type() -> None:
    get, register = api.get_checkpoint_conversion_mapping, api.register_checkpoint_conversion_mapping
    rules = get("mixtral")
    assert rules and rules is not get("mixtral"), "the table no longer gives copies, so registering them shares them"
    assert get("no such type") is None, "an unknown name no longer gives None"
    register("a test's own class", rules, overwrite=True)
    assert [str(each) for each in get("a test's own class")] == [str(each) for each in rules]
    # How a model finds its rules: by the name of its class first, also where its code is one's own.
    looks = source_of(sys.modules[get.__module__].get_model_conversion_mapping)
    assert looks.index("get_checkpoint_conversion_mapping(class_name)") < looks.index(
        "get_checkpoint_conversion_mapping(model_type)"
    )
    assert "USER_REGISTERED_MAPPINGS" in looks


@pytest.mark.parametrize("method", ["from_pretrained", "save_pretrained", "load_adapter"])
def test_the_methods_that_ask_for_conversion_rules_are_overridden(method: str) -> None:
    assert hasattr(PreTrainedModel, method), f"PreTrainedModel has no {method} any more"
    assert "conversion_rules" in source_of(getattr(LinearizedForCausalLM, method))


def test_the_attention_function_is_looked_up_by_the_name_in_the_configuration() -> None:
    config = tiny_config("llama")
    config._attn_implementation = "sdpa"
    assert api.source_attention(config, LlamaAttention) is api.ALL_ATTENTION_FUNCTIONS["sdpa"]
    config._attn_implementation = "eager"
    assert api.source_attention(config, LlamaAttention) is modeling_llama.eager_attention_forward


def test_the_name_in_the_configuration_can_be_set_for_one_module() -> None:
    config = tiny_config("llama")
    api.set_attention(config, IMPLEMENTATION)
    assert config._attn_implementation == IMPLEMENTATION, "_attn_implementation_internal is not what is read any more"
    assert api.ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION].__module__ == "linearize.model.attention"


def test_masks_are_made_by_the_name_of_the_attention() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    assert ALL_MASK_ATTENTION_FUNCTIONS[IMPLEMENTATION] is api.sdpa_mask is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def test_attention_modules_know_their_layer_and_look_their_function_up_in_their_file() -> None:
    attention: Any = tiny_model(layers=2).model.layers[1].self_attn
    assert attention.layer_idx == 1 and attention.is_causal is True and attention.num_key_value_groups == 2
    assert api.routable(LlamaAttention) and not api.routable(nn.Linear)
    assert "position_embeddings" in inspect.signature(LlamaAttention.forward).parameters


def test_the_rotation_lies_in_the_file_of_the_attention() -> None:
    rotate = api.rotation(LlamaAttention)
    assert rotate is modeling_llama.apply_rotary_pos_emb and api.rotation(nn.Linear) is None
    q = torch.randn(1, 2, 3, 4)
    still = rotate(q, q[:, :0], torch.ones(1, 3, 4), torch.zeros(1, 3, 4))  # type: ignore[misc]
    assert torch.equal(still[0], q) and still[1].shape[1] == 0


def test_the_kind_of_rope_stands_in_the_configuration() -> None:
    assert tiny_config("llama").rope_parameters["rope_type"] == "default"
    assert tiny_config("gemma3_text").rope_parameters["full_attention"]["rope_type"] == "default"


def test_a_configuration_knows_where_it_was_opened(tmp_path: Path) -> None:
    assert api.name_of(tiny_config("llama")) is None
    tiny_model(layers=1).save_pretrained(tmp_path)
    assert api.name_of(AutoModelForCausalLM.from_pretrained(tmp_path).config) == str(tmp_path)


def test_a_cache_makes_its_own_layers() -> None:
    cache = DynamicCache()
    assert type(api.new_layer(cache)) is cache.layer_class_to_replicate and cache.layers == []


def test_cache_layers_are_of_the_known_classes() -> None:
    static: Any = StaticCache(config=tiny_config("llama"), max_cache_len=8)
    assert all(isinstance(layer, api.StaticLayer) and isinstance(layer, api.CacheLayerMixin) for layer in static.layers)
    assert {"update_conv_state", "update_recurrent_state"} <= set(dir(api.LinearAttentionCacheLayerMixin))


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("_is_stateful", "generate"),
        ("_prepare_cache_for_generation", "generate"),
        ("prepare_inputs_for_generation", "_sample"),
    ],
)
def test_generation_asks_the_model(name: str, reader: str) -> None:
    from transformers.generation import utils

    assert hasattr(PreTrainedModel, name) or hasattr(GenerationMixin, name), f"{name} is gone"
    assert name in source_of(utils), f"generation does not read {name} any more"
    assert reader in dir(GenerationMixin)


def test_continuous_batching_is_entered_by_one_method() -> None:
    assert hasattr(AutoModelForCausalLM, "from_config")
    with pytest.raises(ValueError, match="continuous batching"):
        linearize_(tiny_model(layers=1), GLA).init_continuous_batching()  # type: ignore[operator]
    assert callable(getattr(LlamaForCausalLM, "init_continuous_batching", None)), "it has another name now"


def test_saved_code_is_registered_by_auto_class() -> None:
    config = tiny_config("llama")
    assert config._auto_class is None and LlamaForCausalLM._auto_class is None
    saves = source_of(PreTrainedModel.save_pretrained) + source_of(type(config).save_pretrained)
    assert "custom_object_save" in saves, "code beside a folder is written in another way"


def test_layers_of_dynamic_caches_hold_what_states_know_of() -> None:
    """What linearize/model/states.py copies and saves; a new attribute has to be looked at there."""
    known = {"keys", "values", "is_initialized", "sliding_window", "cumulative_length", "_sliding_window_tensor"}
    known |= {"record_past", "number_of_states", "conv_states", "recurrent_states", "has_previous_state"}
    known |= {"conv_kernel_size", "is_conv_states_initialized", "is_recurrent_states_initialized", "device", "dtype"}
    for kind in api.DYNAMIC_LAYERS:
        taken = {"sliding_window": 8} if "sliding_window" in inspect.signature(kind.__init__).parameters else {}
        assert vars(kind(**taken)).keys() <= known, kind
