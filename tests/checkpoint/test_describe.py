"""`inspect` tells what a folder is made of, from headers alone."""

import json
from pathlib import Path

import pytest
import torch
from helpers.conversion import run
from helpers.gguf import write_gguf
from helpers.tiny import tiny_config, tiny_model
from safetensors.torch import save_file
from transformers import BloomConfig, Gemma3Config, GPT2Config, PreTrainedConfig, ViTConfig

from linearize import formats
from linearize.checkpoint import describe
from linearize.checkpoint.describe import inspect
from linearize.errors import InputError
from linearize.reporting.plot import draw
from linearize.reporting.terminal import inspection


def test_inspect_reads_headers_only(qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(qwen3_folder, tmp_path / "out", mixer={"name": "gla", "window": 32}, layers=[3])
    monkeypatch.setattr("linearize.checkpoint.shards.pieces", lambda *arguments: pytest.fail("values were read"))
    described = inspect(out)
    model = tiny_model("qwen3", tie_word_embeddings=True)
    assert described["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert described["bytes"] == 4 * described["parameters"]
    assert described["dtypes"] == ["F32"]
    assert [layer["mixer"] for layer in described["layers"]] == ["softmax"] * 3 + ["gla"] + ["softmax"] * 2
    assert described["layers"][3]["window"] == 32
    assert described["layers"][0]["parameters"] == sum(p.numel() for p in model.model.layers[0].parameters())
    assert described["source"]["id"] == "tiny-qwen3"
    growth = described["cache"]["bytes_per_token"]
    assert growth["linearized"] * 6 == growth["source_kv"] * 5
    shown = inspection(described)
    rows = {line.split("  ")[0]: line.split() for line in shown.splitlines()}
    assert rows["0-2, 4-5"][2:5] == ["softmax", "-", "-"]
    assert rows["3"][1:4] == ["gla", "32", "4"]
    assert described["layers"][3]["bytes"] == 4 * described["layers"][3]["parameters"]
    at_32k = next(row for row in described["cache"]["contexts"] if row["context"] == 32768)
    assert sum(layer["cache_32k"] for layer in described["layers"]) == at_32k["linearized"]
    assert "from tiny-qwen3 (qwen3)" in shown
    plain = inspect(qwen3_folder)
    assert "linearize" not in inspection(plain).replace(plain["path"], "")
    assert plain["source"] is None
    assert plain["parameters"] == described["parameters"]
    assert {row["linearized"] - row["source_kv"] for row in plain["cache"]["contexts"]} == {0}
    assert json.loads(json.dumps(described)) == described


def test_inspect_adapter_and_gguf(llama_folder: Path, tmp_path: Path) -> None:
    out = run(llama_folder, tmp_path / "out")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(out)}))
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        inspect(adapter)
    save_file({"a": torch.zeros(8, 48)}, adapter / "adapter_model.safetensors")
    described = inspect(adapter)
    assert described["adapter"]["parameters"] == 8 * 48
    assert described["model_type"] == "linearized"
    assert "LORA, r 8, 384 parameters" in inspection(described)
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    described = inspect(source)
    assert described["bytes"] == source.stat().st_size
    assert formats.format_bytes(described["bytes"]) in inspection(described)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (GPT2Config(n_layer=3, n_embd=24, n_positions=99, vocab_size=77), (3, 77, 24, 99)),
        (
            Gemma3Config(
                text_config={"num_hidden_layers": 5, "vocab_size": 66, "hidden_size": 16, "max_position_embeddings": 44}
            ),
            (5, 66, 16, 44),
        ),
        (BloomConfig(n_layer=2, hidden_size=16, vocab_size=55), (2, 55, 16, None)),
    ],
    ids=["gpt2", "gemma3", "bloom"],
)
def test_sizes_have_one_name_whatever_the_architecture_calls_them(config: PreTrainedConfig, sizes: tuple) -> None:
    assert describe.text_sizes(config) == sizes


def test_sizes_that_an_architecture_does_not_state_are_named() -> None:
    with pytest.raises(InputError, match="vit: its configuration states no vocab_size"):
        describe.text_sizes(ViTConfig())


def test_layers_that_slide_keep_a_window_of_keys() -> None:
    config = tiny_config("gemma3_text", sliding_window=128)
    sizes = describe.cache_sizes(config)
    kinds = config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    per_token = 2 * 2 * 16 * 2  # keys and values of 2 heads of 16 in 2 bytes
    full = kinds.count("full_attention")
    assert sizes["bytes_per_token"]["source_kv"] == full * per_token
    assert sizes["contexts"][0]["source_kv"] == per_token * (full * 1024 + (6 - full) * 128)


def test_the_picture(qwen3_folder: Path, tmp_path: Path) -> None:
    described = inspect(run(qwen3_folder, tmp_path / "out", mixer={"name": "gla", "window": 32}, layers=[3]))
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        assert draw(described, tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(InputError, match="c.txt: unknown kind of picture"):
        draw(described, tmp_path / "c.txt")
    with pytest.raises(InputError, match="cannot be written .No such file"):
        draw(described, tmp_path / "no" / "a.png")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "a.png", "b.svg"}
