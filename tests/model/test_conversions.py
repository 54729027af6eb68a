"""Linearized models of several architectures in one process: each is read and written by the rules of its own source.

Mixtral and Qwen3-MoE both have fused experts in memory and single ones on disk, under different names.
"""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.modeling import logits, tokens
from helpers.tiny import tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import linearize
from linearize.checkpoint.adapters import attach
from linearize.errors import InputError
from linearize.model.modeling import LinearizedForCausalLM, linearize_
from linearize.model.transformers_api import conversion_rules
from linearize.recipe.schema import Peft

MIXER = {"name": "gla", "window": 8, "sinks": 2}
KINDS = ("mixtral", "qwen3_moe")
MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def source(kind: str) -> Any:
    return tiny_model(kind, layers=2, **MOE)


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name for name in file.keys() if ".mixer." not in name}  # noqa: SIM118


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Linearized folders, each beside that of its source."""
    root = tmp_path_factory.mktemp("folders")
    for kind in KINDS:
        source(kind).save_pretrained(root / kind / "source")
        linearize_(source(kind), MIXER).save_pretrained(root / kind / "linearized")
        assert names(root / kind / "linearized") == names(root / kind / "source")
    return {kind: root / kind / "linearized" for kind in KINDS}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return {kind: logits(linearize_(source(kind), MIXER), text()) for kind in KINDS}


def text() -> torch.Tensor:
    return torch.arange(3, 43).view(1, 40)


def test_opened_and_saved_by_turns(folders: dict[str, Path], expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    models = {}
    for round_ in range(2):
        for kind in KINDS:
            models[kind] = AutoModelForCausalLM.from_pretrained(folders[kind])
            made = linearize_(source(kind), MIXER)  # has never been read from a folder
            for other in reversed(KINDS):
                AutoModelForCausalLM.from_pretrained(folders[other])
            for model in (models[kind], made):
                assert torch.equal(logits(model, text()), expected[kind])
                model.save_pretrained(tmp_path / f"{kind}{round_}")
                assert names(tmp_path / f"{kind}{round_}") == names(folders[kind].with_name("source"))


def test_opened_by_two_threads_at_once(
    folders: dict[str, Path], expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread waits where a model is made, after its rules were chosen, for the other one to get there too."""
    both, initialize = threading.Barrier(2), LinearizedForCausalLM.__init__

    def wait(self: Any, *args: Any, **kwargs: Any) -> None:
        with suppress(threading.BrokenBarrierError):  # the other one waits until this one is done
            both.wait(1.5)
        initialize(self, *args, **kwargs)

    monkeypatch.setattr(LinearizedForCausalLM, "__init__", wait)
    models: dict[str, Any] = {}

    def open_(kind: str) -> None:
        try:
            models[kind] = AutoModelForCausalLM.from_pretrained(folders[kind])
        except Exception as error:
            models[kind] = error

    threads = [threading.Thread(target=open_, args=(kind,)) for kind in KINDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kind in KINDS:
        assert not isinstance(models[kind], Exception), models[kind]
        assert torch.equal(logits(models[kind], text()), expected[kind])


def test_the_table_of_the_process_is_left_as_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    rules = {kind: repr(get_checkpoint_conversion_mapping(kind)) for kind in KINDS}
    model: Any = AutoModelForCausalLM.from_pretrained(folders["mixtral"])
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(OSError):
        type(model).from_pretrained(tmp_path / "nowhere")
    assert get_checkpoint_conversion_mapping("LinearizedForCausalLM") == []
    with conversion_rules("LinearizedForCausalLM", type(model).source_class):
        with conversion_rules("LinearizedForCausalLM", type(tiny_model(layers=1))):
            assert get_checkpoint_conversion_mapping("LinearizedForCausalLM") == []
        assert get_checkpoint_conversion_mapping("LinearizedForCausalLM") != []
    assert {kind: repr(get_checkpoint_conversion_mapping(kind)) for kind in KINDS} == rules


def test_a_class_of_ones_own_has_its_source(folders: dict[str, Path], tmp_path: Path) -> None:
    cls: Any = type(AutoModelForCausalLM.from_pretrained(folders["mixtral"]))
    assert cls.source_class.__name__ == "MixtralForCausalLM"
    own: Any = type("OwnModel", (cls,), {})
    own.from_pretrained(folders["mixtral"]).save_pretrained(tmp_path)
    assert names(tmp_path) == names(folders["mixtral"])


def test_the_exported_class_opens_every_folder(folders: dict[str, Path], expected: dict[str, torch.Tensor]) -> None:
    for kind in KINDS:
        model, info = linearize.LinearizedForCausalLM.from_pretrained(folders[kind], output_loading_info=True)
        assert not info["missing_keys"] and torch.equal(logits(model, text()), expected[kind])


def test_an_adapter_is_read_by_the_rules_of_the_source(folders: dict[str, Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folders["qwen3_moe"])
    model: Any = AutoModelForCausalLM.from_pretrained(folders["mixtral"])
    wrapped = attach(model, Peft(r=2, alpha=4, roles=("q", "v")))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    x = tokens(1, 20)
    wanted = logits(wrapped, x)
    wrapped.save_pretrained(tmp_path / "adapter")
    again: Any = AutoModelForCausalLM.from_pretrained(folders["mixtral"])
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, x), wanted)


def test_tensors_of_another_architecture_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders["mixtral"] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folders["qwen3_moe"] / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="the tensors do not fit its config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
