"""The experiments on a tiny model: their numbers are the library's, and finished parts are kept."""

import json
from pathlib import Path

import pytest
from helpers.scripts import SCRIPTS, runner
from helpers.tiny import TEXT, save_source

RESULTS = SCRIPTS.parent / "eval" / "results"


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch):
    """The module, reading a short text."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_common
    import experiments

    monkeypatch.setattr(bench_common, "validation_text", lambda: TEXT * 2)
    return experiments


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A recipe of a tiny model, also in base.yaml."""
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    source = save_source(tmp_path / "source", layers=2)
    (tmp_path / "text.txt").write_text(TEXT * 8)
    stage = {"name": "distil", "tokens": 192, "seq_len": 32, "batch": 2, "micro_batch": 2, "lr": 1e-2}
    recipe = {"source": {"id": str(source)}, "convert": {"mixer": {"name": "gla", "window": 8, "sinks": 2}}}
    recipe |= {"data": [{"path": str(tmp_path / "text.txt")}], "train": [stage]}
    (tmp_path / "base.yaml").write_text(json.dumps(recipe))
    return recipe


@pytest.fixture
def curves(experiments, base: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`experiments.py curves`: called with options, returns its results; `curves.variants` may be changed before."""
    (stage,) = base["train"]
    stages = [{**stage, "name": "transfer", "transfer": 1.0, "kl": 0.0, "tokens": 64}, {**stage, "tokens": 128}]
    variants = {
        "window of 4": {"convert.mixer.window": 4},
        "all": {"calibrate": {"tokens": 64, "seq_len": 32}, "train": stages},
    }
    script = runner("experiments", tmp_path, monkeypatch)

    def run(*options: str) -> dict:
        file = tmp_path / "variants.yaml"
        file.write_text(json.dumps({"recipe": str(tmp_path / "base.yaml"), "variants": variants}))
        sizes = ["--every", "2", "--lengths", "64", "--blocks", "2", "--folder", tmp_path / "runs"]
        return script("curves", "--variants", file, *sizes, *options)

    run.variants = variants  # type: ignore[attr-defined]
    return run


def test_curves_are_those_of_the_stages_and_finished_ones_are_kept(curves, experiments, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

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
    wanted = experiments.variants(tmp_path / "variants.yaml", [], ["all"])["all"]
    located = locate(wanted.source.id)
    source, tokenizer = load_source(located, "float32")
    ids = perplexity.cut(TEXT * 2, tokenizer, 64, 2)
    folder = convert(located, wanted, tmp_path / "converted")
    folder = calibrate(folder, wanted, tmp_path / "calibrated")
    assert experiments.value(AutoModelForCausalLM.from_pretrained(folder).eval(), ids) == points[0]["perplexity"]
    for stage in wanted.train:
        folder = train(folder, wanted, stage.name, tmp_path / stage.name)
    # The library's own run of the recipe, measured nowhere: the same to the last bit.
    assert experiments.value(AutoModelForCausalLM.from_pretrained(folder).eval(), ids) == points[-1]["perplexity"]
    assert results["lines"]["source"] == experiments.value(source, ids)
    assert recipes.from_dict(results["variants"]["all"]["recipe"]) == wanted
    assert not list((tmp_path / "runs").iterdir())

    target = tmp_path / "tiny.json"
    points[0]["perplexity"] = 1234.5
    target.write_text(json.dumps(results))
    results = curves()
    assert results["variants"]["all"]["points"][0]["perplexity"] == 1234.5
    assert [p["tokens"] for p in results["variants"]["window of 4"]["points"]] == [0, 64, 128, 192]
    assert set(results["lines"]) == {"source", "window 8, 2 sinks", "window 4, 2 sinks"}
    assert "| all | 64 | 192 | 1234.50 |" in target.with_suffix(".md").read_text()
    assert target.with_suffix(".png").stat().st_size > 10_000


def test_an_interrupted_curve_goes_on_with_its_points(
    curves, experiments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = curves("--only", "all")["variants"].pop("all")["points"]
    (tmp_path / "tiny.json").unlink()
    train, stages = experiments.training.train, []

    def interrupted(folder, wanted, stage, *args, **options):
        stages.append(stage)
        if stages == ["transfer", "distil"]:
            raise KeyboardInterrupt
        return train(folder, wanted, stage, *args, **options)

    monkeypatch.setattr(experiments.training, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        curves("--only", "all")
    points = curves("--only", "all")["variants"]["all"]["points"]
    assert stages == ["transfer", "distil", "transfer", "distil"]
    assert [(p["tokens"], p["perplexity"]) for p in points] == [(p["tokens"], p["perplexity"]) for p in whole]


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"train.distil.tokens": 256}, [], "all: tokens of all stages: found 192, other variants have 256"),
        ({"data.0.weight": 2.0}, [], "all: data: found"),
        ({}, ["--only", "al"], "unknown variant 'al'. Did you mean 'all'"),
    ],
)
def test_curves_that_say_nothing_are_refused(curves, changes: dict, options: list[str], expected: str) -> None:
    curves.variants["window of 4"] = changes
    with pytest.raises(SystemExit, match=expected):
        curves(*options)


def test_quality_of_mixers(experiments, base: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner("experiments", tmp_path, monkeypatch)
    monkeypatch.setattr(experiments, "SEQ_LEN", 32)
    sizes = ["--lengths", "32", "272", "--blocks", "2", "1", "--calibrate", "64", "--windows", "290"]
    columns = run("quality", "--recipe", tmp_path / "base.yaml", "--mixers", "gla", *sizes)["columns"]
    assert list(columns) == ["source", "window 290", "window", "gla"]
    source, longer, window, gla = (column["perplexity"] for column in columns.values())
    # A window longer than the text is the source; fp32.
    assert longer["272"] == pytest.approx(source["272"], rel=1e-5) and window["272"] != source["272"]
    assert columns["gla"]["calibrated"]["perplexity"]["272"] != gla["272"]
    assert [len(columns["gla"]["losses"]), columns["gla"]["mixer"]["name"]] == [9, "gla"]
    assert "| gla |" in (tmp_path / "quality-tiny.md").read_text()
    assert (tmp_path / "quality-tiny.png").stat().st_size > 10_000


def test_sources_without_training(experiments, base: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sliding = save_source(tmp_path / "gemma", "gemma3_text", layers=6, sliding_window=16)
    run = runner("experiments", tmp_path, monkeypatch)
    models = ["--models", f"plain={base['source']['id']}", f"sliding={sliding}"]
    plain, slides = run("sources", *models, "--lengths", "128", "--blocks", "2")["models"]
    assert (plain["layers"], plain["full_layers"], slides["layers"], slides["full_layers"]) == (2, 2, 6, 1)
    assert plain["perplexity"]["control"] == plain["perplexity"]["source"] != plain["perplexity"]["window, full layers"]
    assert set(slides["perplexity"]) - set(plain["perplexity"]) == {"window, all layers", "gla, all layers"}
    assert "| sliding, 1 of 6 full |" in (tmp_path / "tiny.md").read_text()


@pytest.mark.parametrize("name", ["quality-smollm2-135m", "quality-smollm2-135m-clusters", "learning-curves"])
def test_committed_tables_are_those_of_the_committed_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import experiments_report

    write = experiments_report.curves_markdown if name == "learning-curves" else experiments_report.quality_markdown
    written = "\n".join(write(json.loads((RESULTS / f"{name}.json").read_text()))).splitlines()
    committed = (RESULTS / f"{name}.md").read_text().splitlines()
    assert [line.split() for line in written] == [line.split() for line in committed]
