"""Conversion keeps every byte of the source, opens with the Auto classes, refuses what is damaged, and survives a
kill."""

import json
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.conversion import recipe_of, run, tensors_of
from helpers.gguf import write_gguf
from helpers.tiny import CHAT_TEMPLATE, save_source, tiny_model, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize import cli
from linearize.checkpoint import copying, manifest, shards
from linearize.checkpoint.describe import inspect
from linearize.checkpoint.manifest import verify
from linearize.checkpoint.shards import INDEX, read_folder, sha256_without_nan
from linearize.checkpoint.sources import load_source, locate
from linearize.conversion.convert import convert
from linearize.conversion.plan import Plan, plan
from linearize.errors import InputError
from linearize.recipe import load as recipes

TOKENS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_control_is_the_source(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(f"{kind}_folder")
    out = run(source, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    reference, tokenizer = load_source(locate(str(source)))
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    assert model.config.model_type == "linearized"
    assert model.config.linearize["source"]["id"] == source.name
    assert model.config.linearize["source"]["model_type"] == kind
    assert AutoTokenizer.from_pretrained(out)("a river").input_ids == tokenizer("a river").input_ids
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    assert recipes.load(out / "recipe.yaml") == replace(recipe_of(source), name=recipes.load(out / "recipe.yaml").name)
    assert verify(out) == []


def test_sharded_source_keeps_bytes_and_small_files(sharded_folder: Path, tmp_path: Path) -> None:
    out = run(sharded_folder, tmp_path / "out")
    assert tensors_of(out) == tensors_of(sharded_folder)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.temperature == 0.7
    assert model.generation_config.eos_token_id == [1, 3]
    names = {path.name for path in out.iterdir()}
    assert {"LICENSE", "tokenizer.json", "chat_template.jinja", "generation_config.json", INDEX} <= names
    assert not names & {"README.md", "pytorch_model.bin", "modeling_tiny.py", ".gitattributes", ".key"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_casts_every_tensor_exactly(
    sharded_folder: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linearize.checkpoint.shards.CHUNK", 1000)  # several pieces per tensor
    out = run(sharded_folder, tmp_path / "out", dtype=dtype)
    wanted = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == wanted
    source = {name: tensor for path in sharded_folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    found = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert source.keys() == found.keys()
    assert all(torch.equal(found[name], tensor.to(wanted)) for name, tensor in source.items())
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert verify(out) == []


def test_the_check_verb_names_a_shard_that_changed(
    sharded_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(sharded_folder, tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["linearize", "check", str(out)])
    for code, said in ((0, "out: ok"), (2, "model-00001-of.*the content has changed since it was written .sha256")):
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == code
        streams = capsys.readouterr()
        assert re.search(said, streams.out + streams.err)
        shard = sorted(out.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-1] + b"\1")


def test_same_dtype_is_copied_not_cast(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.checkpoint.shards.write_shard", lambda *arguments: pytest.fail("cast"))
    run(llama_folder, tmp_path / "out", dtype="float32")


def test_values_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for value, text in ((1e6, "a value of 1e.06 does not fit F16"), (float("nan"), "not finite")):
        source = save_source(tmp_path / "source")
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"][3] = value
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"tensor model.norm.weight: .*{text}"):
            run(source, tmp_path / "out", dtype="float16")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("chunk", [1 << 10, 1 << 20])
def test_a_nan_anywhere_is_found_and_infinity_is_not_one(
    sharded_folder: Path, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", chunk)
    file = sorted(sharded_folder.glob("*.safetensors"))[-1]
    tensors = [tensor for tensor in read_folder(sharded_folder).values() if tensor.file == file]
    content = file.read_bytes()
    for tensor in tensors:
        for position in (tensor.start, tensor.start + tensor.size // 2 & ~1, tensor.start + tensor.size - 2):
            for value, bad in ((b"\xc0\x7f", True), (b"\x80\xff", False)):
                changed = tmp_path / "changed"
                changed.write_bytes(content[:position] + value + content[position + 2 :])
                if bad:
                    with pytest.raises(InputError, match=f"changed: tensor {tensor.name}: .*not finite"):
                        copying.copy(changed, tmp_path / "copy", digest=sha256_without_nan)
                else:
                    copying.copy(changed, tmp_path / "copy", digest=sha256_without_nan)


def test_links_share_the_bytes(sharded_folder: Path, tmp_path: Path) -> None:
    out = run(sharded_folder, tmp_path / "out", link=True)
    shards = sorted(out.glob("*.safetensors"))
    assert [path.samefile(sharded_folder / path.name) for path in shards] == [True] * len(shards)
    assert {json.loads((out / manifest.MANIFEST).read_text())["files"][path.name]["sha256"] for path in shards} == {
        None
    }
    assert tensors_of(out) == tensors_of(sharded_folder)
    assert verify(out) == []


@pytest.mark.parametrize("kind", ["llama_folder", "sharded_folder"])
def test_new_weights_go_to_one_more_shard(
    kind: str, scaled_mixer: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(kind)
    out = run(source, tmp_path / "out", mixer={"name": scaled_mixer}, layers=[1, 4])
    before, after = tensors_of(source), tensors_of(out)
    new = {f"model.layers.{layer}.self_attn.mixer.scale" for layer in (1, 4)}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == new
    assert Counter(read_folder(out)[name].file for name in new) == {sorted(out.glob("*.safetensors"))[-1]: 2}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.model.layers[4].self_attn.mixer.scale.tolist() == [0.5] * 4
    assert plan(locate(str(source)), recipe_of(source, mixer={"name": scaled_mixer}, layers=[1, 4])).new_parameters == 8
    assert inspect(out)["new_parameters"] == 8
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


def test_gguf_control_is_the_source(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    out = convert(locate(str(source)), recipe_of(source, dtype="float32"), tmp_path / "out")
    model, (reference, tokenizer) = AutoModelForCausalLM.from_pretrained(out).eval(), load_source(locate(str(source)))
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    opened = AutoTokenizer.from_pretrained(out)
    assert opened("The miller: 42").input_ids == tokenizer("The miller: 42").input_ids
    assert (opened.chat_template, opened.model_max_length) == (CHAT_TEMPLATE, 1024)
    generation = json.loads((out / "generation_config.json").read_text())
    assert [generation[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [0, 1, 2]
    assert not {".source", "tiny.gguf"} & {path.name for path in out.iterdir()}
    assert not {"_model_name_or_path", "quantization_config"} & json.loads((out / "config.json").read_text()).keys()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tiny.gguf"}


def pickled(target: Path, content: Any = None) -> Path:
    """The tiny tied Qwen3 with PyTorch's .bin files instead of safetensors."""
    model = tiny_model("qwen3", tie_word_embeddings=True)
    model.config.save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    torch.save(content or model.state_dict(), target / "pytorch_model.bin")
    return target


def test_pickles_are_read_only_when_allowed(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source")
    with pytest.raises(InputError, match="has pickled weights only .*--allow-pickle"):
        run(source, tmp_path / "out")
    out = convert(locate(str(source)), recipe_of(source), tmp_path / "out", allow_pickle=True)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(model(TOKENS).logits, tiny_model("qwen3", tie_word_embeddings=True)(TOKENS).logits)


@pytest.mark.parametrize("stray", ["training_state.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"])
def test_pickles_beside_a_stray_file_are_read(stray: str, tmp_path: Path) -> None:
    source = pickled(tmp_path / "source")
    save_file({"a": torch.zeros(1)}, source / stray)
    out = convert(locate(str(source)), recipe_of(source), tmp_path / "out", allow_pickle=True)
    assert AutoModelForCausalLM.from_pretrained(out)(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "names", "left"),
    [
        ("gpt2", ["transformer.h.0.attn.masked_bias", "transformer.h.1.attn.masked_bias"], 2),
        ("gpt2", ["transformer.h.0.attn.bias"], 0),  # transformers itself leaves it out, and so may the bytes stay
        ("llama", ["model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.0.self_attn.mask"], 2),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"], 0),
    ],
)
@pytest.mark.parametrize("link", [False, True])
def test_stored_constants_are_counted_and_left_out(
    kind: str, names: list[str], left: int, link: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    source = save_source(tmp_path / "source", kind, layers=2, **({"n_inner": 64} if kind == "gpt2" else {}))
    tensors = load_file(source / "model.safetensors")
    constants = {name: torch.ones(1, 1, 4, 4, dtype=torch.uint8) for name in names}
    save_file(tensors | constants, source / "model.safetensors", metadata={"format": "pt"})
    out = run(source, tmp_path / "out", mixer={"name": "gla", "window": 8, "sinks": 2}, link=link)
    said = [str(warning.message) for warning in recwarn if "stored constants" in str(warning.message)]
    assert len(said) == (left > 0)
    assert all(f"{left} stored constants are left out: " in each and names[0] in each for each in said)
    assert {name: tensor for name, tensor in load_file(out / "model.safetensors").items() if name in names}.keys() == (
        set() if left else set(names)
    )
    assert AutoModelForCausalLM.from_pretrained(out)(TOKENS).logits.isfinite().all()
    save_file(tensors | {"stray.weight": torch.ones(2)}, source / "model.safetensors")
    with pytest.raises(InputError, match="unexpected: "):
        run(source, tmp_path / "again")


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize(
    ("content", "text"),
    [({"a": Evil()}, "restricted loader refuses it"), ({"a": {"b": torch.zeros(1)}}, "other things than tensors")],
)
def test_pickle_with_anything_but_tensors_is_refused(content: Any, text: str, tmp_path: Path) -> None:
    source = pickled(tmp_path / "source", content)
    with pytest.raises(InputError, match=text):
        convert(locate(str(source)), recipe_of(source), tmp_path / "out", allow_pickle=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        if (folder / INDEX).exists():
            (folder / INDEX).unlink()
            every = {name: part.name for part in folder.glob("*.safetensors") for name in load_file(part)}
            (folder / INDEX).write_text(json.dumps({"weight_map": every}))

    return edit


def edit_config(**values: Any) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return edit


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-10])


def corrupt_header(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(b",48]", b",47]", 1))


def first_shard(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: sorted(folder.glob("*.safetensors"))[0].write_bytes(content)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "1 of the .* are missing: model-00002-of"),
        (lambda folder: (folder / INDEX).unlink(), "no model.safetensors.index.json that lists model-00001-of"),
        (lambda folder: (folder / INDEX).write_text("[]"), "is not an index of shards.*found a list"),
        (edit_index(lambda where: where.update(extra="../model.safetensors")), "is not an index of shards"),
        (edit_index(lambda where: where.update(extra=min(where.values()))), "names tensor extra in model-00001-of"),
        (
            edit_index(lambda where: where.update({min(where, key=lambda name: where[name]): max(where.values())})),
            "but it stands in model-00001",
        ),
        (truncate, "model-0000.*is not a whole safetensors file .cut short, or longer than its tensors: .* bytes"),
        (
            corrupt_header,
            "model-00001.*is not a whole safetensors file .invalid shape, data type, or offset",
        ),
        (first_shard(b"version https://git-lfs.github.com/spec/v1"), "is a Git LFS pointer.*git lfs pull"),
        (first_shard(b""), "is not a whole safetensors file .header too small"),
        (first_shard(struct.pack("<Q", 1000) + b"{"), "is not a whole safetensors file .invalid header length"),
        (first_shard(struct.pack("<Q", 4) + b"abcd"), "is not a whole safetensors file .invalid JSON"),
        (first_shard(struct.pack("<Q", 2) + b"{}tail"), "cut short, or longer than its tensors: 14 bytes"),
        (
            edit_tensors(lambda tensors: tensors["model.embed_tokens.weight"][5, 7:].fill_(float("nan"))),
            "model-00001-of.*: tensor model.embed_tokens.weight: holds values that are not finite",
        ),
        (edit_tensors(lambda tensors: tensors.update(stray=torch.zeros(2))), "unexpected: stray in model-00001-of"),
        (edit_tensors(lambda tensors: tensors.pop("model.embed_tokens.weight")), "missing: model.embed_tokens.weight"),
        (edit_config(num_key_value_heads=4), r"k_proj.weight is \[32, 48\], the configuration makes it \[64, 48\]"),
        (edit_config(num_attention_heads=8), r"q_proj.weight is \[64, 48\], the configuration makes it \[128, 48\]"),
        (edit_config(num_attention_heads=3), "num_attention_heads|q_proj.weight is"),
        (edit_config(num_key_value_heads=3), "k_proj.weight is"),
        (edit_config(head_dim=12), r"q_proj.weight is \[64, 48\], the configuration makes it \[48, 48\]"),
        (edit_config(num_hidden_layers=7, layer_types=["full_attention"] * 7), "missing: model.layers.6"),
        (edit_config(num_hidden_layers=5, layer_types=["full_attention"] * 5), "unexpected: model.layers.5"),
        (edit_config(tie_word_embeddings=False), "missing: lm_head.weight"),
        (edit_config(model_type="t5"), "no causal language model of type 't5'"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    ],
)
def test_damaged_source_is_one_paragraph_and_nothing_written(
    sharded_folder: Path, tmp_path: Path, change: Callable[[Path], Any], text: str
) -> None:
    source = Path(shutil.copytree(sharded_folder, tmp_path / "source"))
    change(source)
    with pytest.raises(InputError, match=text) as caught:
        run(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"layers": [0, 6]}, "found 6; this model has attention in layers 0 to 5"),
        ({"layers": {"keep": [9]}}, "found 9"),
        ({"layers": {"keep": [0, 1, 2, 3, 4, 5]}}, "none is left"),
        ({"mixer": {"name": "window", "window": 0}}, "window: found 0"),
    ],
)
def test_wrong_settings_are_refused(llama_folder: Path, tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        run(llama_folder, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_outputs_that_would_harm_are_refused(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(llama_folder, tmp_path / "source"))
    out = run(source, tmp_path / "out")
    with pytest.raises(InputError, match="exists and is not empty"):
        run(source, out)
    with pytest.raises(InputError, match="is already linearized, from source"):
        run(out, tmp_path / "again")
    with pytest.raises(InputError, match="is the source"):
        run(source, source, overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="result needs .* and the disk has 1000 bytes free"):
        run(source, tmp_path / "full")
    assert run(source, tmp_path / "linked", link=True).is_dir()
    monkeypatch.undo()
    run(source, out, overwrite=True, mixer={"name": "window", "window": 8, "sinks": 2})
    assert inspect(out)["layers"][0]["mixer"] == "window"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "linked"}


KILLED = """
import os, signal, sys
from pathlib import Path
from linearize.checkpoint import copying
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.conversion.plan import plan
from linearize.recipe import load as recipe

source, out, dtype = sys.argv[1:]
wanted = recipe.from_dict({"source": {"id": source}, "convert": {"mixer": {"name": "softmax"}, "dtype": dtype}})
plan(locate(source), wanted)  # imports what a conversion imports, once for all that are forked off
copying.CHUNK = 4096
kernel = os.sendfile
os.sendfile = lambda *arguments: (sys.audit("copy", out), kernel(*arguments))[1]
step, last = 0, None

def count(event, arguments):
    # Python announces every open, rename, mkdir, ... before it happens.
    global step
    if Path(out).name in repr(arguments):
        step += 1
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    last = int(line)
    child = os.fork()
    if not child:
        sys.addaudithook(count)
        convert(locate(source), wanted, Path(out))
        print(step, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.parametrize(("dtype", "kills"), [("auto", 20), ("float16", 8)])
@pytest.mark.slow
def test_after_a_kill_at_any_step_the_folder_is_whole_or_absent(
    sharded_folder: Path, tmp_path: Path, dtype: str, kills: int
) -> None:
    expected = tensors_of(run(sharded_folder, tmp_path / "expected", dtype=dtype))
    shutil.rmtree(tmp_path / "expected")
    out, unfinished = tmp_path / "converted-folder", tmp_path / ".converted-folder.partial"
    seen: Counter[str] = Counter()
    command = [sys.executable, "-c", KILLED, str(sharded_folder), str(out), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run_until(step: int) -> str:
            process.stdin.write(f"{step}\n")
            return "".join(iter(process.stdout.readline, "ended\n"))

        steps = int(run_until(0))  # this one is not killed
        shutil.rmtree(out)
        for step in random.Random(0).sample(range(1, steps + 1), kills):
            run_until(step)  # one that takes over finished shards has fewer steps, and may end by itself
            seen["complete" if out.exists() else "partial" if unfinished.exists() else "not begun"] += 1
            # Between the last flush and the rename it has no key any more, and is written anew.
            kept = unfinished.glob("*.safetensors") if (unfinished / ".key").exists() else ()
            finished = {path.name: path.stat().st_ino for path in kept}
            if not out.exists() and (step % 2 or finished and seen["continued"] < kills // 4):
                run(sharded_folder, out, dtype=dtype)
                seen["continued"] += bool(finished)
                # What was there is not written again.
                assert {name: (out / name).stat().st_ino for name in finished} == finished
            if out.exists():
                assert verify(out) == []
                assert tensors_of(out) == expected
                shutil.rmtree(out)
        process.stdin.close()
    assert seen["partial"] >= kills // 2, seen
    assert seen["continued"] >= 2, seen
    run(sharded_folder, out, dtype=dtype)
    assert {path.name for path in tmp_path.iterdir()} == {out.name}


FULL = """
import resource, sys
from pathlib import Path
from linearize.checkpoint import room
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.errors import InputError
from linearize.recipe import load as recipe

source, out, dtype, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
room.check_space = lambda *arguments: None  # another program takes the space after the check
values = {"source": {"id": source}, "convert": {"mixer": {"name": "softmax"}, "dtype": dtype}}
try:
    convert(locate(source), recipe.from_dict(values), Path(out))
except InputError as error:
    print(error, [path.name for path in Path(out).parent.iterdir()])
"""


@pytest.mark.parametrize(("dtype", "kind"), [("auto", "small disk"), ("float32", "file limit")])
@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_error_and_nothing_is_left(
    sharded_folder: Path, tmp_path: Path, dtype: str, kind: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    arguments = [sys.executable, "-c", FULL, str(sharded_folder), str(place / "out"), dtype]
    if kind == "file limit":
        command = [*arguments, "40000"]
    else:
        mount = f'mount -t tmpfs -o size=150k tmpfs {shlex.quote(str(place))} && exec "$0" "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, *arguments, "0"]
        if (
            shutil.which("unshare") is None
            or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode
        ):
            pytest.skip("a small file system cannot be mounted here: no right to a mount namespace")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason = "File too large" if kind == "file limit" else "No space left on device"
    assert f"the disk became full while the folder was written ({reason}" in done.stdout
    assert "), and nothing was left behind" in done.stdout
    assert done.stdout.endswith(" []\n")


def test_plan_is_made_from_the_configuration_alone(llama_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama_folder, tmp_path / "source"))
    (source / "model.safetensors").unlink()
    wanted = recipe_of(source, mixer={"name": "gla", "window": 64, "sinks": 4}, layers={"keep": [2, 5]})
    made = plan(locate(str(source)), wanted)
    assert isinstance(made, Plan)
    assert (made.layers, made.kept) == ([0, 1, 3, 4], [2, 5])
    per_token = 2 * 2 * 16 * 2  # keys and values of 2 heads of 16 in 2 bytes
    assert made.cache["bytes_per_token"] == {"source_kv": 6 * per_token, "linearized": 2 * per_token}
    row = next(row for row in made.cache["contexts"] if row["context"] == 32768)
    assert row["source_kv"] == 6 * per_token * 32768
    assert made.parameters == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()
    text = made.text()
    for part in (
        "source (llama)",
        "gla (",
        "window 64",
        "sinks 4",
        "4 of 6 linearized; softmax stays in 2, 5",
        "24.00 MiB",
    ):
        assert part in text
