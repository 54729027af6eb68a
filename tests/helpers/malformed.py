"""Malformed inputs: real files of a tiny model, changed by draws of hypothesis, and what must hold of the answers."""

import copy
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

Check = Callable[[Path], str]
Attempt = Callable[[str, list[str], str, Check], None]

# What people and broken programs write where something else belongs.
NUMBERS = st.one_of(st.integers(-3, 9), st.sampled_from([2**31, 2**63, 10**9, 10**18, -(10**6), 328.0, 0.5, 1e308]))
WORDS = st.sampled_from(
    [
        "",
        " ",
        "null",
        "gla",
        "../../x",
        "/etc/passwd",
        "a\u0000b",
        "\ud800",
        "\u202e",
        "[red]x",
        "<b>",
        "é" * 40,
        "9" * 400,
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=20))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LIKE = {int: st.integers(-3, 2000), float: st.floats(), bool: st.booleans(), str: WORDS | st.text(max_size=20)}
PAGES = (
    *(b"", b"\n", b"\xef\xbb\xbf{}", b"[]", b"null", b"{" * 3000, b"\x80\x04\x95", b"PK\x03\x04"),
    b"<!DOCTYPE html><html>429 Too Many Requests</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
)


def changed_values(data: st.DataObject, values: Any) -> Any:
    """A copy of JSON-like values with one to three entries replaced, removed, renamed or added."""
    values = copy.deepcopy(values)
    for _ in range(data.draw(st.integers(1, 3))):
        inner, depth = values, data.draw(st.integers(0, 4))
        while isinstance(inner, dict | list) and len(inner):
            key = data.draw(
                st.sampled_from(sorted(inner, key=str))
                if isinstance(inner, dict)
                else st.integers(0, min(len(inner), 50) - 1)
            )
            if depth and isinstance(inner[key], dict | list) and len(inner[key]):
                inner, depth = inner[key], depth - 1
                continue
            change = data.draw(st.sampled_from(["scale", "like", "like", "replace", "remove", "rename", "wrap"]))
            if change == "remove" or change == "rename" and isinstance(inner, list):
                del inner[key]
            elif change == "rename":
                inner[data.draw(st.text(min_size=1, max_size=8))] = inner.pop(key)
            elif change == "wrap":
                inner[key] = [inner[key]]
            elif change == "scale" and isinstance(inner[key], int):
                inner[key] = int(inner[key]) * data.draw(st.sampled_from([2, 3, 1000, 0, -1]))
            elif change == "like" and type(inner[key]) in LIKE:
                inner[key] = data.draw(LIKE[type(inner[key])])
            else:
                inner[key] = data.draw(VALUES)
            break
    return values


def changed_bytes(data: st.DataObject, content: bytes) -> bytes:
    """A file that lost its end, was hit in some bytes or blocks, or is something else."""
    change = data.draw(st.sampled_from(["cut", "flip", "flip", "block", "insert", "page"]))
    if change == "page" or not content:
        return data.draw(st.sampled_from(PAGES))
    where = data.draw(st.integers(0, min(len(content), data.draw(st.sampled_from([64, 4096, 10**9]))) - 1))
    if change == "cut":
        return content[:where]
    if change == "insert":
        return content[:where] + data.draw(st.binary(min_size=1, max_size=9)) + content[where:]
    size = 1 if change == "flip" else min(512, len(content) - where)
    new = data.draw(st.binary(min_size=1, max_size=1)) * size if change == "flip" else b"\0" * size
    return content[:where] + new + content[where + size :]


def changed_json(data: st.DataObject, file: Path) -> None:
    """Change a JSON file in place, mostly as values."""
    if data.draw(st.integers(0, 3)):
        content = json.dumps(changed_values(data, json.loads(file.read_bytes()))).encode("utf-8", "surrogatepass")
    else:
        content = changed_bytes(data, file.read_bytes())
    replace(file, content)


def changed_header(data: st.DataObject, file: Path) -> None:
    """Change a safetensors file in place: its header as values, or its bytes."""
    content = file.read_bytes()
    if data.draw(st.booleans()):
        size = struct.unpack("<Q", content[:8])[0]
        header = json.dumps(changed_values(data, json.loads(content[8 : 8 + size]))).encode("utf-8", "surrogatepass")
        replace(file, struct.pack("<Q", len(header)) + header + content[8 + size :])
    else:
        replace(file, changed_bytes(data, content))


def replace(file: Path, content: bytes) -> None:
    """Write a file anew: it may be a hard link."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


# --- kinds: each changes a copy of a folder and says which command meets it, and what must hold if that succeeds


def nothing(out: Path) -> str:
    """No check but exit code and output."""
    return ""


def same_as_source(bad: Path) -> Check:
    """The converted folder opens, and with its source's attention it gives what transformers makes of the source."""

    def check(out: Path) -> str:
        from transformers import AutoModelForCausalLM

        import linearize
        from linearize.model.branches import branches

        if not out.exists():
            return ""
        model, _ = linearize.load(out, dtype="float32")
        gguf = {"gguf_file": bad.name} if bad.suffix == ".gguf" else {}
        try:
            source = AutoModelForCausalLM.from_pretrained(
                bad.parent if gguf else bad, dtype=torch.float32, **gguf
            ).eval()
        except Exception:
            return ""  # transformers refuses it; the folder that we wrote opened
        ids = torch.arange(3, 15)[None]
        with torch.no_grad(), branches(model, "source"):
            ours, theirs = model(ids).logits, source(ids).logits
        return (
            ""
            if torch.allclose(ours, theirs, atol=1e-4, equal_nan=True)
            else f"logits differ by {(ours - theirs).abs().max()}"
        )

    return check


def source_kind(change: Callable[[st.DataObject, Path], None], name: str) -> Callable[..., Any]:
    def make(data: st.DataObject, made: Path, folder: Path) -> tuple[list[str], Check]:
        bad = clone(made / "source", folder)
        change(data, bad / name)
        converting = ["convert", "--model", str(bad), "--set", "convert.mixer.window=8", "--out", "OUT"]
        converting = ["convert", "--model", str(bad), "--set", "convert.mixer.window=8", "--out", "OUT"]
        words = data.draw(st.sampled_from([converting, ["inspect", str(bad)], [*converting, "--dry-run"]]))
        return words, same_as_source(bad)

    return make


def index(data: st.DataObject, made: Path, folder: Path) -> tuple[list[str], Check]:
    from transformers import AutoModelForCausalLM

    sharded = made / "sharded"
    if not sharded.exists():
        shutil.copytree(made / "source", sharded, ignore=shutil.ignore_patterns("*.safetensors"))
        AutoModelForCausalLM.from_pretrained(made / "source").save_pretrained(sharded, max_shard_size="80KB")
    bad = clone(sharded, folder)
    changed_json(data, bad / "model.safetensors.index.json")
    return ["convert", "--model", str(bad), "--out", "OUT"], same_as_source(bad)


def gguf(data: st.DataObject, made: Path, folder: Path) -> tuple[list[str], Check]:
    from helpers.gguf import write_gguf
    from helpers.tiny import tiny_model

    whole = made / "tiny.gguf"
    if not whole.exists():
        write_gguf(whole, tiny_model(layers=2))
    folder.mkdir()
    replace(folder / "bad.gguf", changed_bytes(data, whole.read_bytes()))
    return ["convert", "--model", str(folder / "bad.gguf"), "--out", "OUT"], same_as_source(folder / "bad.gguf")


def folder_kind(
    stage: str, change: Callable[[st.DataObject, Path], None], names: tuple[str, ...], *commands: tuple[str, ...]
) -> Callable[..., Any]:
    def make(data: st.DataObject, made: Path, folder: Path) -> tuple[list[str], Check]:
        bad = clone(made / stage, folder)
        there = [name for name in names if (bad / name).exists()]
        change(data, bad / data.draw(st.sampled_from(there)))
        return [word.replace("DIR", str(bad)) for word in data.draw(st.sampled_from(commands))], nothing

    return make


GENERATE = ("generate", "DIR", "--prompt", "Hello", "--max-new-tokens", "3")


def template(data: st.DataObject, file: Path) -> None:
    """Change a chat template in place."""
    pieces = [
        "{{ messages }}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ x.y.z }}",
        "{{ 1 / 0 }}",
        "{{ messages[9] }}",
    ]
    text = file.read_text()
    where = data.draw(st.integers(0, len(text)))
    replace(
        file,
        (text[:where] + data.draw(st.sampled_from(pieces)) + text[data.draw(st.integers(where, len(text))) :]).encode(),
    )


def recipe(data: st.DataObject, made: Path, folder: Path) -> tuple[list[str], Check]:
    folder.mkdir()
    file = folder / "recipe.yaml"
    shutil.copy(made / "recipe.yaml", file)
    changed_json(data, file)
    return data.draw(
        st.sampled_from([["check", str(file)], ["convert", "--model", str(file), "--out", "OUT", "--dry-run"]])
    ), nothing


def _same_tokens(file: Path, made: Path, texts: Callable[[], list[Any]]) -> Check:
    """The row of tokens is that of the plain reading of the file."""

    def check(out: Path) -> str:
        import numpy as np

        from linearize.checkpoint.open import open_tokenizer
        from linearize.recipe.schema import Data
        from linearize.recovery.data import tokens

        tokenizer = open_tokenizer(made / "convert")
        wanted: list[int] = []
        for text in texts():
            if text and text.strip():
                ids = tokenizer(text).input_ids
                wanted += ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        row = np.asarray(tokens(Data(path=str(file)), tokenizer))
        return "" if row.tolist() == wanted else f"{len(row)} tokens, a plain reading gives {len(wanted)}"

    return check


def jsonl(data: st.DataObject, made: Path, folder: Path) -> tuple[list[str], Check]:
    folder.mkdir()
    file = folder / data.draw(st.sampled_from(["t.jsonl", "a [1]*.jsonl", "t.jsonl.gz.jsonl"]))
    long = (made / "words.txt").read_text()
    texts = st.one_of(st.just(long), st.text(max_size=30), st.just("2024-01-01"), st.just(" "), st.none())
    rows = [{"text": long * 8}] + [
        {"text": data.draw(texts)} | data.draw(st.dictionaries(st.sampled_from(["id", "meta"]), SCALARS, max_size=2))
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    lines = [json.dumps(row) for row in data.draw(st.permutations(rows))]
    if data.draw(st.integers(0, 3)) == 0:
        lines.insert(
            data.draw(st.integers(0, len(lines))),
            data.draw(st.sampled_from(["", "{", "[]", "7", "null", '{"text": 7}', '{"other": 1}'])),
        )
    replace(file, "\n".join(lines).encode("utf-8", "surrogatepass"))
    rows_in = lambda line: row if isinstance(row := json.loads(line), list) else [row]  # noqa: E731
    read = lambda: [row.get("text") for line in file.read_text().splitlines() if line.strip() for row in rows_in(line)]  # noqa: E731
    return ["calibrate", str(made / "convert"), "--set", f"data.0.path={file}", "--out", "OUT"], _same_tokens(
        file, made, read
    )


def parquet(data: st.DataObject, made: Path, folder: Path) -> tuple[list[str], Check]:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    file = folder / "t.parquet"
    rows = [
        (made / "words.txt").read_text() * 8,
        *data.draw(st.lists(st.one_of(st.none(), st.text(max_size=20)), max_size=5)),
    ]
    rows = [row if row is None else row.encode("utf-8", "ignore").decode() for row in rows]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file)
    if data.draw(st.booleans()):
        replace(file, changed_bytes(data, file.read_bytes()))
    read = lambda: pyarrow.parquet.read_table(file)["text"].to_pylist()  # noqa: E731
    return ["calibrate", str(made / "convert"), "--set", f"data.0.path={file}", "--out", "OUT"], _same_tokens(
        file, made, read
    )


def results(data: st.DataObject, made: Path, folder: Path) -> tuple[list[str], Check]:
    bad = clone(made / "eval", folder)
    changed_json(data, bad / "results.json")
    return ["report", str(bad / "results.json")], nothing


def finite(bad: Path) -> Check:
    def check(out: Path) -> str:
        import linearize

        if not out.exists():
            return ""
        model, _ = linearize.load(out)
        return "" if all(bool(p.isfinite().all()) for p in model.parameters()) else "weights that are not finite"

    return check


def adapters(data: st.DataObject, made: Path, folder: Path) -> tuple[list[str], Check]:
    bad = clone(made / "train", folder)
    if data.draw(st.booleans()):
        changed_json(data, bad / "adapter_config.json")
    else:
        changed_header(data, bad / "adapter_model.safetensors")
    return ["merge", str(bad), "--out", "OUT"], finite(bad)


OPENED = (
    GENERATE,
    ("inspect", "DIR"),
    ("export", "DIR", "--out", "OUT"),
    ("push", "DIR", "--repo", "tester/x", "--dry-run"),
)
KINDS: dict[str, Callable[[st.DataObject, Path, Path], tuple[list[str], Check]]] = {
    "config": source_kind(changed_json, "config.json"),
    "tokenizer": folder_kind("convert", changed_json, ("tokenizer.json", "tokenizer_config.json"), GENERATE),
    "generation_config": folder_kind("convert", changed_json, ("generation_config.json",), GENERATE),
    "jsonl": jsonl,
    "recipe": recipe,
    "safetensors": source_kind(changed_header, "model.safetensors"),
    "index": index,
    "gguf": gguf,
    "template": folder_kind("convert", template, ("chat_template.jinja",), GENERATE),
    "parquet": parquet,
    "results": results,
    "adapters": adapters,
    "converted": folder_kind("convert", changed_json, ("config.json", "linearize.json", "recipe.yaml"), *OPENED),
}


def clone(source: Path, folder: Path) -> Path:
    """A copy by hard links; who changes a file replaces it."""
    shutil.copytree(source, folder, copy_function=os.link)
    if (folder / "recipe.yaml").exists():
        _as_json(folder / "recipe.yaml")
    return folder


def _as_json(file: Path) -> None:
    import yaml

    replace(file, json.dumps(yaml.safe_load(file.read_text())).encode())


def draw(
    folder: Path, rng: random.Random, tries: int, kinds: list[str], attempt: Attempt, over: Callable[[], bool]
) -> None:
    """Draw inputs of every kind in turn, a few of each at a time, and hand them to `attempt`."""
    each = max(1, tries // len(kinds))
    batch = min(each, 12)  # hypothesis begins each with what is simplest
    for turn in range(-(-each // batch)):
        for kind in kinds:
            if turn == 0 or not over():  # a slow machine tries each kind too
                _draw(folder / "bad", rng.getrandbits(32), batch, kind, folder / "made", attempt)


def _draw(bad: Path, number: int, count: int, kind: str, made: Path, attempt: Attempt) -> None:
    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        shutil.rmtree(bad, ignore_errors=True)
        words, check = KINDS[kind](data, made, bad)
        attempt(kind, words, f"seed {number}", check)

    one()
    shutil.rmtree(bad, ignore_errors=True)


def in_child(check: Callable[[], str], folder: Path, limit: float = 60.0) -> str:
    """What a check says, made in a child that may crash or hang."""
    answer = folder / "check.txt"
    pid = os.fork()
    if pid == 0:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            said = check()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        answer.write_text(said)
        os._exit(0)
    end = time.monotonic() + limit
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return "the check hangs"
        time.sleep(0.005)
    return answer.read_text() if answer.exists() else "the check crashed"
