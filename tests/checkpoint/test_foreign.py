"""What a stranger's folder says is compared with what it holds before anything is made of it: sizes, headers, links."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.conversion import recipe_of, run
from helpers.gguf import write_gguf
from helpers.tiny import save_converted, save_source, tiny_model
from safetensors.torch import load_file, save_file

from linearize.checkpoint import config, describe, gguf_header
from linearize.checkpoint.adapters import put_on
from linearize.checkpoint.open import load, open_model, open_tokenizer
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.conversion.export import export
from linearize.conversion.plan import plan
from linearize.errors import InputError
from linearize.hub.push import push

REGRESSION = Path(__file__).parents[1] / "regression"
WEIGHTS = "model.safetensors"
BILLION = 10**9


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("plain") / "plain", layers=2)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_converted(tmp_path_factory.mktemp("converted") / "converted")
    (folder / "recipe.yaml").write_text("description: a test\n")
    return folder


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **changes}))
    return target


def refused(call: Callable[[], object], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


# -- sizes -------------------------------------------------------------------------------------------------------------

LINEAR = {"name": "gla"}
SIZES = [
    ({"num_hidden_layers": BILLION, "layer_types": None}, "num_hidden_layers is 1,000,000,000, .*21 tensors"),
    ({"vision_config": {"depth": BILLION}}, "depth is 1,000,000,000"),
    ({"num_local_experts": BILLION}, "num_local_experts is 1,000,000,000, .*none longer than 384"),
    ({"num_attention_heads": BILLION}, "num_attention_heads is 1,000,000,000"),
    ({"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_hidden_layers": 1e308}, "num_hidden_layers is "),
    ({"num_hidden_layers": 40, "layer_types": None}, "missing: model.layers.2"),
    ({"vocab_size": 400}, r"embed_tokens.weight is \[384, 48\], the configuration makes it \[400, 48\]"),
    ({"num_attention_heads": 0}, "this configuration .ZeroDivisionError"),
    ({"intermediate_size": 64.0}, "cannot read this configuration .*intermediate_size"),
]


@pytest.mark.parametrize(("changes", "match"), SIZES)
def test_sizes_are_compared_with_the_weights_by_every_verb(
    changes: dict[str, Any], match: str, plain: Path, converted: Path, tmp_path: Path
) -> None:
    source, folder = copied(plain, tmp_path / "a", **changes), copied(converted, tmp_path / "b", **changes)
    refused(lambda: plan(locate(str(source)), recipe_of(source)), match)
    refused(lambda: run(source, tmp_path / "out"), match)
    for each in (source, folder):
        refused(lambda each=each: describe.inspect(each), match)
        refused(lambda each=each: load(each), match)
    refused(lambda: push(folder, "me/x", dry_run=True), match)
    refused(lambda: export(folder, "source", tmp_path / "out"), match)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", BILLION), ("hidden_size", 1 << 40)])
def test_without_weights_there_are_plain_limits(key: str, value: int, plain: Path, tmp_path: Path) -> None:
    folder = copied(plain, tmp_path / "folder", **{key: value, "layer_types": None})
    (folder / WEIGHTS).unlink()
    refused(lambda: config.read(folder), f"{key} is .*possible are at most")


@pytest.mark.parametrize(
    "block",
    [
        {"layers": {"99": LINEAR}},
        {"layers": {"0); import os; (": LINEAR}},
        {"layers": {"0": {"name": '"""; import os'}}},
        {"layers": {"0": {"name": "gla", "window": "8; import os"}}},
        {"layers": {"0": {"name": ["gla"]}}},
        {"layers": ["x"]},
        {"source": {"model_type": "llama; import os", "id": "x"}},
        {"source": {"model_type": "llama"}},
        {"source": {"model_type": "llama", "id": ["x"]}},
        {"source": {"model_type": "llama", "id": "x", "path": 5}},
    ],
)
def test_a_block_is_built_from_checked_values_only(block: dict[str, Any], converted: Path, tmp_path: Path) -> None:
    """What a configuration says never becomes code: it is refused before a card or a file is made of it."""
    values = json.loads((converted / "config.json").read_text())["linearize"]
    folder = copied(converted, tmp_path / "folder", linearize={**values, **block})
    for with_code in (False, True):
        refused(lambda with_code=with_code: push(folder, "me/x", dry_run=True, with_code=with_code), ".")
    refused(lambda: describe.inspect(folder), ".")
    refused(lambda: load(folder), ".")


# -- weights -----------------------------------------------------------------------------------------------------------


def edit(change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return edited


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (edit(lambda tensors: tensors.pop("model.norm.weight")), "missing: model.norm.weight"),
        (edit(lambda tensors: tensors.update(stray=torch.zeros(2))), "unexpected: stray in model.safetensors"),
        (edit(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)})), r"norm.weight is \[47\]"),
        (write(WEIGHTS, b"x"), "is not a whole safetensors file"),
        (
            write("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}'),
            "is not the name of a file",
        ),
        (
            write("model.safetensors.index.json", b'{"weight_map": {"a": "/x.safetensors"}}'),
            "is not the name of a file",
        ),
        (write("tokenizer.json", b'{"version": "1.0", '), "tokenizer"),
        (write("tokenizer.json", b"[]"), "tokenizer"),
        (write("tokenizer_config.json", b"[]"), "tokenizer"),
        (write("generation_config.json", b"{"), "generation_config.json"),
    ],
)
def test_what_loading_refuses_push_and_export_refuse_too(
    change: Callable[[Path], object], match: str, converted: Path, tmp_path: Path
) -> None:
    folder = copied(converted, tmp_path / "folder")
    if "../x" in match or "name of a file" in match:
        (folder / WEIGHTS).rename(folder / "x.safetensors")
    change(folder)
    refused(lambda: load(folder), match)
    refused(lambda: push(folder, "me/x", dry_run=True), match)
    refused(lambda: export(folder, "source", tmp_path / "out"), match)
    assert not (tmp_path / "out").exists()


# -- GGUF --------------------------------------------------------------------------------------------------------------


def setting(key: bytes, value: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        start = content.index(key) + len(key) + 4
        return content[:start] + struct.pack("<I", value) + content[start + 4 :]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: content[:69], "is not a whole GGUF file"),
        (lambda content: b"", "is not a whole GGUF file"),
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: content[:-1], "cut short"),
        (lambda content: b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "0 tensors"),
        (lambda content: b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + content[24:], "settings in"),
        (setting(b"llama.block_count", BILLION), "block_count is 1000000000"),
        (setting(b"llama.block_count", 3), "block_count is 3, and its tensors have 2"),
        (setting(b"llama.embedding_length", 4096), "embedding_length is 4096, and its tensors have 48"),
        (lambda content: content.replace(b"llama.block_count", b"llama.block_cuont"), "lacks block_count"),
        (lambda content: content.replace(b"llama", b"zlama"), "zlama"),
    ],
)
def test_a_damaged_gguf_file_never_becomes_a_default_model(
    change: Callable[[bytes], bytes], match: str, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "Tiny.GGUF", tiny_model(layers=2))
    assert gguf_header.read(file).shapes["token_embd.weight"] == (48, 384)
    assert describe.inspect(file)["model_type"] == "llama"
    file.write_bytes(change(file.read_bytes()))
    for call in (lambda: describe.inspect(file), lambda: plan(locate(str(file)), recipe_of(file))):
        refused(call, match)
    refused(lambda: convert(locate(str(file)), recipe_of(file), tmp_path / "out"), match)
    assert not (tmp_path / "out").exists()


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["LICENSE", "config.json", "tokenizer.json", "chat_template.jinja", WEIGHTS, "additional_chat_templates"]
)
def test_a_link_that_leaves_the_folder_is_not_followed(name: str, plain: Path, converted: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(converted, outside)
    (outside / "LICENSE").write_text("secret")
    (outside / "additional_chat_templates").mkdir()
    (outside / "additional_chat_templates" / "x.jinja").write_text("secret")
    source, folder = copied(plain, tmp_path / "source"), copied(converted, tmp_path / "folder")
    for each in (source, folder):
        (each / name).unlink(missing_ok=True)
        (each / name).symlink_to(Path("..", "outside", name) if each == source else outside / name)
    match = f"{name}: is a link that leaves the folder"
    refused(lambda: run(source, tmp_path / "out"), match)
    refused(lambda: export(folder, "source", tmp_path / "out"), match)
    refused(lambda: push(folder, "me/x", dry_run=True), match)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket"])
def test_what_is_no_regular_file_is_never_opened(
    name: str, kind: str, plain: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, folder in enumerate([copied(plain, tmp_path / "source"), copied(converted, tmp_path / "folder")]):
        (folder / name).unlink(missing_ok=True)
        monkeypatch.chdir(folder)  # a socket's name has a hundred letters at most
        if kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(name)
        else:
            os.mkfifo(name if kind == "pipe" else "pipe")
            if kind != "pipe":
                (folder / name).symlink_to("pipe")
        last = load if number else partial(run, out=tmp_path / "out")
        for call in (open_tokenizer, describe.inspect, last):
            refused(partial(call, folder), "is not a regular file")
    assert not (tmp_path / "out").exists()


def test_links_inside_a_folder_and_to_own_blobs_in_a_cache_of_the_hub_are_followed(plain: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--acme--tiny-x"
    snapshot, local = repo / "snapshots" / ("a" * 40), tmp_path / "local"
    for folder in (repo / "blobs", snapshot, local):
        folder.mkdir(parents=True)
    for path in plain.iterdir():
        shutil.copy(path, repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
        (local / path.name).symlink_to(repo / "blobs" / path.name)
    (snapshot / "LICENSE.txt").symlink_to("tokenizer_config.json")
    refused(lambda: run(local, tmp_path / "a"), "is a link that leaves the folder")
    other = repo.with_name("models--acme--other") / "snapshots" / ("b" * 40)
    shutil.copytree(snapshot, other, symlinks=True)
    for path in other.iterdir():  # the blobs of another model, which may be private
        path.unlink()
        path.symlink_to(repo / "blobs" / path.name)
    refused(lambda: run(other, tmp_path / "a"), "is a link that leaves the folder")
    out = run(snapshot, tmp_path / "b", mixer={"name": "gla", "window": 8, "sinks": 2})
    assert json.loads((out / "config.json").read_text())["linearize"]["source"]["id"] == "acme/tiny-x"
    assert "base_model: acme/tiny-x" in push(out, "me/x", dry_run=True)
    (tmp_path / "link").symlink_to(plain)
    assert run(tmp_path / "link", tmp_path / "c").is_dir()


# -- adapters ----------------------------------------------------------------------------------------------------------

ADAPTERS = "adapter_model.safetensors"


def first(values: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    values[min(values)] = change(values[min(values)]).contiguous()


def settings(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def pickled(content: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / ADAPTERS).unlink()
        torch.save(content, folder / "adapter_model.bin")

    return change


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (edit(lambda x: first(x, lambda value: value * float("nan")), ADAPTERS), "not finite, in base_model"),
        (edit(lambda x: first(x, lambda value: value + float("inf")), ADAPTERS), "not finite, in base_model"),
        (edit(lambda x: first(x, lambda value: value[:1]), ADAPTERS), "cannot be put on the model .*size mismatch"),
        (write(ADAPTERS, b"12345678{}"), "is not a whole safetensors file"),
        (lambda folder: (folder / ADAPTERS).unlink(), "no adapter_model.safetensors"),
        (pickled({"a": Evil()}), "a pickle can run code"),
        (pickled([1]), "other things than tensors"),
        (settings(r=BILLION), "a rank of 1,000,000,000"),
        (settings(rank_pattern={"q_proj": BILLION}), "a rank of 1,000,000,000"),
        (settings(peft_type="EVIL"), "cannot be put on the model"),
        (settings(megatron_config={"a": 1}, megatron_core="antigravity"), "import 'antigravity'"),
        (write("adapter_config.json", b"["), "adapter_config.json"),
    ],
)
def test_damaged_adapters_are_one_paragraph(change: Callable[[Path], object], match: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(REGRESSION / "adapters", folder)
    change(folder)
    model = open_model(REGRESSION / "calibrated")
    refused(lambda: put_on(model, folder), match)
