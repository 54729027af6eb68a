"""What may change, fill up, be held by another process or be set by a launcher while models are recovered."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.tiny import TEXT, save_converted, save_source
from helpers.training import recipe_for, weights
from safetensors.torch import load_file, save_file

from linearize import pipeline
from linearize.checkpoint import atomic
from linearize.errors import InputError
from linearize.recipe import load as recipes
from linearize.recovery import loop as training_loop
from linearize.recovery import resume
from linearize.recovery import train as training
from linearize.recovery.calibrate import calibrate
from linearize.recovery.merge import merge
from linearize.recovery.monitor import read_log
from linearize.recovery.select import select
from linearize.recovery.train import train


def other_weights(folder: Path) -> None:
    """Change a weight; size and time stay."""
    file = folder / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def other_text(file: Path) -> None:
    before, content = file.stat(), file.read_text()
    file.write_text(content.replace("river", "brook"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and "river" in content


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": TEXT + str(i)}) + "\n" for i in range(20)))
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_converted(tmp_path / "converted")


def stop_at(monkeypatch: pytest.MonkeyPatch, last: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    step = training_loop.Loop.step

    def stop(loop, number, checkpoint):
        if number == last:
            raise error
        return step(loop, number, checkpoint)

    monkeypatch.setattr(training_loop.Loop, "step", stop)


# --- what a run reads has changed ---


@pytest.mark.parametrize(
    ("change", "named"), [(other_text, "the content of data"), (other_weights, "the content of model"), (None, "")]
)
@pytest.mark.parametrize("finished", [False, True])
def test_resume_notices_other_files_under_the_same_name(model, text, tmp_path, monkeypatch, change, named, finished):
    out = tmp_path / "out"
    if finished:
        train(model, recipe_for(text, steps=1), None, out)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, 4)
            train(model, recipe_for(text), None, out)
    if change is None:
        if finished:
            text.unlink()  # what is not there any more is no reason to do the work again
        train(model, recipe_for(text, steps=1 if finished else 4), None, out, resume=True)
        return
    change(text if change is other_text else model)
    with pytest.raises(InputError, match="exists and is not empty" if finished else rf"other settings \({named}\)"):
        train(model, recipe_for(text, steps=1 if finished else 4), None, out, resume=True)


def test_resume_notices_that_the_model_of_adapters_has_changed(model, text, tmp_path, monkeypatch):
    first = train(model, recipe_for(text, steps=1), None, tmp_path / "first")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 4)
        train(first, recipe_for(text), None, tmp_path / "out")
    other_weights(model)
    with pytest.raises(InputError, match="the content of model"):
        train(first, recipe_for(text), None, tmp_path / "out", resume=True)


def test_runs_of_earlier_versions_do_not_say_what_they_read():
    before = {"model": "a", "stage": {}, "data": []}
    now = {**before, "stage": {"window_dropout": 0}, "content": {"model": ["1"], "data": ["2"]}}
    assert resume.differences({**before, "stage": {"window_dropout": 0}}, now) == []


@pytest.mark.parametrize("kind", ["source", "data"])
def test_a_whole_run_notices_other_files_and_does_it_again_if_told_to(text, tmp_path, monkeypatch, kind):
    source = save_source(tmp_path / "source", layers=2)
    evaluated: list[bool] = []
    told = "linearize.evaluation.evaluate.evaluate"
    monkeypatch.setattr(told, lambda folder, **given: evaluated.append(given["resume"]) or {})
    values = recipes.to_dict(recipe_for(text, steps=1)) | {"source": {"id": str(source)}}
    values["convert"] = {"mixer": {"name": "gla", "combine": "memory", "window": 8, "sinks": 2}}
    wanted, out = recipes.from_dict(values), tmp_path / "run"
    pipeline.run(wanted, out, note=lambda line: None)
    pipeline.run(wanted, out, note=lambda line: None)
    before = weights(out / "1-distil")
    other_text(text) if kind == "data" else other_weights(source)
    first = "1-distil" if kind == "data" else "0-converted"
    with pytest.raises(InputError, match=rf"{first}: was made from other files: the content of {kind} has changed"):
        pipeline.run(wanted, out, note=lambda line: None)
    said: list[str] = []
    pipeline.run(wanted, out, overwrite=True, note=said.append)
    assert ["0-converted: finished" in "".join(said), evaluated] == [kind == "data", [False, True, False]]
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(out / "1-distil").items())
    shutil.rmtree(source)
    text.unlink()
    pipeline.run(wanted, out, note=lambda line: None)
    assert evaluated[-1], "sources that are gone have not changed"


# --- two processes on one output ---


@pytest.mark.parametrize("verb", ["train", "calibrate", "select", "run"])
def test_the_second_process_is_refused_before_it_touches_the_work_of_the_first(model, text, tmp_path, verb):
    out, wanted = tmp_path / "out", recipe_for(text, steps=1)
    work = tmp_path / "out.training" / "checkpoints" / "step-00000001"
    work.mkdir(parents=True)
    begin = {
        "train": lambda: train(model, wanted, None, out, overwrite=True),
        "calibrate": lambda: calibrate(model, wanted, out, overwrite=True),
        "select": lambda: select(model, wanted, out, overwrite=True),
        "run": lambda: pipeline.run(wanted, out, overwrite=True),
    }
    with atomic.locked(out), pytest.raises(InputError, match=rf"another process .*process {os.getpid()} on "):
        begin[verb]()
    assert work.is_dir() and not out.exists()


# --- disks ---


@pytest.mark.parametrize("where", ["checkpoint", "log", "result"])
def test_a_disk_that_fills_leaves_the_work_so_far(model, text, tmp_path, monkeypatch, where):
    full = OSError(errno.ENOSPC, "full", "/somewhere")

    def fail(*_, **__):
        raise full

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if where == "result":
            patch.setattr(training, "_write", fail)
        elif where == "log":
            patch.setattr(training.Monitor, "step", fail)
        else:
            save = torch.save
            patch.setattr(torch, "save", lambda *a, **k: fail() if calls.append(0) or len(calls) > 3 else save(*a, **k))
        calls: list[int] = []
        with pytest.raises(InputError, match="the disk became full .*No space left on device: /somewhere") as error:
            train(model, recipe_for(text), None, out)
        assert "\n" not in str(error.value)
    assert not out.exists()
    train(model, recipe_for(text), None, out, resume=True)
    assert [line["step"] for line in read_log(out / "train_log.jsonl")] == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*out.*"))


def test_a_damaged_checkpoint_is_named(model, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 4)
        train(model, recipe_for(text, save_every=1), None, tmp_path / "out")
    kept = sorted((tmp_path / "out.training" / "checkpoints").iterdir())
    (kept[-1] / "optimizer.bin").write_bytes(b"half")
    with pytest.raises(InputError, match=rf"{kept[-1].name}: is damaged .*remove this folder, and --resume goes on"):
        train(model, recipe_for(text, save_every=1), None, tmp_path / "out", resume=True)
    shutil.rmtree(kept[-1])
    train(model, recipe_for(text, save_every=1), None, tmp_path / "out", resume=True)


def test_a_kill_after_the_end_leaves_nothing_that_the_next_run_does_not_remove(model, text, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def stop(folder, **options):
        if str(folder).endswith(".training") and (tmp_path / "out").exists():
            raise KeyboardInterrupt
        remove(folder, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", stop)
        train(model, recipe_for(text, steps=1), None, tmp_path / "out")
    assert (tmp_path / "out.training").is_dir() and (tmp_path / "out").is_dir()
    train(model, recipe_for(text, steps=1), None, tmp_path / "out", resume=True)
    assert not list(tmp_path.glob("*out.*"))


def test_checkpoints_go_where_a_link_leads(model, text, tmp_path, monkeypatch):
    (tmp_path / "disk" / "target").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "target")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 4)
        train(model, recipe_for(text), None, tmp_path / "out")
    assert (tmp_path / "disk" / "target.training").is_dir()
    train(model, recipe_for(text), None, tmp_path / "out", resume=True)
    assert (tmp_path / "out").is_symlink() and [*(tmp_path / "disk").iterdir()] == [tmp_path / "disk" / "target"]


# --- results without logs ---


def pruned(folder: Path, *left: str) -> Path:
    for name in ("train_log.jsonl", "tb", *left):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@pytest.mark.parametrize("left", [(), ("linearize.json",), ("linearize.json", "recipe.yaml", "generation_config.json")])
def test_adapters_without_logs_are_merged_and_still_not_their_source(model, text, tmp_path, left):
    folder = pruned(train(model, recipe_for(text, steps=1), None, tmp_path / "adapters"), *left)
    merged = merge(folder, tmp_path / "merged")
    for trained in (merged, calibrate(merged, recipe_for(text), tmp_path / "calibrated", tokens=32, seq_len=32)):
        with pytest.raises(InputError, match="no longer the source's"):
            train(trained, recipe_for(text), None, tmp_path / "more")
    train(folder, recipe_for(text, steps=1), None, tmp_path / "further")


# --- launchers ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_DOWNCAST_BF16", "true"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.001"),
    ],
)
def test_the_recipe_decides_and_not_the_environment(model, text, tmp_path, monkeypatch, capsys, name, value):
    expected = weights(train(model, recipe_for(text, steps=2), None, tmp_path / "plain"))
    capsys.readouterr()
    monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    trained = weights(train(model, recipe_for(text, steps=2), None, tmp_path / "out"))
    assert all(torch.equal(trained[key], weight) for key, weight in expected.items())
    said = capsys.readouterr().err
    assert re.findall(r"ACCELERATE\S+ is left aside", said) == [f"{name}={value} is left aside"]


@pytest.mark.parametrize("name", ["ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"])
def test_what_this_training_cannot_do_is_refused(model, text, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(InputError, match=f"{name}: is set, and training knows DDP, FSDP and DeepSpeed only"):
        train(model, recipe_for(text), None, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("WORLD_SIZE", "2"),
        ("WORLD_SIZE", "two"),
        ("LOCAL_RANK", "0"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
    ],
)
def test_half_of_what_a_launcher_sets_is_one_paragraph(model, text, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr("accelerate.state.is_deepspeed_available", lambda: False)
    for each in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(each, "")  # so that what accelerate sets goes away again
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(InputError, match=rf"^{name}: the environment asks for processes.*unset"):
            train(model, recipe_for(text), None, tmp_path / "out")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# --- what can fit ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tokens": 10**15}, "the order of .* blocks"), ({"seq_len": 10**10, "tokens": 10**12}, "logits of 2 x 10,000,")],
)
def test_what_no_memory_holds_is_refused_before_the_work(model, text, tmp_path, changes, message):
    with pytest.raises(InputError, match=rf"{message}.* needs at least .* memory, and this machine has"):
        train(model, recipe_for(text, **changes), None, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("verb", [calibrate, select])
def test_text_that_no_memory_holds_is_refused_before_the_work(model, text, tmp_path, verb):
    with pytest.raises(InputError, match=r"tokens: 100,000,.* of them in one piece needs .* memory, and this machine"):
        verb(model, recipe_for(text), tmp_path / "out", tokens=10**14, seq_len=32)
    assert not list(tmp_path.glob("*out*"))
