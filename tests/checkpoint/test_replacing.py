"""Outputs replace what is of their own kind only, and nothing that they are made from or will need."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.conversion import run as convert
from helpers.tiny import save_source

import linearize
from linearize.checkpoint.atomic import check_output
from linearize.checkpoint.open import needed
from linearize.checkpoint.replacing import check_apart
from linearize.errors import InputError
from linearize.evaluation.evaluate import bench, evaluate
from linearize.generation.speed import bench_lossless
from linearize.reporting import page, plot

RESULTS = Path(__file__).parents[1] / "helpers" / "results_example.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    source = save_source(folder / "source")
    return source, convert(source, folder / "model", mixer={"name": "gla", "window": 8, "sinks": 2})


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


WRITERS = {
    "eval": lambda model, out: evaluate(model, out=out, progress=False),
    "bench": lambda model, out: bench(model, out=out, progress=False),
    "bench --lossless": lambda model, out: bench_lossless(model, "", out=out),
    "report": lambda model, out: linearize.report(RESULTS, out),
    "plot": lambda model, out: plot.check_target(out),
}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "text.txt", "list.json", "x.png"]
)
@pytest.mark.parametrize("verb", WRITERS)
def test_a_file_of_another_kind_is_not_replaced(verb: str, name: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(made[1], model)
    for other, content in (("text.txt", "a text"), ("list.json", '[{"schema": 1}, 2]'), ("x.png", '{"schema": 1}')):
        (model / other).write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="is there, and is not|unknown kind of picture"):
        WRITERS[verb](model, model / name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("verb", WRITERS)
def test_a_folder_or_a_device_is_known_before_the_work(verb: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, said in (("out.png", "is a folder"), ("pipe.png", "is there, and is not")):
        with pytest.raises(InputError, match=said):
            WRITERS[verb](made[1], tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"out.png", "pipe.png"}


def test_what_a_verb_wrote_it_replaces(tmp_path: Path) -> None:
    results = Path(shutil.copy(RESULTS, tmp_path / "results.json"))
    out = linearize.report(results)
    assert linearize.report(results) == out
    out.write_text("")  # as mktemp leaves it
    linearize.report(results)
    out.write_text(out.read_text().replace('<meta name="generator" content="linearize">', ""))  # earlier versions
    linearize.report(results)
    with pytest.raises(InputError, match="is not a page"):
        linearize.report(results, results)
    assert json.loads(results.read_text()) == json.loads(RESULTS.read_text())
    (tmp_path / "report.html").write_text("<!doctype html><title>mine</title>")
    with pytest.raises(InputError, match="is not a page"):
        page.report(results)


@pytest.mark.parametrize("name", ["x.png", "x.svg", "x.pdf", "x.jpg"])
def test_a_picture_is_replaced_by_a_picture(name: str, tmp_path: Path) -> None:
    figure = plot._figure(tmp_path / name, 1, 1)
    plot._save(figure, tmp_path / name)
    plot.check_target(tmp_path / name)


def test_the_source_that_a_model_records_is_needed_through_adapters_too(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, model = made
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    assert needed(model) == [model, source] and needed(adapters) == [adapters, model, source]
    calls = {
        "train": lambda out: linearize.train(model, out, overwrite=True),
        "calibrate": lambda out: linearize.calibrate(model, out, overwrite=True),
        "select": lambda out: linearize.select(model, out, keep=1, overwrite=True),
        "export": lambda out: linearize.export(model, "source", out, overwrite=True),
        "merge": lambda out: check_output(out, True, needed(adapters)),
    }
    before = snapshot(source.parent)
    for call in calls.values():
        for out, said in ((source, "is the source"), (model / "sub", "lies in"), (source / "a" / "b", "lies in")):
            with pytest.raises(InputError, match=said):
                call(out)
    assert snapshot(source.parent) == before


@pytest.mark.parametrize("value", [None, 5, {}, {"source": 5}, {"source": {"path": 5}}, {"source": {"path": "a\0b"}}])
def test_a_record_that_names_no_folder_needs_none(value, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"linearize": value}))
    assert needed(tmp_path) == [tmp_path]


@pytest.mark.parametrize("kind", ["file", "pattern", "folder", "recipe"])
def test_text_and_recipe_are_not_replaced(kind: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[1], out)
    (out / "t.txt").write_text("text")
    data = {"file": out / "t.txt", "pattern": out / "t*.txt", "folder": out, "recipe": "wikitext2_train"}[kind]
    recipe = {"recipe": out / "recipe.yaml"} if kind == "recipe" else {}
    options = {"set": [f"data=[{{path: {data}}}]"], "overwrite": True, **recipe}
    before = snapshot(out)
    for verb in (linearize.train, linearize.calibrate, linearize.select):
        with pytest.raises(InputError, match=r"is the source, or holds it \(.*out"):
            verb(made[1], out, **options)
    assert snapshot(out) == before


def test_a_run_into_its_source_or_over_its_text_is_refused_before_any_work(made, tmp_path: Path) -> None:
    source, model = made
    before = snapshot(source)
    with pytest.raises(InputError, match="lies in"):
        linearize.run(source, source)
    assert snapshot(source) == before
    stage = tmp_path / "run" / "0-converted"
    shutil.copytree(model, stage)
    (stage / "t.txt").write_text("text")
    (stage / "recipe.yaml").unlink()
    with pytest.raises(InputError, match=r"holds it \(.*t.txt"):
        linearize.run(source, tmp_path / "run", set=[f"data=[{{path: {stage / 't.txt'}}}]"], overwrite=True)
    assert (stage / "t.txt").is_file()


def test_a_source_that_is_one_file_shares_its_folder_with_outputs(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("")
    check_apart(tmp_path / "out", [tmp_path / "x.gguf"])
    check_apart(tmp_path / "out", [tmp_path])  # a folder of texts
