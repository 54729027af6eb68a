"""Texts of files as people have them: any columns beside the text, odd names, long documents, damaged caches."""

import csv
import errno
import gzip
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from helpers.tiny import TEXT, tiny_tokenizer
from pyarrow import parquet
from tokenizers import normalizers, pre_tokenizers, processors

from linearize.checkpoint import room
from linearize.errors import InputError
from linearize.recipe.schema import Data
from linearize.recovery import data, documents
from linearize.recovery.data import blocks, tokens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def lines(file: Path, *rows: object) -> Data:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(path=str(file))


def texts(source: Data, tokenizer) -> list[str]:
    *found, rest = tokenizer.decode(tokens(source, tokenizer)).split(tokenizer.eos_token)
    assert rest == ""
    return found


# --- nothing is known by less than its content ---


@pytest.mark.parametrize("kind", ["jsonl", "txt", "folder", "folder of csv", "parquet"])
def test_other_text_of_the_same_path_size_and_time_is_read(tmp_path, tokenizer, kind):
    name = {"txt": "a.txt", "parquet": "a.parquet", "folder of csv": "set/a.csv"}.get(kind, "set/a.jsonl")
    file = tmp_path / name

    def write(text: str) -> Data:
        source = lines(file, {"text": text})
        if kind == "parquet":
            parquet.write_table(pyarrow.table({"text": [text]}), file)
        elif kind in ("txt", "folder of csv"):
            file.write_text(f"text\n{text}\n" if "csv" in kind else text)
        os.utime(file, (1e9, 1e9))
        return replace(source, path=str(file.parent)) if "folder" in kind else source

    assert texts(write("one"), tokenizer) == ["one"]
    assert texts(write("two"), tokenizer) == ["two"]


# --- only the column that is read matters ---


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"text": "a", "meta": None}, {"text": "b", "meta": "text"}),
        ({"text": "a", "meta": 1}, {"text": "b", "meta": {"deep": [1]}}),
        ({"text": "a", "when": "2024-01-01"}, {"text": "b", "when": "not a date"}),
        ({"text": "a"}, {"text": "b", "more": True}),
        ({"text": "a", "meta": "x"}, {"meta": "y"}),
        ({"text": "2024-01-01"}, {"text": "2024-01-02T10:00:00Z"}),
        ({"text": "1"}, {"text": "2.5"}),
        ({"text": None}, {"text": "b"}),
    ],
)
@pytest.mark.parametrize("how", ["lines", "shards", "folder", "list", "parquet"])
def test_columns_of_any_type_stand_beside_the_text(tmp_path, tokenizer, first, second, how):
    expected = [row["text"] for row in (first, second) if row.get("text")]
    if how == "lines":
        source = lines(tmp_path / "a.jsonl", first, second)
    elif how == "list":
        source = Data(path=str(tmp_path / "a.json"))
        (tmp_path / "a.json").write_text(json.dumps([first, second], indent=2))
    else:
        (tmp_path / "set").mkdir()
        for name, row in (("1", first), ("2", second)):
            if how == "parquet":
                parquet.write_table(
                    pyarrow.table({key: [value] for key, value in row.items()}), tmp_path / "set" / name
                )
                (tmp_path / "set" / name).rename(tmp_path / "set" / f"{name}.parquet")
            else:
                lines(tmp_path / "set" / f"{name}.jsonl", row)
        source = Data(path=str(tmp_path / "set" / ("" if how == "folder" else "*")))
    assert texts(source, tokenizer) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 5}\n', "column 'text' holds int, expected text; columns there: text"),
        (b'{"text": ["a"]}\n', "holds list, expected text"),
        (b'{"text": "a"}\n5\n', r"a.jsonl, line 2: found int, expected an object"),
        (b'{"text": "a"}\n\xff\n', "cannot be read .a.jsonl, line 2: 'utf-8' codec"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", "cannot be read .*recursion"),
        (b'{"other": "a"}\n', "no column 'text'.*Available: other"),
        (b"", "no column 'text'.*Available: none"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path, tokenizer, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        tokens(Data(path=str(tmp_path / "a.jsonl")), tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.parquet", "a.parquet.gz", "a.json"])
def test_damaged_files_are_one_paragraph(tmp_path, tokenizer, name):
    content = gzip.compress(lines(tmp_path / "good.jsonl", {"text": TEXT}).path.encode() * 99)
    (tmp_path / name).write_bytes(content[:-20] if "gz" in name else b"[{")
    with pytest.raises(InputError, match=rf"data: '.*{name}', split 'train': cannot be read"):
        tokens(Data(path=str(tmp_path / name)), tokenizer)


def test_odd_files_are_read(tmp_path, tokenizer):
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert texts(Data(path=str(tmp_path / "bom.jsonl")), tokenizer) == ["a", "b"]
    (tmp_path / "list.json").write_text('["a",\n"b"]')
    assert texts(Data(path=str(tmp_path / "list.json")), tokenizer) == ["a", "b"]
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    assert texts(Data(path=str(tmp_path / "half.jsonl")), tokenizer) == ["a\ufffd b \U0001f600"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("one\ntwo\n")
    assert texts(Data(path=str(tmp_path / "set")), tokenizer) == ["one", "two"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[1:3]", "bc"), ("train[50%:]+train[:1]", "cda"), ("train[-1:]", "d"), ("all[:2]", "ab"), ("train", "abcd")],
)
def test_slices_of_local_files(tmp_path, tokenizer, split, expected):
    source = lines(tmp_path / "a.jsonl", *({"text": text} for text in "abcd"))
    assert texts(replace(source, split=split), tokenizer) == [*expected]


# --- names ---


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("data [v2]/t.jsonl", "data [v2]/t.jsonl"),
        ("t[1].jsonl", "t[1].jsonl"),
        ("really?/a*.jsonl", "really?/a*.jsonl"),
        ("data [v2]/t.jsonl", "data [v2]/*.jsonl"),
        ("data [v2]/t.jsonl", "data [v2]"),
        ("data [v2]/t.jsonl", "data [v2]/**/*.jsonl"),
        ("t1.jsonl", "t[0-9].jsonl"),
    ],
)
def test_a_name_is_taken_literally_before_it_is_a_pattern(tmp_path, tokenizer, file, path):
    lines(tmp_path / "t2.jsonl.not", {"text": "wrong"})
    lines(tmp_path / file, {"text": "right"})
    assert texts(Data(path=str(tmp_path / path)), tokenizer) == ["right"]


# --- nothing left after a step ---


@pytest.mark.parametrize("with_start", [False, True])
def test_a_document_that_the_tokenizer_empties_is_left_out(tmp_path, with_start):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    if with_start:
        start = [("<|endoftext|>", 0)]
        template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=start)
        tokenizer.backend_tokenizer.post_processor = template
    some = lines(tmp_path / "a.jsonl", {"text": "xx"}, {"text": "axb"}, {"text": "x"})
    assert texts(some, tokenizer) == ["<|endoftext|>" * with_start + "ab"]
    none = lines(tmp_path / "b.jsonl", {"text": "xx"}, {"text": "x"})
    with pytest.raises(InputError, match="holds no text in column 'text', or none that the tokenizer leaves"):
        tokens(none, tokenizer)


# --- long documents ---


@pytest.mark.parametrize("kind", ["bytes", "prefix", "special", "ends itself"])
@pytest.mark.parametrize("how", ["txt", "txt.gz", "jsonl"])
def test_a_long_document_gives_the_tokens_of_the_whole(tmp_path, monkeypatch, kind, how):
    tokenizer = tiny_tokenizer()
    if kind == "prefix":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind != "bytes":
        parts = "<|endoftext|> $A <|pad|>" if kind == "special" else "$A <|im_end|>"
        ids = [("<|endoftext|>", 0), ("<|im_end|>", 1), ("<|pad|>", 2)]
        template = processors.TemplateProcessing(single=parts, special_tokens=[x for x in ids if x[0] in parts])
        tokenizer.backend_tokenizer.post_processor = template
    text = TEXT * 20 + "\u00e4\u4e2d " * 50
    expected = [x for x in tokenizer(text)["input_ids"] if kind != "ends itself" or x != 1] + [tokenizer.eos_token_id]
    source = lines(tmp_path / "a.jsonl", {"text": text})
    if "txt" in how:
        source = Data(path=str(tmp_path / f"a.{how}"))
        Path(source.path).write_bytes(gzip.compress(text.encode()) if "gz" in how else text.encode())
    for module in (data, documents):
        monkeypatch.setattr(module, "PIECE", 700)
    assert tokens(source, tokenizer).tolist() == expected


@pytest.mark.parametrize("text", ["\u4e2d" * 5000, "A" * 5000, " " * 3000 + "a" + "\n" * 3000])
def test_a_long_document_without_words_is_cut_too(tmp_path, tokenizer, monkeypatch, text):
    source = lines(tmp_path / "a.jsonl", {"text": "before"}, {"text": text}, {"text": "behind"})
    for module in (data, documents):
        monkeypatch.setattr(module, "PIECE", 1000)
    longest = []
    call = type(tokenizer).__call__
    watch = lambda self, texts, **options: longest.extend(map(len, texts)) or call(self, texts, **options)  # noqa: E731
    monkeypatch.setattr(type(tokenizer), "__call__", watch)
    first, middle, last = texts(source, tokenizer)
    assert (first, middle.strip(), last) == ("before", text.strip(), "behind")
    assert max(longest) <= 1000 + data.TAIL


# --- the cache ---


@pytest.mark.parametrize("damage", ["half", "empty", "one bit", "one more", "a folder of another user"])
def test_a_damaged_file_of_the_cache_is_made_again(tmp_path, tokenizer, cache, capsys, damage, monkeypatch):
    source = lines(tmp_path / "a.jsonl", {"text": TEXT})
    expected = tokens(source, tokenizer).tolist()
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        content[8] ^= 1
    changed = {"half": content[: len(content) // 8 * 4], "empty": b"", "one more": content + b"1234"}
    file.write_bytes(changed.get(damage, content))
    if "user" in damage:
        real, calls = data._kept, []
        monkeypatch.setattr(data, "_kept", lambda file: real(file) if calls else calls.append(0))
    assert tokens(source, tokenizer).tolist() == expected
    assert "tokenised again" in capsys.readouterr().err
    assert tokens(source, tokenizer).tolist() == expected and [*cache.iterdir()] == [file]


def test_leftovers_of_a_kill_are_removed(tmp_path, tokenizer, cache):
    cache.mkdir()
    for name in ("tmpabc.tmp", "tokens-1.bin.01234567.tmp", ".tokens-1.bin.01234567.tmp.lock"):
        (cache / name).write_text("")
    tokens(lines(tmp_path / "a.jsonl", {"text": "a"}), tokenizer)
    assert [file.suffix for file in cache.iterdir()] == [".bin"]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize("how", ["file", "full", "read-only", "no home"])
def test_a_cache_that_cannot_be_used_is_one_paragraph(tmp_path, tokenizer, cache, monkeypatch, how):
    source, message = lines(tmp_path / "a.jsonl", {"text": "a"}), "cannot be kept there"
    if how == "file":
        cache.write_text("")
    elif how == "full":
        monkeypatch.setattr(np, "asarray", full)
    elif how == "read-only":
        cache.mkdir()
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        monkeypatch.delenv("LINEARIZE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: Path("~nobody-at-all").expanduser())
        message = "has no home folder"
    with pytest.raises(InputError, match=f"{message}.*set (LINEARIZE_CACHE|it) to"):
        tokens(source, tokenizer)


# --- what can fit ---


@pytest.mark.parametrize("count", [10**12, 10**30])
def test_more_blocks_than_any_memory_are_refused_at_once(tmp_path, tokenizer, count):
    with pytest.raises(
        InputError, match=r"the order of .* blocks of 16 tokens needs at least .*this machine has .*GiB"
    ):
        blocks([Data(path=str(tmp_path / "nothing.jsonl"))], tokenizer, 16, count)


def test_memory_is_what_the_container_may_use(tmp_path, monkeypatch):
    (tmp_path / "max").write_text("1048576\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(room, "LIMITS", [str(tmp_path / name) for name in ("none", "max", "missing")])
    assert room.memory() == 1 << 20


# --- tables as text, and marks before it ---

ODD = ["007", "NA", "null", "2024-01-01", 'two, with "quotes"', "two\nlines", "1e5", "x" * 200_000]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "set/a.csv", "set/a.csv.gz", "set/a.tsv"])
def test_a_table_of_text_is_read_as_text(tmp_path, tokenizer, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    buffer = io.StringIO(newline="")
    rows = csv.writer(buffer, delimiter="\t" if "tsv" in name else ",")
    rows.writerows([["id", "text"], *enumerate(ODD), ["", ""]])
    content = b"\xef\xbb\xbf" + buffer.getvalue().encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert texts(Data(path=str(file.parent if "set" in name else file)), tokenizer) == ODD


@pytest.mark.parametrize("second", ["text,more\n007,x\n", "more,text\n,007\n", "text\n007\n\n"])
def test_tables_of_a_folder_may_have_other_columns(tmp_path, tokenizer, second):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.csv").write_text("text,meta\none,\n")
    (tmp_path / "set" / "2.csv").write_text(second)
    assert texts(Data(path=str(tmp_path / "set")), tokenizer) == ["one", "007"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,one, two\n", r"a.csv, line 2: found 3 fields, and the first line names 2 columns"),
        ("id,text\n1\n", r"a.csv, line 2: found 1 fields"),
        ('text\n"one\n', "cannot be read .*end of data"),
        ("other\none\n", "no column 'text'.*Available: other"),
        ("", "no column 'text'.*Available: none"),
    ],
)
def test_a_damaged_table_is_one_paragraph(tmp_path, tokenizer, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        tokens(Data(path=str(tmp_path / "a.csv")), tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "set/a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    content = b"\xef\xbb\xbfone"
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert texts(Data(path=str(file.parent if "set" in name else file)), tokenizer) == ["one"]


@pytest.mark.parametrize("setting", ["split_special_tokens", "add_prefix_space", "add_bos_token", "content of a file"])
def test_a_setting_of_the_tokenizer_makes_other_tokens(tmp_path, setting):
    words = tmp_path / "words.txt"
    words.write_text("a")

    def key(folder: str, value: bool) -> str:
        tokenizer = tiny_tokenizer()
        tokenizer.init_kwargs |= {"name_or_path": folder, "vocab_file": str(words)}
        if setting == "split_special_tokens":
            tokenizer.split_special_tokens = value
        else:
            tokenizer.init_kwargs[setting] = value
        return data._fingerprint(tokenizer)

    if setting == "content of a file":
        before = key("a", False)
        words.write_text("b")
        assert key("a", False) != before
    else:
        assert key("a", False) == key("b", False) != key("a", True)
