"""The benchmarks at a tiny size: every part runs, and its numbers are what they are called."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.evaluation import student_of
from helpers.scripts import SCRIPTS, linux, runner
from helpers.tiny import save_source, tiny_model

from linearize.evaluation import speed

# peft asks the model for a name that transformers calls deprecated.
quiet_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
MIXER = {"name": "gla", "combine": "memory", "window": 8, "sinks": 2}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Of a model with two layers."""
    source = save_source(tmp_path / "source", layers=2)
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps({"source": {"id": str(source)}, "convert": {"mixer": MIXER}}))
    return file


@linux
def test_the_decoding_benchmark(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner("bench_decode", tmp_path, monkeypatch)
    monkeypatch.setattr(speed, "process_peak", lambda *_: {"peak_bytes": 10**8})
    sizes = ["--contexts", "64", "--batches", "1", "--dtypes", "float32", "--long", "100", "--piece", "24"]
    results = run("--recipe", recipe, *sizes, "--steps", "3")
    assert results["environment"]["threads"] == 1 and results["mixer"] == MIXER
    cells = {cell["kind"]: cell for cell in results["cells"] if cell["part"] == "bench"}
    # 2 layers, 2 heads of 16 for keys and for values, 4 bytes
    assert cells["source"]["cache_bytes"] == 64 * 2 * 2 * (16 + 16) * 4
    assert cells["student"]["cache_bytes"] < cells["source"]["cache_bytes"]
    assert all(cell["token_seconds"] > 0 and cell["peak_bytes"] == 10**8 for cell in cells.values())
    (long,) = (cell for cell in results["cells"] if cell["part"] == "long")
    assert long["context"] == 100 and long["peak_bytes"] > 50e6
    assert "| float32 | 1 | 64 |" in (tmp_path / "tiny.md").read_text()
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_the_benchmark_of_states(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner("bench_states", tmp_path, monkeypatch)
    results = run("--recipe", recipe, "--tokens", "300", "--turns", "4", "--answer", "4", "--repeats", "1")
    read = {cell["store"]: cell["again"] for cell in results["cells"] if cell["part"] == "chat"}
    assert read["memory"] == read["folder"] < read["none"] / 4
    assert {cell["kind"] for cell in results["cells"] if cell["part"] == "resume"} == {"read", "save", "load"}
    assert [claim["limit"] for claim in results["claims"]] == ["≤ 0.05", "≤ 0.05", "≤ 0.02"]
    assert "| folder |" in (tmp_path / "tiny.md").read_text()


def test_the_benchmark_of_packed_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner("bench_packed", tmp_path, monkeypatch)
    results = run("--longest", "90", "--texts", "6", "--short", "10", "--mixers", "gla", "--repeats", "1")
    tokens = {cell["row"]: cell["tokens"] for cell in results["cells"]}
    assert tokens == {"padded to the longest": 7 * 90, "rows of like length": 150, "one text": 150}
    assert [claim["limit"] for claim in results["claims"]] == ["≤ 1.3", "≤ 0.2"]
    assert "| gla | rows of like length | 150 |" in (tmp_path / "tiny.md").read_text()


@linux
def test_the_benchmark_of_recurrences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner("bench_ops", tmp_path, monkeypatch)
    rows = ["--rows", "additive channel", "naive", "mixer gla", "--lengths", "256", "--heads", "4", "2"]
    results = run(*rows, "--repeats", "3", "--naive", "128", "--naive-once", "256", "--no-memory")
    assert results["environment"]["threads"] == 1 and results["environment"]["seed"] == 0
    cells = {(cell["part"], cell["row"]): cell for cell in results["cells"]}
    assert cells["time", "additive channel"]["samples"] == 3 and cells["time", "naive"]["samples"] == 1
    # Ten times as much: chunks matter even here.
    assert cells["time", "naive"]["seconds"] > cells["time", "additive channel"]["seconds"]
    assert cells["decode", "mixer gla"]["seconds"] > 0 and cells["decode", "softmax"]["seconds"] > 0
    assert "| additive channel |" in (tmp_path / "tiny.md").read_text()


@linux
@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_common

    command = [sys.executable, str(SCRIPTS / "bench_ops.py"), "--rows", "additive channel", "--lengths", "256"]
    command += ["--repeats", "1", "--threads", "1", "--out", str(tmp_path), "--name", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "tiny.json").read_text())["cells"]
    size = bench_common.find(cells, "peak_bytes", part="memory")
    # At least the gradients of q, k and v: 3 times 9 heads of 64, 4 bytes.
    assert size is not None and 256 * 3 * 9 * 64 * 4 < size < 100e6


@pytest.mark.parametrize("row", ["softmax", "window", "additive none", "additive scalar", "delta none", "diagonal"])
def test_every_recurrence_can_be_passed(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner("bench_ops", tmp_path, monkeypatch)
    sizes = ["--lengths", "80", "--heads", "4", "2", "--width", "8", "--repeats", "1", "--no-memory"]
    (cell,) = run("--rows", row, *sizes)["cells"]
    assert (cell["row"], cell["length"]) == (row, 80) and cell["seconds"] > 0


def test_a_row_of_clusters_has_as_many_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_ops

    given = argparse.Namespace(heads=[9, 3], width=64, device="cpu")
    mixers = [bench_ops.mixer_of(row.removeprefix("mixer "), given) for row in bench_ops.CLUSTER_ROWS]
    assert [mixer.config.clusters for mixer in mixers] == [176, 352, 704, 1408]
    assert {mixer.config.window for mixer in mixers} == {bench_ops.WINDOW}


def test_claims_of_the_recurrences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_ops

    times = {"softmax": 10.0, "additive channel": 6.0, "naive": 130.0}
    cells = [{"part": "time", "row": row, "length": 4096, "seconds": s} for row, s in times.items()]
    cells += [
        {"part": "memory", "row": "additive channel", "length": length, "peak_bytes": size}
        for length, size in ((4096, 100), (16384, 430))
    ]
    claims = {claim["claim"]: (claim["limit"], claim["value"], claim["holds"]) for claim in bench_ops.claims(cells)}
    assert claims == {
        "additive channel: time over softmax's at 4096": ("≤ 0.5", 0.6, False),
        "naive: time over additive channel's at 4096": ("≥ 20", 21.6667, True),
        "additive channel: memory at 16384 over 4096": ("≤ 4.4", 4.3, True),
    }


def test_claims_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_decode

    at = {"part": "bench", "dtype": "float32", "batch": 1}
    cells = [
        at | {"kind": kind, "context": 8192, "token_seconds": time, "prefill_seconds": 2 * time, "cache_bytes": size}
        for kind, time, size in (("source", 3.0, 500), ("window", 1.0, 5), ("student", 2.0, 5))
    ]
    cells += [{**cells[0], "dtype": "bfloat16", "token_seconds": 99.0}]
    claims = {claim["claim"]: (claim["value"], claim["holds"]) for claim in bench_decode.claims(cells)}
    assert claims == {
        "speed over the source at 8192": (1.5, False),
        "time over the window control at 8192": (2.0, False),
        "prefill time over the source's at 8192": (0.6667, True),
    }


@pytest.mark.slow
def test_what_a_comparison_costs(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = student_of(llama_folder, tmp_path / "student")
    run = runner("bench_eval", tmp_path, monkeypatch)
    results = run(folder, "--tasks", "embedded_arc_easy", "--limit", "2", "--repeats", "1")
    samples = {name: times["samples"] for name, times in results["seconds"].items()}
    assert samples == {"linearize eval": 1, "lm_eval": 1}
    ours, theirs = (times["seconds"] for times in results["seconds"].values())
    assert results["claims"][0]["value"] == round(ours / theirs, 4)


@linux
def test_what_a_conversion_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner("bench_convert", tmp_path, monkeypatch)
    sizes = ["--shape", "tiny", "--cast-shape", "tiny", "--shard-bytes", "50000", "--repeats", "1"]
    results = run(*sizes, "--folder", tmp_path / "scratch")
    assert set(results["runs"]) == {"cp -r", "convert", "convert --link", "convert --dtype float16"}
    assert results["ratio"] == results["runs"]["convert"]["seconds"] / results["runs"]["cp -r"]["seconds"]
    assert results["runs"]["convert"]["peak_rss"] > 50e6 and not (tmp_path / "scratch").exists()
    assert "| convert --link | tiny |" in (tmp_path / "tiny.md").read_text()


@quiet_peft
def test_every_row_of_the_training_benchmark_takes_the_step_that_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_train

    from linearize.recipe.schema import Stage

    source, mixer = tiny_model(layers=2), {"name": "gla", "window": 8, "sinks": 2}
    before = {name: weight.clone() for name, weight in source.named_parameters()}
    ids = torch.randint(3, 300, (1, 40))
    models = {row: bench_train.Trained(source, row, mixer, Stage(lr=1e-2)) for row in bench_train.ROWS}
    trained = {row: [weight.shape for weight in model.weights] for row, model in models.items()}
    # LoRA of rank 8 on q, k, v, o of two layers, two matrices each, on the source as on the others.
    assert all(len(shapes) == 2 * 4 * 2 for shapes in trained.values())
    assert all(sorted(shapes) == sorted(trained["source"]) for shapes in trained.values())

    losses = {row: [model.step(part) for part in (ids[:, :10], ids, ids)] for row, model in models.items()}
    with torch.no_grad():
        plain = float(source(ids[:, :10], labels=ids[:, :10]).loss)
    for row in ("source", "window", "student"):
        # Window and sinks are 10 tokens: within them all have the source's attention; 1e-5 is fp32's rounding.
        assert losses[row][0] == pytest.approx(plain, rel=1e-5)
        assert losses[row][2] < losses[row][1]
    assert losses["student+kl"][0] == pytest.approx(0, abs=1e-5)
    assert losses["student+kl"][2] < losses["student+kl"][1]
    assert all(torch.equal(weight, before[name]) for name, weight in source.named_parameters())


@linux
@quiet_peft
def test_the_training_benchmark_writes_times_and_memory(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner("bench_train", tmp_path, monkeypatch)
    results = run("--recipe", recipe, "--lengths", "128", "--rows", "student+kl", "--repeats", "2")
    memory, time = results["cells"]
    assert (time["part"], time["row"], time["samples"]) == ("time", "student+kl", 2) and time["seconds"] > 0
    # At least the logits of student and source on top of what is held: 128 times 384, 4 bytes.
    assert memory["held_bytes"] + 2 * 128 * 384 * 4 < memory["peak_bytes"]
    assert "| student+kl |" in (tmp_path / "tiny.md").read_text()


def test_claims_of_the_training_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_train

    cells = [
        {"part": "time", "row": row, "length": length, "seconds": seconds}
        for row, length, seconds in (("source", 1024, 1.0), ("student", 1024, 1.2), ("source", 4096, 10.0))
    ]
    cells += [
        {"part": "memory", "row": row, "length": 512, "peak_bytes": size}
        for row, size in (("student", 100), ("student+kl", 125))
    ]
    claims = {claim["claim"]: (claim["limit"], claim["value"], claim["holds"]) for claim in bench_train.claims(cells)}
    assert claims == {
        "student: time of a step over the source's at 1024": ("≤ 1.15", 1.2, False),
        "student: peak memory with a teacher over without at 512": ("≤ 1.25", 1.25, True),
    }


def test_the_check_of_the_kernels_asks_for_a_gpu_before_it_installs_anything(tmp_path: Path) -> None:
    silent = tmp_path / "nvidia-smi"
    silent.write_text("#!/bin/sh\nexit 9\n")
    silent.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SCRIPTS / "gpu_check.sh")], env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "There is no NVIDIA GPU here" in done.stderr
