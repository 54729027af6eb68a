"""The benchmarks of training at a tiny size: a step's time and memory, and learning curves."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.scripts import SCRIPTS, linux
from helpers.tiny import TEXT, tiny_model

# peft asks the model for a name that transformers calls deprecated.
quiet_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@quiet_peft
def test_every_row_of_the_training_benchmark_takes_the_step_that_it_is_called(monkeypatch):
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
def test_the_training_benchmark_writes_times_and_memory(llama_folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    import bench_decode
    import bench_train

    monkeypatch.setattr(bench_decode, "validation_text", lambda: TEXT)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps({"source": {"id": str(llama_folder)}}))
    options = ["--recipe", str(recipe), "--threads", "1", "--repeats", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["", *options, "--lengths", "128", "--rows", "student+kl"])
    bench_train.main()
    memory, time = json.loads((tmp_path / "bench-train.json").read_text())["cells"]
    assert (time["part"], time["row"], time["samples"]) == ("time", "student+kl", 2) and time["seconds"] > 0
    # At least the logits of student and source on top of what is held: 128 times 384, 4 bytes.
    assert memory["held_bytes"] + 2 * 128 * 384 * 4 < memory["peak_bytes"]
    assert "| student+kl |" in (tmp_path / "bench-train.md").read_text()


def test_claims_of_the_training_benchmark(monkeypatch):
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
    found = {claim["claim"]: (claim["limit"], claim["value"], claim["holds"]) for claim in bench_train.claims(cells)}
    assert found == {
        "student: time of a step over the source's at 1024": ("≤ 1.15", 1.2, False),
        "student: peak memory with a teacher over without at 512": ("≤ 1.25", 1.25, True),
    }


@pytest.fixture
def curves(llama_folder: Path, tmp_path: Path, monkeypatch):
    """learning_curves.py on a tiny model: called with options, returns its results."""
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(SCRIPTS)
    import learning_curves

    monkeypatch.setattr(learning_curves, "validation_text", lambda: TEXT * 2)
    (tmp_path / "text.txt").write_text(TEXT * 8)
    stage = {"name": "distil", "tokens": 192, "seq_len": 32, "batch": 2, "micro_batch": 2, "lr": 1e-2}
    mixer = {"name": "gla", "window": 8, "sinks": 2}
    base = {"source": {"id": str(llama_folder)}, "convert": {"mixer": mixer}, "train": [stage]}
    base["data"] = [{"path": str(tmp_path / "text.txt")}]
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    stages = [{**stage, "name": "transfer", "transfer": 1.0, "kl": 0.0, "tokens": 64}, {**stage, "tokens": 128}]
    variants = {
        "window of 4": {"convert.mixer.window": 4},
        "all": {"calibrate": {"tokens": 64, "seq_len": 32}, "train": stages},
    }

    def run(*options: str) -> dict:
        file = tmp_path / "variants.yaml"
        file.write_text(json.dumps({"recipe": str(tmp_path / "base.yaml"), "variants": variants}))
        sizes = ["--every", "2", "--length", "64", "--blocks", "2", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["", "--variants", str(file), "--out", str(tmp_path), *sizes, *options])
        learning_curves.main()
        return json.loads((tmp_path / "learning-curves.json").read_text())

    run.variants = variants  # type: ignore[attr-defined]
    return run


def test_learning_curves_are_those_of_the_stages_and_finished_ones_are_kept(curves, tmp_path: Path):
    import learning_curves
    from transformers import AutoModelForCausalLM
    from zero_training import value

    from linearize.checkpoint.sources import load_source, locate
    from linearize.conversion.convert import convert
    from linearize.evaluation import perplexity
    from linearize.recipe import load as recipes
    from linearize.recovery.calibrate import calibrate
    from linearize.recovery.train import train

    results = curves("--only", "all")
    points = results["variants"]["all"]["points"]
    # 64 of calibration, then steps 0 and 1 of transfer, then 1 and 2 of distillation, 64 tokens each.
    assert [(p["stage"], p["tokens"]) for p in points] == [
        *(("transfer", 64), ("transfer", 128)),
        *(("distil", 192), ("distil", 256)),
    ]
    wanted = learning_curves.variants(tmp_path / "variants.yaml", [], ["all"])["all"]
    located = locate(wanted.source.id)
    source, tokenizer = load_source(located, "float32")
    ids = perplexity.cut(learning_curves.validation_text(), tokenizer, 64, 2)
    folder = convert(located, wanted, tmp_path / "converted")
    folder = calibrate(folder, wanted, tmp_path / "calibrated")
    for stage in wanted.train:
        folder = train(folder, wanted, stage.name, tmp_path / stage.name)
    # The library's own run of the recipe, stopped to be measured nowhere: the same to the last bit.
    assert value(AutoModelForCausalLM.from_pretrained(folder).eval(), ids) == points[-1]["perplexity"]
    assert results["lines"]["source"] == value(source, ids)
    assert recipes.from_dict(results["variants"]["all"]["recipe"]) == wanted

    target = tmp_path / "learning-curves.json"
    points[0]["perplexity"] = 1234.5
    target.write_text(json.dumps(results))
    results = curves()
    assert results["variants"]["all"]["points"][0]["perplexity"] == 1234.5
    assert [p["tokens"] for p in results["variants"]["window of 4"]["points"]] == [0, 64, 128, 192]
    assert set(results["lines"]) == {"source", "window 8, 2 sinks", "window 4, 2 sinks"}
    assert "| all | 64 | 192 | 1234.50 |" in target.with_suffix(".md").read_text()
    assert target.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"train.distil.tokens": 256}, [], "all: tokens of all stages: found 192, other variants have 256"),
        ({"data.0.weight": 2.0}, [], "all: data: found"),
        ({}, ["--only", "al"], "unknown variant 'al'. Did you mean 'all'"),
    ],
)
def test_curves_that_say_nothing_are_refused(curves, changes: dict, options: list[str], expected: str):
    curves.variants["window of 4"] = changes
    with pytest.raises(SystemExit, match=expected):
        curves(*options)
