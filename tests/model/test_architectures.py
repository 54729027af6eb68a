"""Every architecture: the probe's promises, tied and in shards and in bf16, adapters; and what the probe refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.conversion import run, tensors_of
from helpers.tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from linearize import cli
from linearize.checkpoint.adapters import attach
from linearize.checkpoint.describe import inspect
from linearize.conversion import probe
from linearize.errors import InputError
from linearize.model import architectures
from linearize.model.branches import branches
from linearize.model.modeling import linearize_
from linearize.recipe.schema import Peft

MOE: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
}
PARTIAL = {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_type": "default"}
# Model type -> what differs from the tiny configuration of the other tests. Some need sizes of their own.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": {},
    "ernie4_5": {},
    "exaone4": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {"rope_parameters": PARTIAL},
    "glm4": {"rope_parameters": PARTIAL},
    "gpt2": {"n_inner": 64},
    "gpt_neox": {"head_dim": None, "rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.25}, "hidden_size": 64},
    "gpt_oss": {**MOE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granite": {"attention_multiplier": 0.1},
    "helium": {"hidden_size": 64},
    "hunyuan_v1_dense": {},
    "llama": {"attention_bias": True},
    "ministral": {},
    "mistral": {"sliding_window": 24},
    "mixtral": MOE,
    "nemotron": {"rope_parameters": PARTIAL},
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {**MOE, "hidden_size": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "phi": {"rope_parameters": PARTIAL, "hidden_size": 64, "qk_layernorm": True},
    "phi3": {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.75}},
    "qwen2": {},
    "qwen2_moe": MOE,
    "qwen3": {},
    "qwen3_moe": MOE,
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {"rope_parameters": PARTIAL, "hidden_size": 64, "qk_layernorm": True},
    "starcoder2": {},
}
FUSED = ("gpt2", "gpt_neox", "phi3")


def model_of(architecture: str, **changes: Any) -> Any:
    return tiny_model(architecture, **{**ARCHITECTURES[architecture], **changes})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_promise_holds(architecture: str) -> None:
    model = model_of(architecture)
    assert len(architectures.attention_layers(model)) == 6
    checks = probe.probe(model)
    assert not probe.failures(checks), probe.text(checks)
    controls = {check.name: check.detail for check in checks if check.name.startswith("softmax control")}
    assert len(controls) == 3
    # The same kernels on the same numbers: bit for bit.
    assert {detail.split()[0] for detail in controls.values()} == {"0.0e+00"}, controls
    assert architecture in architectures.record()["passes"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_sharded_bf16_folders_convert_and_save(architecture: str, tmp_path: Path) -> None:
    source = model_of(architecture, tie_word_embeddings=True, dtype="bfloat16").bfloat16()
    source.save_pretrained(tmp_path / "source", max_shard_size="90KB")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    run(tmp_path / "source", tmp_path / "out", layers="all")
    # What transformers itself does to the source on the way through a file (tying, merging) is not ours.
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto").eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert model.dtype == torch.bfloat16
    assert model.state_dict().keys() == source.state_dict().keys()
    x = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = source(x).logits
        assert torch.equal(model(x).logits, expected)
        linearize_(model, {"name": "gla", "window": 8, "sinks": 2})
        model.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
        assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_sit_on_every_linearized_layer_and_learn(architecture: str) -> None:
    model = linearize_(model_of(architecture), {"name": "gla", "window": 8, "sinks": 2}, [1, 4])
    wrapped = attach(model, Peft(r=2, alpha=4, roles=("q", "k", "v", "o")))
    x = torch.randint(3, 384, (1, 30))
    wrapped(x, labels=x, use_cache=False).loss.backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if "lora_B" in name}
    for index, path in architectures.attention_layers(model).items():
        own = [name for name in gradients if f".{path}." in name]
        # One for each of q, k, v, o, or one for the three first where they are fused.
        assert len(own) == (0 if index not in (1, 4) else 2 if architecture in FUSED else 4), own
    assert all(g is not None and float(g.abs().max()) > 0 for g in gradients.values())
    with wrapped.disable_adapter(), branches(wrapped, "source"), torch.no_grad():
        assert torch.equal(wrapped(x).logits, model_of(architecture)(x).logits)


@pytest.mark.parametrize("architecture", ["nemotron", "stablelm"])
def test_packed_documents_and_checkpointing_pass_a_layer_that_drops_arguments(architecture: str) -> None:
    model = linearize_(model_of(architecture), {"name": "gla", "window": 8, "sinks": 2})
    x, lengths = torch.randint(3, 384, (1, 40)), [25, 15]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model.train(checkpointing)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        logits = model(x, position_ids=positions, use_cache=False).logits
        with torch.no_grad():
            apart = torch.cat([model(document, use_cache=False).logits for document in x.split(lengths, 1)], 1)
        # fp32 on CPU: 1e-6 of the largest logit measured.
        assert float((logits.detach() - apart).abs().max()) < 1e-5 * float(apart.abs().max())
        logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_layers_that_slide_a_window_stay_unless_asked(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"]
    model = model_of("gemma3_text", layer_types=kinds, sliding_window=16)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    mixer = {"name": "gla", "window": 8, "sinks": 2}
    for layers, expected in (("full", [2, 5]), ("all", list(range(6))), ([0, 2], [0, 2]), ({"keep": [2]}, [5])):
        out = run(tmp_path / "source", tmp_path / "out", overwrite=True, mixer=mixer, layers=layers)
        converted = AutoModelForCausalLM.from_pretrained(out)
        assert sorted(map(int, converted.config.linearize["layers"])) == expected
    assert list(linearize_(model, mixer).config.linearize["layers"]) == ["2", "5"]
    # Mistral slides in every layer: then all are meant.
    assert len(linearize_(model_of("mistral"), mixer).config.linearize["layers"]) == 6


@pytest.mark.filterwarnings("ignore:.*of its tokens lie beyond")
def test_a_vision_tower_is_kept_and_the_text_part_converts(tmp_path: Path) -> None:
    small = probe.shrink(CONFIG_MAPPING["gemma3"]())
    small.text_config.sliding_window, small.image_token_index, small.mm_tokens_per_image = 16, 7, 4
    small.vision_config.image_size, small.vision_config.patch_size = 32, 16
    source = probe.tiny(small)
    source.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    tokens = torch.randint(8, 300, (1, 30))
    image = torch.full((1, 4), small.image_token_index)
    seen = torch.cat([tokens[:, :3], image, tokens[:, 3:]], 1)
    kinds = (seen == small.image_token_index).long()
    both = {"input_ids": seen, "token_type_ids": kinds, "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        expected, text = source(**both).logits, source(tokens[:, :10]).logits
    for mixer in ({"name": "softmax"}, {"name": "gla", "window": 8, "sinks": 2}):
        out = run(tmp_path / "source", tmp_path / mixer["name"], mixer=mixer)
        assert tensors_of(out) == tensors_of(tmp_path / "source")
        model = AutoModelForCausalLM.from_pretrained(out).eval()
        assert [i for i in model.config.linearize["layers"]] == ["5"]
        with torch.no_grad():
            assert float((model(tokens[:, :10]).logits - text).abs().max()) < 1e-4 * float(text.abs().max())
            logits = model(**both).logits
        assert torch.equal(logits, expected) if mixer["name"] == "softmax" else logits.isfinite().all()
    # Vision layers have numbers too, and are not counted as layers of text.
    layers = inspect(out)["layers"]
    assert layers[0]["parameters"] == sum(p.numel() for p in model.model.language_model.layers[0].parameters())


def test_the_probe_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {check.name for check in probe.probe_named("bert", small=True) if not check.ok}
    assert failed & {"causal", "within reach"}
    monkeypatch.setattr(architectures, "ARCHS", {})
    failed = {check.name for check in probe.probe(model_of("smollm3")) if not check.ok}
    assert failed == {"keys before RoPE"}
    said = probe.text(probe.probe(model_of("nemotron")))
    assert "needs a row in linearize/model/architectures.py with drops_arguments" in said


@pytest.mark.parametrize("kind", ["bloom", "mpt", "falcon"])
def test_attention_code_of_its_own_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=f"'{kind}': its attention does not go through transformers' attention"):
        probe.probe_named(kind, small=True)
    assert kind in architectures.record()["fails"]


def test_architectures_that_fail_the_probe_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(probe.shrink(CONFIG_MAPPING["diffllama"]()))
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match="'diffllama': does not pass the probe .softmax control"):
        run(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_the_command_line_says(
    capsys: pytest.CaptureFixture[str], llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["linearize", "archs", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code  # type: ignore[return-value]

    assert call() == 0
    listed = capsys.readouterr().out
    assert "llama" in listed and "bert" not in listed.replace("modernbert", "")
    assert call("--probe", str(llama_folder), "--json") == 0
    assert {check["ok"] for check in json.loads(capsys.readouterr().out)} == {True}
    assert call("--probe", str(llama_folder), "--tiny") == 0
    capsys.readouterr()
    assert call("--probe", "bert", "--tiny") == 1
    assert "FAILS" in capsys.readouterr().out
    assert call("--probe", "bloom", "--tiny") == 2
    assert capsys.readouterr().err.startswith("Error: model type 'bloom'")
