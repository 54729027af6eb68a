"""The Python API: every verb of the command line as a function, with the same names, options and defaults."""

import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

import linearize
from linearize import cli, verbs

COMMANDS: dict[str, click.Command] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
NAMES = {"eval": "evaluate"}
LISTINGS = {"recipes", "mixers", "archs"}
"""What only a terminal wants: their data are `linearize.MIXERS` and the modules behind them."""
STAGES = {"transfer", "distil", "long"}
"""`train` with another default of one option."""
PRINTED = {"as_json", "fail_under"}
"""Options about what is printed, and with which exit code."""
COMMON = sorted(set(COMMANDS) - LISTINGS - STAGES)


def function(verb: str) -> Callable[..., Any]:
    return getattr(linearize, NAMES.get(verb, verb))


def options(verb: str) -> dict[str, Any]:
    """Name -> default of what the command line takes, by the names of Python's parameters."""
    taken = {}
    for parameter in COMMANDS[verb].params:
        name = {"set_": "set"}.get(parameter.name or "", parameter.name or "")
        if name not in PRINTED and name != "help":
            taken[name] = parameter.default
    return taken


@pytest.mark.parametrize("verb", COMMON)
def test_every_option_is_a_parameter_with_the_same_default(verb: str) -> None:
    parameters = inspect.signature(function(verb)).parameters
    lists = {"contexts": lambda text: tuple(map(int, text.split(","))), "batches": lambda text: (int(text),)}
    for name, default in options(verb).items():
        if verb == "eval" and name == "flags":
            continue  # a launched process starts from a command line, and prints what it found
        assert name in parameters, f"linearize.{function(verb).__name__} lacks {name}"
        own = parameters[name].default
        if own is inspect.Parameter.empty:
            required = {p.name for p in COMMANDS[verb].params if p.required}
            assert name in required or (verb, name) == ("generate", "prompt"), name
        elif name in lists:
            assert own == lists[name](default)
        else:
            assert (own or None) == (default or None) or own == default, name


@pytest.mark.parametrize("verb", COMMON)
def test_every_verb_has_one_example_and_says_what_it_raises(verb: str) -> None:
    text = inspect.getdoc(function(verb)) or ""
    assert text.count(">>> ") == 1 and f"linearize.{function(verb).__name__}(" in text.partition(">>> ")[2]
    for part in ("Args:", "Raises:"):
        assert part in text


def test_all_names_are_there_and_no_others() -> None:
    for name in linearize.__all__:
        assert getattr(linearize, name) is not None and name in dir(linearize)
    with pytest.raises(AttributeError, match="no attribute 'linearise'"):
        linearize.linearise  # noqa: B018
    public = {
        name for name, value in vars(verbs).items() if inspect.isfunction(value) and value.__module__ == verbs.__name__
    }
    assert {name for name in public if not name.startswith("_")} <= set(linearize.__all__)


def test_a_verb_stays_a_function_when_modules_of_its_name_are_imported() -> None:
    import linearize.evaluation.evaluate
    import linearize.recovery.train
    import linearize.reporting.page  # noqa: F401

    for name in ("convert", "evaluate", "merge", "push", "report", "run", "select", "train"):
        assert inspect.isfunction(getattr(linearize, name)), name


def best_of(tries: int, *arguments: str) -> float:
    """Seconds of the fastest of several runs of Python: a busy machine makes single ones slow."""
    seconds = []
    for _ in range(tries):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=os.environ)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def test_import_and_help_answer_at_once() -> None:
    nothing = best_of(3, "-c", "pass")
    assert best_of(3, "-c", "import linearize") - nothing < 0.3
    assert best_of(3, "-m", "linearize.cli", "--help") < 0.5 + nothing
    code = "import linearize, sys; linearize.convert; print({'torch', 'transformers'} & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"


def test_bad_input_is_an_input_error_that_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(linearize.InputError, match="no such folder or file"):
        linearize.convert(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ValueError, match="no such folder"):
        linearize.load(tmp_path / "absent")
    with pytest.raises(linearize.InputError, match="say by --out"):
        linearize.report(["a.json", "b.json"])
    with pytest.raises(linearize.InputError, match="system goes with a single text"):
        linearize.generate("x", ["a", "b"], system="s")


def test_an_output_that_is_an_input_is_refused(llama_folder: Path, text: Path, tmp_path: Path) -> None:
    """It would replace what is read, or what the adapters need; also under another name, or as a folder around it."""
    small = [f"data.0.path={text}", "train.distil.tokens=256", "train.distil.seq_len=64", "train.distil.batch=2"]
    model = linearize.convert(llama_folder, tmp_path / "all" / "0", window=8, sinks=2, set=small)
    adapters = linearize.train(model, tmp_path / "all" / "1")
    (tmp_path / "link").symlink_to(model)
    before = {path: path.read_bytes() for path in (tmp_path / "all").rglob("*") if path.is_file()}
    for out in (model, tmp_path / "link"):
        for call in (
            lambda out=out: linearize.train(model, out, overwrite=True),
            lambda out=out: linearize.train(adapters, out, overwrite=True),
            lambda out=out: linearize.merge(adapters, out, overwrite=True),
            lambda out=out: linearize.calibrate(model, out, overwrite=True),
            lambda out=out: linearize.select(model, out, keep=1, overwrite=True),
            lambda out=out: linearize.export(model, "source", out, overwrite=True),
            lambda out=out: linearize.convert(llama_folder, llama_folder, overwrite=True),
        ):
            with pytest.raises(linearize.InputError, match="is the source, or holds it"):
                call()
    with pytest.raises(linearize.InputError, match="is the source, or holds it"):
        linearize.merge(adapters, adapters, overwrite=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "all").rglob("*") if path.is_file()}


def test_from_source_to_answer(llama_folder: Path, text: Path, tmp_path: Path) -> None:
    """Each function on what the one before has written."""
    plans = []
    small = [f"data.0.path={text}", "train.distil.tokens=256", "train.distil.seq_len=64", "train.distil.batch=2"]
    plan = linearize.convert(llama_folder, tmp_path / "0", window=8, sinks=2, set=small, dry_run=True)
    assert not isinstance(plan, Path) and plan.mixer["window"] == 8 and not (tmp_path / "0").exists()
    converted = linearize.convert(
        llama_folder, tmp_path / "0", window=8, sinks=2, set=small, on_plan=lambda *seen: plans.append(seen)
    )
    assert converted == tmp_path / "0" and plans[0][0] == plan and plans[0][1] == converted
    linearize.check([converted])
    assert linearize.inspect(converted)["layers"][0]["mixer"] == "clusters"
    calibrated = linearize.calibrate(converted, tmp_path / "1", tokens=128, seq_len=64)
    choice = linearize.select(calibrated, keep=1, tokens=128, seq_len=64, plot=tmp_path / "choice.svg")
    assert len(choice["layers"]) == 1 and (tmp_path / "choice.svg").is_file()
    trained = linearize.train(calibrated, tmp_path / "2")
    merged = linearize.merge(trained, tmp_path / "3")
    for folder in (converted, calibrated, trained, merged):
        model, tokenizer = linearize.load(folder)
        answer = linearize.generate(model, "The river", tokenizer=tokenizer, max_new_tokens=4, temperature=0, raw=True)
        assert answer.new_tokens[0] <= 4
    exported = linearize.export(converted, "source", tmp_path / "4")
    assert (exported / "config.json").is_file()
    assert "config.json" in linearize.push(merged, "org/name", dry_run=True)
