"""A model type that nobody has probed is tried before it is converted, and nothing is taken in silence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.conversion import recipe_of, run
from helpers.tiny import VOCABULARY, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from linearize.checkpoint.sources import locate
from linearize.conversion import probe
from linearize.conversion.plan import plan
from linearize.errors import InputError
from linearize.model import architectures


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig  # type: ignore[assignment]


class LeakyConfig(LlamaConfig):
    model_type = "leaky_llama"


class LeakyForCausalLM(LlamaForCausalLM):
    """Every token sees all others."""

    config_class = LeakyConfig  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output


class PickyConfig(LlamaConfig):
    model_type = "picky_llama"


class PickyForCausalLM(LlamaForCausalLM):
    """Cannot be made small."""

    config_class = PickyConfig  # type: ignore[assignment]

    def __init__(self, config: PickyConfig):
        if config.hidden_size != 48:
            raise ValueError("there is one size of this model")
        super().__init__(config)


PAIRS = [(OwnConfig, OwnForCausalLM), (LeakyConfig, LeakyForCausalLM), (PickyConfig, PickyForCausalLM)]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    for config, model in PAIRS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    probe._attempt_once.cache_clear()
    yield
    probe._attempt_once.cache_clear()


def source_of(kind: type[LlamaConfig], folder: Path) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64, "head_dim": 16, "vocab_size": VOCABULARY}
    config = kind(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_one_that_passes_is_tried_once_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tried = source_of(OwnConfig, tmp_path / "source"), []
    attempt = probe.attempt
    monkeypatch.setattr(probe, "attempt", lambda make: tried.append(make().model_type) or attempt(make))
    plan(locate(str(source)), recipe_of(source))
    out = run(source, tmp_path / "out", mixer={"name": "softmax"}, layers="all")
    assert tried == ["own_llama"]
    x = torch.arange(40).view(2, 20)
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, out)]
        assert torch.equal(models[0](x).logits, models[1](x).logits)


def test_one_that_fails_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = source_of(LeakyConfig, tmp_path / "source")
    with pytest.raises(InputError, match="'leaky_llama': does not pass the probe .causal: "):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_one_that_cannot_be_tried_is_converted_with_a_warning(tmp_path: Path) -> None:
    source = source_of(PickyConfig, tmp_path / "source")
    with pytest.warns(UserWarning, match="'picky_llama': nobody has shown .* there is one size of this model.*--probe"):
        out = run(source, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).config.linearize["source"]["model_type"] == "picky_llama"


def test_one_that_adapters_cannot_reach_is_converted_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(architectures.ROLES, "q", ("a_name_of_its_own",))
    with pytest.warns(UserWarning, match="'own_llama': converts exactly, but cannot get adapters .*q: none"):
        run(source_of(OwnConfig, tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["falcon_h1", "deepseek_v2"])
def test_what_the_list_could_not_try_is_no_proof(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "attempt", lambda make: pytest.fail("it is known that this cannot be tried"))
    with pytest.warns(UserWarning, match=f"'{kind}': nobody has shown that it converts exactly"):
        probe.check_supported(AutoConfig.for_model(kind))
