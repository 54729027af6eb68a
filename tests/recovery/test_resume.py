"""Interrupted runs go on to the same bits, and no weight is dropped in silence on the way."""

import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.training import command_line, recipe_for, start, weights, without_times
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import save

from linearize.errors import InputError
from linearize.recipe import load as recipes
from linearize.recovery import loop as training_loop
from linearize.recovery import train as training
from linearize.recovery.memory import Watch
from linearize.recovery.monitor import read_log
from linearize.recovery.resume import Checkpoints
from linearize.recovery.train import train


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(converted, text, tmp_path):
    # Dropout, so that the state of the random numbers matters; several passes over the data, so that their order does.
    wanted = recipe_for(text, steps=40, peft={"r": 4, "alpha": 8, "dropout": 0.1})
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(wanted))
    out, work = tmp_path / "killed", tmp_path / "killed.training"
    arguments = ("--recipe", tmp_path / "recipe.yaml", "--model", converted, "--out", out)
    process = start(*arguments)
    deadline = time.monotonic() + 120
    while len(read_log(work / "train_log.jsonl")) < 7 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    with (work / "train_log.jsonl").open("a") as log:
        log.write('{"step": 99')  # a line that the kill cut short
    checkpoints = sorted(path.name for path in (work / "checkpoints").iterdir() if path.name != "unfinished")
    assert len(checkpoints) == 2 and checkpoints[-1] != "step-00000040"

    process = start(*arguments, "--resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not work.exists()
    train(converted, wanted, None, tmp_path / "whole")
    assert without_times(out / "train_log.jsonl") == without_times(tmp_path / "whole" / "train_log.jsonl")
    expected = weights(tmp_path / "whole")
    assert expected.keys() == weights(out).keys()
    assert all(torch.equal(weights(out)[name], weight) for name, weight in expected.items())


@pytest.fixture
def interrupted(converted, text, tmp_path, monkeypatch):
    """A run of 4 steps that stopped in its fourth; the settings and the folder it would have made."""
    step = training_loop.Loop.step

    def stop(loop, number, checkpoint):
        if number == 4:
            raise KeyboardInterrupt
        return step(loop, number, checkpoint)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_loop.Loop, "step", stop)
        train(converted, recipe_for(text), None, out)
    assert not out.exists() and (tmp_path / "out.training" / "checkpoints" / "step-00000002").is_dir()
    return out


def test_an_interrupted_run_is_neither_forgotten_nor_mixed_up(interrupted, converted, text):
    with pytest.raises(InputError, match="interrupted run that --resume goes on with"):
        train(converted, recipe_for(text), None, interrupted)
    with pytest.raises(InputError, match=r"other settings \(lr\); pass --overwrite"):
        train(converted, recipe_for(text, lr=1e-4), None, interrupted, resume=True)
    train(converted, recipe_for(text, micro_batch=1, save_every=1), None, interrupted, resume=True)
    assert [line["step"] for line in read_log(interrupted / "train_log.jsonl")] == [1, 2, 3, 4]


def test_overwrite_starts_an_interrupted_run_anew(interrupted, converted, text):
    train(converted, recipe_for(text, steps=2, lr=1e-4), None, interrupted, overwrite=True)
    assert [line["step"] for line in read_log(interrupted / "train_log.jsonl")] == [1, 2]


def test_resuming_a_finished_run_changes_nothing_and_another_run_needs_overwrite(converted, text, tmp_path, capsys):
    out = train(converted, recipe_for(text, steps=1), None, tmp_path / "out", resume=True)
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert train(converted, recipe_for(text, steps=1), None, out, resume=True) == out
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="exists"):
        train(converted, recipe_for(text, steps=1), None, out)
    with pytest.raises(InputError, match="exists"):
        train(converted, recipe_for(text, steps=1, lr=1e-4), None, out, resume=True)
    train(converted, recipe_for(text, steps=1, lr=1e-4), None, out, overwrite=True)
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns != before


def test_an_interrupt_says_how_to_go_on(converted, text, tmp_path, monkeypatch, capsys):
    step = training_loop.Loop.step

    def interrupt(loop, number, checkpoint):
        if number == 4:
            raise KeyboardInterrupt
        return step(loop, number, checkpoint)

    monkeypatch.setattr(training_loop.Loop, "step", interrupt)
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(recipe_for(text)))
    words = ["train", converted, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out"]
    assert command_line(monkeypatch, *words) == 130
    errors = capsys.readouterr().err
    assert "--resume goes on from the last checkpoint" in errors and "out.training/checkpoints/step-00000002" in errors


# --- nothing is dropped in silence ---


def renamed(file: Path) -> str:
    """Give the first tensor of a file another name; returns the old one."""
    with safe_open(file, "pt") as content:
        facts = content.metadata()
    tensors = load_file(file)
    name = min(tensors)
    tensors["another.weight"] = tensors.pop(name)
    save_file(tensors, file, facts)
    return re.escape(name)


def test_a_checkpoint_of_other_weights_is_refused(interrupted, converted, text):
    file = interrupted.with_name("out.training") / "checkpoints" / "step-00000002" / "trained.safetensors"
    name = renamed(file)
    with pytest.raises(InputError, match=rf"unknown: another.weight .*; missing: {name} .*--overwrite"):
        train(converted, recipe_for(text), None, interrupted, resume=True)


def test_best_weights_of_another_model_are_refused(tmp_path):
    watch = Watch(None, {"a": torch.zeros(2), "b": torch.zeros(2)}, torch.zeros(4), "loss", tmp_path)
    with pytest.raises(InputError, match="the weights to keep are gone"):
        watch.restore()
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, watch.file, {"score": "1.0", "step": "3"})
    with pytest.raises(InputError, match=r"unknown: b \[1\]; missing: b \[2\]"):
        watch.restore()
    assert not watch.trained["a"].any(), "nothing is copied"
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, watch.file, {"score": "1.0", "step": "3"})
    assert watch.restore() == 3 and bool(watch.trained["b"].all())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_of_other_weights_is_refused(tmp_path):
    """torch itself refuses one that lacks weights, and passes over weights that the model does not have."""
    plain = torch.nn.Linear(2, 2)
    state = {"model": {**plain.state_dict(), "extra": torch.zeros(1)}}
    save(state, checkpoint_id=tmp_path / "step-00000002" / "pytorch_model_fsdp_0", no_dist=True)
    loop = SimpleNamespace(plain=plain, divided=True, accelerator=SimpleNamespace(load_state=lambda folder: None))
    with pytest.raises(InputError, match=r"pytorch_model_fsdp_0: .*unknown: model.extra"):
        Checkpoints(loop, tmp_path).load(tmp_path / "step-00000002")
    loop.plain = torch.nn.Module()
    loop.plain.extra, loop.plain.weight, loop.plain.bias = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    assert Checkpoints(loop, tmp_path).load(tmp_path / "step-00000002") == 2


def test_weights_that_do_not_come_together_are_no_result(converted, text, tmp_path, monkeypatch):
    whole = training.Accelerator.get_state_dict

    def without(accelerator, model, **keywords):
        state = whole(accelerator, model, **keywords)
        return {name: weight for name, weight in state.items() if "layers.1" not in name or "q_proj.lora_A" not in name}

    monkeypatch.setattr(training.Accelerator, "get_state_dict", without)
    with pytest.raises(InputError, match=r"trained model: .*missing: \S+layers.1.self_attn.q_proj.lora_A\S+; resume"):
        train(converted, recipe_for(text), None, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.training" / "checkpoints").is_dir()


def test_a_wrapper_that_renames_weights_is_refused_before_the_first_step(converted, text, tmp_path, monkeypatch):
    prepare = training.Accelerator.prepare

    def renaming(accelerator, model, *others):
        model.get_submodule("base_model.model.model").layers = torch.nn.ModuleDict(
            {f"wrapped_{i}": layer for i, layer in enumerate(model.base_model.model.model.layers)}
        )
        return prepare(accelerator, model, *others)

    monkeypatch.setattr(training.Accelerator, "prepare", renaming)
    with pytest.raises(InputError, match="as the launcher has wrapped it: .*fsdp_version: 2"):
        train(converted, recipe_for(text), None, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
