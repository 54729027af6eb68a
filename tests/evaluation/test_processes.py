"""Columns shared by two processes: the results of one, and whatever ends early leaves the rest to go on with."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.evaluation import student_of
from helpers.tiny import interruptible, save_source

from linearize.errors import InputError
from linearize.evaluation import tasks
from linearize.evaluation.evaluate import evaluate
from linearize.evaluation.processes import Processes
from linearize.recipe.resources import package_folder
from linearize.results import file as results_file
from linearize.results.schema import COLUMNS

LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d")
LAUNCHER += ("--rdzv-endpoint", "localhost:0")
FLAGS = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")
FLAGS += ("--mixed_precision", "no", "--dynamo_backend", "no")
NAMES = ["source", "converted", "student", "student/window"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    return student_of(save_source(folder / "source", layers=2), folder / "student")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every section but speed; beside it, as all.yaml, the same with speed."""
    folder = tmp_path_factory.mktemp("suite")
    packed = (package_folder("eval") / "data" / "wikitext2_valid.txt.gz").read_bytes()
    (folder / "pages.txt").write_text(gzip.decompress(packed)[:20_000].decode(errors="ignore"))
    content = {
        "columns": NAMES,
        "limit": 3,
        "tasks": [{"task": "lettered_arc_easy", "rotate": True}, {"task": "embedded_lambada_openai"}],
        "perplexity": [{"text": str(folder / "pages.txt"), "length": 64, "blocks": 2}],
        "recall": {"tasks": ["copy"], "multiples": [4], "items": 2},
        "behaviour": {"prompts": 3, "tokens": 6, "kl_blocks": 2, "state": 64},
    }
    (folder / "most.yaml").write_text(yaml.safe_dump(content))
    (folder / "all.yaml").write_text(yaml.safe_dump({**content, "speed": {"contexts": [32], "steps": 3}}))
    return folder / "most.yaml"


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock or a memory gauge says."""
    results = json.loads(json.dumps(results))
    for column in results["columns"].values():
        column["seconds"] = 0
        for cell in column.get("speed", ()):
            cell |= dict.fromkeys(("prefill_seconds", "token_seconds", "low", "high", "peak_bytes"))
    results["environment"].pop("date")
    return results


@pytest.fixture(scope="module")
def alone(student: Path, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone") / "results.json"
    return evaluate(student, suite.with_name("all.yaml"), out=out, progress=False)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(student: Path, suite: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "linearize.cli", "eval", str(student), "--out", str(out), "--json"]
    command += ["--suite", str(suite.with_name("all.yaml")), "--fail-under", "kl=0", "--", *FLAGS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1, ended.stderr
    results = results_file.read(out)
    assert json.loads(ended.stdout) == results, "printed once, by the main process"
    assert comparable(results) == comparable(alone)
    assert "speed" in results["columns"]["source"]
    lines = [line.split(":")[0] for line in ended.stderr.splitlines()]
    assert [name for name in lines if name in COLUMNS] == NAMES, "a line per column"
    assert lines.count("fell short") == lines.count("report") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


BREAKS = """
import os, runpy, sys, time
from pathlib import Path
from linearize.errors import InputError
from linearize.evaluation import tasks as compare

first, *sys.argv[1:] = sys.argv[1:]
original = compare.run

def run(scorer, entry, limit, seed):
    if entry.name == "embedded_lambada_openai":
        if os.environ["RANK"] == "0":  # the first task of its first column is on disk
            Path(first).touch()
            time.sleep(300)
        while not Path(first).exists():
            time.sleep(0.05)
        raise InputError("broken in process 1")
    return original(scorer, entry, limit, seed)

compare.run = run
runpy.run_module("linearize.cli", run_name="__main__")
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_the_rest_is_kept(
    student: Path, suite: Path, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS)
    out = tmp_path / "out" / "results.json"
    command = [sys.executable, *LAUNCHER, str(tmp_path / "breaks.py"), str(tmp_path / "first"), "eval", str(student)]
    command += ["--suite", str(suite), "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode != 0 and ended.stdout == "" and not out.exists()
    assert ended.stderr.splitlines().count("Error: broken in process 1") == 1 and "exitcode  : 2" in ended.stderr
    left = sorted(path.name for path in out.parent.iterdir())
    assert left == [".results.json.1.partial", ".results.json.partial"]
    kept = [results_file.read(out.parent / name)["columns"] for name in left]
    assert [[*columns] for columns in kept] == [["student"], ["source"]]
    for columns in kept:
        for column in columns.values():
            assert [*column["tasks"]] == ["lettered_arc_easy"] and "behaviour" in column

    asked, original = [], tasks.run

    def counted(scorer: Any, entry: Any, limit: Any, seed: Any) -> Any:
        asked.append(entry.name)
        return original(scorer, entry, limit, seed)

    monkeypatch.setattr(tasks, "run", counted)
    results = evaluate(student, suite, out=out, resume=True, progress=False)
    assert len(asked) == 2 * len(NAMES) - 2, "what each process had finished is not asked again"
    expected = comparable(alone)["columns"]
    for column in expected.values():
        column.pop("speed", None)
    assert comparable(results)["columns"] == expected
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]


SLEEPS = """
import os, time
from pathlib import Path

Path(f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
time.sleep(300)
"""


def test_an_interrupt_of_this_process_alone_reaches_those_of_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    code = "import sys; from linearize.launch import launch; launch('eval', sys.argv[1:], 'sleeps', [])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code, *FLAGS]
    process = interruptible(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    files, began = [tmp_path / f"{rank}.pid" for rank in (0, 1)], time.monotonic()
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None and time.monotonic() < began + 120
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # The command line makes 130 of it.
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_shares_are_neighbours_and_cover_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*COLUMNS][:6]
    for count in (1, 2, 3, 6, 8):
        shares = []
        for rank in range(count):
            monkeypatch.setenv("WORLD_SIZE", str(count))
            monkeypatch.setenv("RANK", str(rank))
            shares.append(Processes().share(names))
        assert sum(shares, []) == names and max(map(len, shares)) - min(map(len, shares)) <= 1
        assert shares[0], "the main process is never idle while others work"
        if count == 2:
            assert shares == [["source", "window", "converted"], ["student", "student/window", "student/memory"]]


def test_what_an_earlier_run_left_undone_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    names, shares = [*COLUMNS][:6], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(Processes().share(names, kept=["window", "source"]))
    assert shares == [["source", "window", "converted", "student"], ["student/window", "student/memory"]]


def test_weights_that_a_launcher_would_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="cannot be divided by FSDP"), Processes().joined():
        pass


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "2"), ("WORLD_SIZE", "two"), ("RANK", "")])
def test_half_of_what_a_launcher_sets_is_one_paragraph(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for each in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"{name}.*: the environment asks for processes.*unset"), Processes().joined():
        pass
