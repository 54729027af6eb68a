"""The source is asked once: what it said is found again by any run, damaged files are noticed, bits stay the same."""

import errno
import json
import os
import signal
import time
from contextlib import nullcontext

import pytest
import torch
from helpers.tiny import MIXER, save_converted, tiny_tokenizer
from helpers.training import losses, recipe_for, start, weights, without_times

from linearize.checkpoint.open import open_model
from linearize.errors import InputError
from linearize.recipe import load as recipes
from linearize.recovery import teacher
from linearize.recovery.losses import likeliest
from linearize.recovery.monitor import read_log
from linearize.recovery.teacher import Known, Teacher
from linearize.recovery.train import train

K = 20


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """No block of it comes twice."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text(json.dumps({"text": " ".join(map(str, range(400)))}))
    return file


@pytest.fixture
def asked(monkeypatch):
    """One entry per time the source ran: how many tokens it read."""
    found, run = [], Teacher.logits

    def count(self, ids, **keep):
        found.append(ids.numel())
        return run(self, ids, **keep)

    monkeypatch.setattr(Teacher, "logits", count)
    return found


def files(folder):
    return sorted(folder.glob("source-*/*"))


def test_the_source_runs_once_per_block(converted, text, tmp_path, folder, asked, capsys):
    wanted = recipe_for(text, steps=12, lm=0.5, top_k=K, temperature=1.5)
    train(converted, wanted, None, tmp_path / "one")
    blocks = len(files(folder))
    assert asked == [32] * blocks and blocks < 12 * 4  # the run passes over its data more than once
    del asked[:]
    train(converted, wanted, None, tmp_path / "two")
    assert not asked and f"{K} likeliest tokens: {blocks} of {blocks} blocks known" in capsys.readouterr().err
    assert without_times(tmp_path / "one" / "train_log.jsonl") == without_times(tmp_path / "two" / "train_log.jsonl")
    # Another seed, another student, another way to divide a step, a weaker adapter: the same source.
    train(converted, recipe_for(text, steps=2, top_k=K, temperature=1.5, seed=3), None, tmp_path / "seed")
    other = save_converted(tmp_path / "other", {**MIXER, "window": 4})
    train(other, recipe_for(text, steps=2, top_k=K, temperature=1.5, micro_batch=4), None, tmp_path / "student")
    train(converted, recipe_for(text, steps=2, top_k=K, temperature=1.5, peft=None), None, tmp_path / "whole")
    assert not asked
    for change in ({"temperature": 1.0}, {"top_k": 3}, {"dtype": "bfloat16"}, {"seq_len": 16, "temperature": 1.5}):
        train(
            converted, recipe_for(text, steps=1, **{"top_k": K, **change}), None, tmp_path / "changed", overwrite=True
        )
        assert asked, change
        del asked[:]


def test_another_source_is_not_mixed_up(converted, text, tmp_path, asked):
    train(converted, recipe_for(text, steps=1, top_k=K), None, tmp_path / "one")
    del asked[:]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.lm_head.weight[5, 7] += 0.1
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    train(tmp_path / "other", recipe_for(text, steps=1, top_k=K), None, tmp_path / "two")
    assert len(asked) == 4


def test_all_tokens_give_the_dense_losses(converted, text, tmp_path):
    train(converted, recipe_for(text, lm=1.0), None, tmp_path / "dense")
    train(converted, recipe_for(text, lm=1.0, top_k=384), None, tmp_path / "kept")
    # fp16 has 11 bits: log probabilities of about 8 are off by 0.004 at most, and in both directions.
    torch.testing.assert_close(losses(tmp_path / "kept"), losses(tmp_path / "dense"), rtol=0, atol=2e-3)
    few = train(converted, recipe_for(text, lm=1.0, top_k=2), None, tmp_path / "few")
    assert (losses(few)[:, 1] < losses(tmp_path / "dense")[:, 1]).all() and (losses(few)[:, 1] > 0).all()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(converted, text, tmp_path, folder, monkeypatch):
    wanted = recipe_for(text, steps=40, top_k=K, peft={"r": 4, "alpha": 8, "dropout": 0.1})
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(wanted))
    out, work = tmp_path / "killed", tmp_path / "killed.training"
    arguments = ("--recipe", tmp_path / "recipe.yaml", "--model", converted, "--out", out)
    process = start(*arguments)
    deadline = time.monotonic() + 120
    while len(read_log(work / "train_log.jsonl")) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and files(folder)
    train(converted, wanted, None, out, resume=True)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "another"))
    train(converted, wanted, None, tmp_path / "whole")
    assert without_times(out / "train_log.jsonl") == without_times(tmp_path / "whole" / "train_log.jsonl")
    assert all(torch.equal(weights(out)[name], weight) for name, weight in weights(tmp_path / "whole").items())
    assert [f.read_bytes() for f in files(folder)] == [f.read_bytes() for f in files(tmp_path / "another")]


def known(folder, calls, k=5):
    """On a source that says the same of every token."""

    def run(ids):
        calls.append(ids)
        return torch.arange(50.0).mul(0.3).sin().expand(1, ids.shape[1], -1)

    found = Known(folder / "source-x", k, 2.0, run)
    found.prepare([])
    return found


def test_damaged_files_are_written_anew(folder, capsys):
    calls = []
    ids = torch.arange(24).view(3, 8)
    source = known(folder, calls)
    first = source(ids)
    expected = likeliest(torch.arange(50.0).mul(0.3).sin().expand(3, 8, -1), 5, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True)) and len(calls) == 3
    whole = [file.read_bytes() for file in files(folder)]
    flipped = bytearray(whole[1])
    flipped[-3] ^= 4
    for file, content in zip(files(folder), (whole[0][:-20], bytes(flipped), b""), strict=True):
        file.write_bytes(content)
    again = source(ids)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)) and len(calls) == 6
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.endswith("is damaged, so the source reads this block again") for line in lines)
    assert [file.read_bytes() for file in files(folder)] == whole
    assert len(known(folder, calls)(ids)) == 3 and len(calls) == 6


def test_a_disk_that_cannot_keep_it_is_one_paragraph(folder, monkeypatch, tmp_path):
    source = known(folder, [])

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(InputError, match="cannot be kept there .No space left on device.; free some space"):
            source(torch.arange(8)[None])
    assert source.prepare([torch.arange(8), torch.arange(8)]) == (0, 1)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="the result needs .* free"):
        patch.setattr("linearize.checkpoint.atomic.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
        source.prepare([torch.arange(8)])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be kept there"):
        known(tmp_path / "file", [])


def test_where_weights_are_divided_all_processes_run_the_source_or_none(folder):
    calls = []
    ids = torch.arange(16).view(2, 8)
    known(folder, calls)(ids)
    del calls[:]
    alone, beside = known(folder, calls), known(folder, calls)
    beside.any_process = lambda mine: True  # another process misses a block
    alone(ids)
    assert not calls
    beside(ids)
    assert len(calls) == 2


def test_wishes_that_make_no_sense_are_named(converted, text, tmp_path):
    for change in ({"kl": 0.0, "lm": 1.0}, {"transfer": 1.0}):
        with pytest.raises(InputError, match="top_k is about kl"):
            recipe_for(text, top_k=4, **change)
    with pytest.raises(InputError, match="distil.top_k: found 385; expected at most the vocabulary, 384"):
        train(converted, recipe_for(text, top_k=385), None, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_only_the_main_process_reads_the_weights_to_name_the_folder(converted, text, monkeypatch, folder):
    """The others are told the name."""
    stage = recipe_for(text, top_k=K).train[0]
    student = open_model(converted)

    def folder_of(is_main):
        made = Teacher(student, stage, converted, torch.device("cpu"), nullcontext, [], bool, is_main)
        assert made.known is not None
        return made.known.folder

    monkeypatch.setattr(teacher.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(teacher.distributed, "broadcast_object_list", lambda values: None)
    assert len(folder_of(True).name) == len("source-") + 32
    monkeypatch.setattr(teacher.distributed, "broadcast_object_list", lambda values: values.__setitem__(0, "told"))
    monkeypatch.setattr(teacher.shards, "read_folder", lambda *_: pytest.fail("read the weights"))
    assert folder_of(False) == folder / "source-told"
