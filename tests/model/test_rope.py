"""Keys before RoPE are those, or there is an error: never rotated ones in silence."""

from typing import Any

import pytest
import torch
from helpers.modeling import logits, tokens
from helpers.tiny import tiny_config, tiny_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from linearize.conversion import probe
from linearize.errors import InputError
from linearize.model import architectures
from linearize.model.attention import linearized_modules
from linearize.model.modeling import linearize_

GLA = {"name": "gla", "window": 8, "sinks": 2}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}


def rotates_inside() -> Any:
    """Moshi's attention makes its angles itself, from the positions."""
    return probe.tiny(CONFIG_MAPPING["moshi"]())


def test_a_rotation_inside_the_attention_is_an_error_where_keys_before_rope_are_needed() -> None:
    model, x = rotates_inside(), torch.randint(3, 200, (1, 30))
    expected = logits(model, x[:, :10])
    linearize_(model, {**GLA, "name": "window"})
    # What needs no such keys works.
    assert torch.allclose(logits(model, x[:, :10]), expected, atol=1e-4)
    linearize_(model, GLA)
    with pytest.raises(InputError, match="MoshiAttention: rotates queries and keys .RoPE. by angles of its own"):
        logits(model, x)


def test_the_probe_notices_it(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {check.name for check in probe.probe(rotates_inside()) if not check.ok}
    assert "keys before RoPE" in failed
    assert architectures.record()["fails"]["moshi"].startswith("memory, within reach: InputError: MoshiAttention")
    # Also where nobody has seen in the code that it rotates: the same token has another key at each position.
    rope = architectures.Rope(applied=True, inside=False, half_angles=False, scaled=False)
    monkeypatch.setattr(architectures, "rope_of", lambda *_: rope)
    failed = {check.name: check.detail for check in probe.probe(rotates_inside()) if not check.ok}
    assert "of the largest logit" in failed["keys before RoPE"]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "jamba", pytest.param("nemotron_h", marks=pytest.mark.slow)])
def test_a_model_that_does_not_rotate_in_its_attention_has_its_keys(kind: str) -> None:
    model = probe.tiny(CONFIG_MAPPING[kind]())
    checks = {check.name: check for check in probe.probe(model)}
    assert checks["keys before RoPE"].ok, checks["keys before RoPE"].detail
    assert not any(module.rope.inside for module in linearized_modules(model))


def test_angles_given_by_position_are_seen() -> None:
    """A decoder layer may call its attention with arguments by position."""
    model, x = linearize_(tiny_model("llama", layers=2), GLA), tokens(1, 30)
    expected = logits(model, x)

    def by_position(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        assert not args
        return tuple(kwargs.pop(name) for name in ("hidden_states", "position_embeddings", "attention_mask")), kwargs

    for module in linearized_modules(model):
        module.register_forward_pre_hook(by_position, with_kwargs=True)
    assert torch.equal(logits(model, x), expected)
    assert torch.equal(model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=2)[:, :30], x)


@pytest.mark.parametrize(
    ("values", "scaled"),
    [
        (PLAIN, False),
        (YARN, True),
        ({"rope_type": "llama3", "factor": 8.0, "note": "no yarn"}, False),
        ({"full_attention": YARN, "sliding_attention": PLAIN}, True),
        ({"full_attention": PLAIN, "sliding_attention": PLAIN}, False),
        ({"type": "longrope", "factor": 2.0}, True),
        ({"rope_type": "a kind of tomorrow"}, True),
        (None, False),
    ],
)
def test_the_kind_of_rope_is_read_not_searched_for(values: dict | None, scaled: bool) -> None:
    config = tiny_config("llama")
    config.rope_parameters = values
    assert architectures._scales_angles(config) is scaled
    whole = CONFIG_MAPPING["llava"]()
    whole.text_config = config
    assert architectures._scales_angles(whole) is scaled


def test_scaled_angles_are_undone_also_in_a_composite_model_with_one_kind_per_type_of_layer() -> None:
    small = probe.shrink(CONFIG_MAPPING["gemma3"]())
    small.text_config.rope_parameters = {"full_attention": YARN, "sliding_attention": PLAIN}
    checks = {check.name: check for check in probe.probe(probe.tiny(small))}
    assert checks["keys before RoPE"].ok, checks["keys before RoPE"].detail


def test_a_text_model_inside_another_has_its_row() -> None:
    whole = CONFIG_MAPPING["llava"](text_config=CONFIG_MAPPING["smollm3"]())
    assert architectures.arch_of(whole) is architectures.ARCHS["smollm3"]
    assert architectures.arch_of(CONFIG_MAPPING["llama"]()) == architectures.Arch(architectures.Arch.rotates)
