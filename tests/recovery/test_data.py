"""Data: what is read, how it is packed and ordered, what is kept, and what is refused."""

import errno
import gzip
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers.tiny import TEXT, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from linearize.errors import InputError
from linearize.recipe.schema import Data
from linearize.recovery import data, documents
from linearize.recovery.data import Blocks, blocks, tokens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(*sizes: int) -> list[np.ndarray]:
    """One row of tokens per size; no token comes twice."""
    return [1000 * i + np.arange(size, dtype=np.int32) for i, size in enumerate(sizes)]


def write(folder: Path, name: str, texts: list, column: str = "text") -> Data:
    text = "".join(json.dumps({column: text, "id": str(i)}) + "\n" for i, text in enumerate(texts))
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return Data(path=str(folder / name), column=column)


# --- order ---


def test_every_block_comes_once_per_pass_in_another_order_each_time():
    found = Blocks(rows(83), [1.0], 8, 30, seed=0)
    starts = [int(block[0]) for block in found]
    assert all(torch.equal(block, block[0] + torch.arange(8)) for block in found)
    passes = [starts[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(one) == list(range(0, 80, 8)) for one in passes)  # the rest of 3 tokens is left out
    assert len({tuple(one) for one in passes}) == 3 and found.epochs == [3.0]


def test_the_seed_decides_the_order_and_nothing_else_does():
    def order(seed: int, count: int = 20) -> list[int]:
        return [int(block[0]) for block in Blocks(rows(160, 80), [1.0, 1.0], 8, count, seed)]

    assert order(0) == order(0) != order(1)
    assert order(0, 40)[:20] == order(0)  # a longer run begins like a shorter one


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 100))
def test_each_part_of_a_mixture_gets_its_share_of_every_prefix(weights, count):
    plan = Blocks(rows(*[64] * len(weights)), weights, 8, count).plan[:, 0]
    for which, weight in enumerate(weights):
        taken = np.cumsum(plan == which)
        share = weight / sum(weights) * np.arange(1, count + 1)
        assert np.abs(taken - share).max() < len(weights)


def test_slices_are_batches():
    found = Blocks(rows(160), [1.0], 8, 12)
    batch = found[4:7]
    assert batch.shape == (3, 8) and batch.dtype == torch.int64
    assert torch.equal(batch, torch.stack([found[4], found[5], found[6]]))


# --- text to tokens ---


def test_documents_follow_each_other_with_the_end_token_between_them(tmp_path, tokenizer):
    source = write(tmp_path, "text.jsonl", ["one", "", "  \n", None, "two words", TEXT])
    eos = tokenizer.eos_token_id
    expected = [id for text in ("one", "two words", TEXT) for id in [*tokenizer(text)["input_ids"], eos]]
    assert tokens(source, tokenizer).tolist() == expected


def test_a_tokenizer_that_ends_documents_itself_gets_no_second_end_token(tmp_path):
    class Ending:
        eos_token_id, is_fast = 1, False
        special_tokens_map, init_kwargs, split_special_tokens = {}, {}, False

        def get_vocab(self):
            return {}

        def __call__(self, texts, verbose):
            return {"input_ids": [[7, 1] if text else [1] for text in texts]}

    assert tokens(write(tmp_path, "text.jsonl", ["a", "b"]), Ending()).tolist() == [7, 1, 7, 1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.parquet", "*.jsonl"])
def test_formats_give_the_same_tokens(tmp_path, tokenizer, name):
    expected = tokens(write(tmp_path, "reference.jsonl", [TEXT]), tokenizer).tolist()
    (tmp_path / "reference.jsonl").unlink()
    if name.endswith(".txt"):
        (tmp_path / name).write_text(TEXT)
    elif name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [TEXT]}), tmp_path / name)
    else:
        write(tmp_path, name.replace("*", "b"), [TEXT])
    assert tokens(Data(path=str(tmp_path / name)), tokenizer).tolist() == expected


def test_several_files_and_a_folder_are_one_data_set(tmp_path, tokenizer):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, "1.jsonl", ["one"])
    write(folder, "2.jsonl", ["two"])
    expected = [id for text in ("one", "two") for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert tokens(Data(path=str(folder / "*.jsonl")), tokenizer).tolist() == expected
    assert tokens(Data(path=str(folder)), tokenizer).tolist() == expected


def test_a_part_of_a_split_can_be_named(tmp_path, tokenizer):
    source = write(tmp_path, "text.jsonl", ["one", "two", "three", "four"])
    half = replace(source, split="train[:50%]")
    expected = [id for text in ("one", "two") for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert tokens(half, tokenizer).tolist() == expected


def test_tokens_are_kept_by_content_and_tokenizer(tmp_path, tokenizer, cache, monkeypatch):
    source = write(tmp_path, "text.jsonl", ["one"])
    first = tokens(source, tokenizer).tolist()
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(
            data, "_tokenise", None
        )  # not called again, even by another process with its own tokenizer object
        other = tiny_tokenizer()
        other(["some text"], truncation=True, max_length=3)  # leaves a trace in the tokenizer's state, not in its ids
        assert tokens(source, other).tolist() == first
    (tmp_path / "text.jsonl").write_text('{"text": "two"}\n')
    assert tokens(source, tokenizer).tolist() != first
    changed = tiny_tokenizer()
    changed.eos_token = "<|pad|>"
    assert tokens(source, changed).tolist()[-1] == changed.pad_token_id
    assert len(list(cache.iterdir())) == 3


def test_a_failure_leaves_nothing_in_the_cache(tmp_path, tokenizer, cache, monkeypatch):
    source = write(tmp_path, "text.jsonl", ["one"])

    def break_off(*_):
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "_encoded", break_off)
        tokens(source, tokenizer)
    assert list(cache.iterdir()) == []


def full(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


CACHES = {
    "a file in its place": lambda cache, kept, patch: (shutil.rmtree(cache), cache.write_text("")),
    "a folder in the place of a file": lambda cache, kept, patch: (kept.unlink(), kept.mkdir()),
    "a name that is too long": lambda cache, kept, patch: patch.setenv("LINEARIZE_CACHE", f"{cache}/{'n' * 300}"),
    "a full disk": lambda cache, kept, patch: (kept.unlink(), patch.setattr(os, "fsync", full)),
    "no room for a name": lambda cache, kept, patch: (kept.unlink(), patch.setattr(FileLock, "acquire", full)),
}


@pytest.mark.parametrize("kind", CACHES)
def test_what_is_wrong_with_the_cache_names_it_and_its_variable(tmp_path, tokenizer, cache, monkeypatch, kind):
    data_set = write(tmp_path, "a.jsonl", [TEXT])
    tokens(data_set, tokenizer)
    monkeypatch.delenv("LINEARIZE_NO_FSYNC", raising=False)
    CACHES[kind](cache, next(cache.iterdir()), monkeypatch)
    with pytest.raises(InputError, match=rf"^{cache}.*cannot be kept there .*LINEARIZE_CACHE"):
        tokens(data_set, tokenizer)


def test_a_pipe_in_the_place_of_kept_tokens_is_not_opened(tmp_path, tokenizer, cache):
    data_set = write(tmp_path, "a.jsonl", [TEXT])
    expected = tokens(data_set, tokenizer).tolist()
    kept = next(cache.iterdir())
    kept.unlink()
    os.mkfifo(kept)
    assert tokens(data_set, tokenizer).tolist() == expected


def test_the_cache_is_in_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("LINEARIZE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert data.cache_folder() == Path("/somewhere/linearize")


def test_a_mixture_is_blocks_of_all_its_parts(tmp_path, tokenizer):
    parts = [write(tmp_path, f"{i}.jsonl", [letter * 400]) for i, letter in enumerate("ab")]
    found = blocks([replace(parts[0], weight=3.0), parts[1]], tokenizer, 16, 8)
    texts = [tokenizer.decode(block) for block in found]
    assert sum("a" in text for text in texts) == 6 and sum("b" in text for text in texts) == 2


# --- bad input ---


def test_bad_data_is_one_paragraph(tmp_path, tokenizer, cache):
    good = write(tmp_path, "good.jsonl", [TEXT])
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "broken.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "text.xml").write_text("text\na\n")
    cases = {
        "no column 'txt'. Did you mean 'text'\\? Available: id, text": replace(good, column="txt"),
        "found nothing named '.*nothing.jsonl'": Data(path=str(tmp_path / "nothing.jsonl")),
        "found nothing named 'nothing/\\*.txt'": Data(path="nothing/*.txt"),
        "found nothing named 'texts/a.jsonl'": Data(path="texts/a.jsonl"),
        "found nothing named 'demo-txt'.* Did you mean 'demo-text'": Data(path="demo-txt"),
        "cannot read .xml .*allowed: one of .txt, .jsonl": Data(path=str(tmp_path / "text.xml")),
        "cannot read .gz, .jsonl, .xml as one data set|cannot read .jsonl, .xml": Data(path=str(tmp_path / "*")),
        "column 'n' holds int, expected text; columns there: n, id": write(tmp_path, "numbers.jsonl", [1, 2], "n"),
        "holds no text in column 'text'": write(tmp_path, "blank.jsonl", ["", " "]),
        "broken.jsonl', .*: cannot be read .broken.jsonl, line 2: Expecting": Data(path=str(tmp_path / "broken.jsonl")),
        "broken.jsonl.gz', .*: cannot be read .Not a gzip": Data(path=str(tmp_path / "broken.jsonl.gz")),
        "'org/name.v2', split 'train': cannot be read .*is the Hub within reach": Data(path="org/name.v2"),
        "good.jsonl', split 'tr@in': cannot be read .Unrecognized": replace(good, split="tr@in"),
    }
    for message, source in cases.items():
        with pytest.raises(InputError, match=message) as error:
            tokens(source, tokenizer)
        assert "\n" not in str(error.value)
    assert not list(cache.iterdir())


def test_a_data_set_smaller_than_one_block_is_refused(tmp_path, tokenizer):
    source = write(tmp_path, "short.jsonl", ["a"])
    with pytest.raises(InputError, match=r"holds 2 tokens, one block needs 512 \(train.seq_len\)"):
        blocks([source], tokenizer, 512, 4)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        tokens(write(tmp_path, "text.jsonl", ["a"]), tokenizer)


# --- the text that comes with the package ---


def demo_text() -> tuple[Path, list[dict]]:
    (file,) = documents._files("demo-text")
    with gzip.open(file, "rt") as lines:
        return file, [json.loads(line) for line in lines]


def test_the_embedded_text_is_small_varied_and_accounted_for():
    file, found = demo_text()
    assert file.stat().st_size < 1_600_000
    assert sum(len(row["text"]) for row in found) > 4_000_000
    assert len({row["id"] for row in found}) == len(found)
    sources = (file.parent / "README.md").read_text()
    for row in found:
        assert f"`{row['source']}`" in sources or any(
            f"`{row['source'].split(mark)[0]}{mark}*`" in sources for mark in "-/"
        )


def test_the_embedded_text_holds_nothing_that_the_evaluation_measures():
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    held_out: set = set()
    folder = documents.package_folder("eval") / "data"
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".jsonl", ".txt", ".gz")):
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for line in content.decode().splitlines():
            held_out |= runs(line.replace("\\n", "\n"))
    assert held_out
    assert not [row["id"] for row in demo_text()[1] if not held_out.isdisjoint(runs(row["text"]))]


def test_the_block_held_back_is_never_seen():
    rows = [np.arange(100, 130, dtype=np.int32), np.arange(55, dtype=np.int32)]
    blocks = Blocks(rows, [1.0, 3.0], 10, 40, hold=True)
    assert blocks.held is not None and blocks.held.tolist() == list(range(45, 55))
    seen = set(blocks[:].flatten().tolist())
    assert seen == {*range(40), *range(100, 130)}, "whole blocks, of what is left"
    assert Blocks(rows, [1.0, 3.0], 10, 40).held is None
