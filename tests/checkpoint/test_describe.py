"""`inspect` tells what a folder is made of, from headers alone."""

import json
from pathlib import Path

import pytest
import torch
from helpers.conversion import run
from helpers.gguf import write_gguf
from helpers.tiny import tiny_config, tiny_model
from safetensors.torch import save_file

from linearize import formats
from linearize.checkpoint import describe
from linearize.checkpoint.describe import inspect
from linearize.errors import InputError
from linearize.reporting.plot import draw


def test_inspect_reads_headers_only(qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(qwen3_folder, tmp_path / "out", mixer={"name": "gla", "window": 32}, layers=[3])
    monkeypatch.setattr(torch, "frombuffer", lambda *arguments: pytest.fail("values were read"))
    found = inspect(out)
    model = tiny_model("qwen3", tie_word_embeddings=True)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["bytes"] == 4 * found["parameters"]
    assert found["dtypes"] == ["F32"]
    assert [layer["mixer"] for layer in found["layers"]] == ["softmax"] * 3 + ["gla"] + ["softmax"] * 2
    assert found["layers"][3]["window"] == 32
    assert found["layers"][0]["parameters"] == sum(p.numel() for p in model.model.layers[0].parameters())
    assert found["source"]["id"] == "tiny-qwen3"
    growth = found["cache"]["bytes_per_token"]
    assert growth["linearized"] * 6 == growth["source_kv"] * 5
    shown = describe.text(found)
    rows = {line.split("  ")[0]: line.split() for line in shown.splitlines()}
    assert rows["0-2, 4-5"][2:5] == ["softmax", "-", "-"]
    assert rows["3"][1:4] == ["gla", "32", "4"]
    assert found["layers"][3]["bytes"] == 4 * found["layers"][3]["parameters"]
    at_32k = next(row for row in found["cache"]["contexts"] if row["context"] == 32768)
    assert sum(layer["cache_32k"] for layer in found["layers"]) == at_32k["linearized"]
    assert "from tiny-qwen3 (qwen3)" in shown
    plain = inspect(qwen3_folder)
    assert "linearize" not in describe.text(plain).replace(plain["path"], "")
    assert plain["source"] is None
    assert plain["parameters"] == found["parameters"]
    assert {row["linearized"] - row["source_kv"] for row in plain["cache"]["contexts"]} == {0}
    assert json.loads(json.dumps(found)) == found


def test_inspect_adapter_and_gguf(llama_folder: Path, tmp_path: Path) -> None:
    out = run(llama_folder, tmp_path / "out")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(out)}))
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        inspect(adapter)
    save_file({"a": torch.zeros(8, 48)}, adapter / "adapter_model.safetensors")
    found = inspect(adapter)
    assert found["adapter"]["parameters"] == 8 * 48
    assert found["model_type"] == "linearized"
    assert "LORA, r 8, 384 parameters" in describe.text(found)
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    found = inspect(source)
    assert found["bytes"] == source.stat().st_size
    assert formats.format_bytes(found["bytes"]) in describe.text(found)


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
    found = inspect(run(qwen3_folder, tmp_path / "out", mixer={"name": "gla", "window": 32}, layers=[3]))
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        assert draw(found, tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(InputError, match="c.txt: unknown kind of picture"):
        draw(found, tmp_path / "c.txt")
    with pytest.raises(InputError, match="cannot be written .No such file"):
        draw(found, tmp_path / "no" / "a.png")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "a.png", "b.svg"}
