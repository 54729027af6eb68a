"""A file that was replaced under its name is noticed, whatever kind of file it is, and what decides nothing is not."""

import json
from pathlib import Path

import pytest
import torch
from helpers.gguf import write_gguf
from helpers.tiny import save_source, tiny_model
from safetensors.torch import load_file, save_file

from linearize.checkpoint.identity import HASHES, check_source, identity
from linearize.checkpoint.manifest import MANIFEST, facts_of
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.errors import InputError
from linearize.recipe.schema import Convert, Recipe, Source


def changed(folder: Path, name: str, content: bytes = b"\n") -> list[str]:
    before = identity(folder)
    with (folder / name).open("ab") as file:
        file.write(content)
    now = identity(folder)
    return [kind for kind in before if before[kind] != now[kind]]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("model.safetensors", ["weights"]),
        ("tokenizer.json", ["tokenizer"]),
        ("merges.txt", ["tokenizer"]),
        ("spiece.model", ["tokenizer"]),
        ("special_tokens_map.json", ["tokenizer"]),
        ("chat_template.jinja", []),
        ("README.md", []),
        ("training_args.bin", []),
    ],
)
def test_kinds_of_files(tmp_path: Path, name: str, kinds: list[str]) -> None:
    assert changed(save_source(tmp_path / "source", layers=2), name) == kinds


@pytest.mark.parametrize("name", ["pytorch_model.bin", "Part-1.BIN", "tiny.GGUF", "odd.weights"])
def test_weights_under_other_names(tmp_path: Path, name: str) -> None:
    folder = save_source(tmp_path / "source", layers=2)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / name)
    if name == "tiny.GGUF":
        (folder / "config.json").unlink()
    elif name != "pytorch_model.bin":
        single = "model.safetensors" if name == "odd.weights" else "pytorch_model.bin"
        (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    assert changed(folder, name) == ["other_weights"]


def test_the_hub_and_single_files(tmp_path: Path) -> None:
    assert set(identity("org/name").values()) == {None}
    (tmp_path / "a.gguf").write_bytes(b"a")
    assert [kind for kind, value in identity(tmp_path / "a.gguf").items() if value] == ["weights"]


@pytest.mark.parametrize("kind", ["safetensors", "other dtype", "gguf"])
def test_a_source_with_other_weights_than_at_conversion(tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        (tmp_path / "source").mkdir()
        path = tmp_path / "source" / "tiny.gguf"
        write_gguf(path, tiny_model(layers=2))
    else:
        path = save_source(tmp_path / "source", layers=2)
    dtype = "bfloat16" if kind == "other dtype" else "auto"
    wanted = Recipe(source=Source(id=str(path)), convert=Convert(mixer={"name": "gla", "window": 8}, dtype=dtype))
    out, located = convert(locate(str(path)), wanted, tmp_path / "out"), locate(str(path))
    assert [*facts_of(out)[HASHES]] == [located.gguf or "model.safetensors"]
    check_source(located.path, [out])
    (tmp_path / "source" / "generation_config.json").write_text("{}")
    check_source(located.path, [out])
    if kind == "gguf":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        file = path / "model.safetensors"
        save_file({name: torch.zeros_like(each) for name, each in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="was converted from other weights.*--source, or convert"):
        check_source(located.path, [out])
    facts = facts_of(out)
    del facts[HASHES]  # earlier versions did not say
    (out / MANIFEST).write_text(json.dumps(facts))
    check_source(located.path, [out])
