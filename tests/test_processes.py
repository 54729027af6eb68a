"""Columns shared by two processes: the results of one, whatever ends early leaves the rest to go on with."""

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
from conftest import save_source
from test_evaluate import student_of

from linearize import results as results_file
from linearize.errors import InputError
from linearize.evaluate.processes import Processes
from linearize.recipe import package_folder
from linearize.results import COLUMNS

LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d")
LAUNCHER += ("--rdzv-endpoint", "localhost:0")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    return student_of(save_source(folder / "source", layers=2), folder / "student")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every section; speed too short to mean anything."""
    folder = tmp_path_factory.mktemp("suite")
    packed = (package_folder("eval") / "data" / "wikitext2_valid.txt.gz").read_bytes()
    (folder / "pages.txt").write_text(gzip.decompress(packed)[:20_000].decode(errors="ignore"))
    content = {
        "limit": 3,
        "tasks": [{"task": "lettered_arc_easy", "rotate": True}, {"task": "embedded_lambada_openai"}],
        "perplexity": [{"text": str(folder / "pages.txt"), "length": 64, "blocks": 2}],
        "recall": {"tasks": ["copy"], "multiples": [4], "items": 2},
        "behaviour": {"prompts": 3, "tokens": 6, "kl_blocks": 2, "state": 64},
        "speed": {"contexts": [32], "steps": 3},
    }
    (folder / "all.yaml").write_text(yaml.safe_dump(content))
    return folder / "all.yaml"


def start(student: Path, suite: Path, out: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "linearize.cli", "eval", str(student), "--suite", str(suite)]
    command += ["--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    process = start(student, suite, out)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return results_file.read(out)


def test_two_processes_write_what_one_writes(student: Path, suite: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    process = start(student, suite, out, "--json", launcher=LAUNCHER)
    shown, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    found = results_file.read(out)
    assert json.loads(shown) == found, "printed once, by the main process"
    assert comparable(found) == comparable(alone)
    lines = [line.split(":")[0] for line in errors.splitlines() if " s" in line and line.split(":")[0] in COLUMNS]
    assert lines == [name for name in COLUMNS if name != "other"], "a line per column"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


BREAKS = """
import os, runpy, signal, sys, time
from pathlib import Path
from linearize.evaluate import compare

way, done, *sys.argv[1:] = sys.argv[1:]
original = compare.run

def run(scorer, entry, limit, seed):
    if entry.name == "embedded_lambada_openai":
        if os.environ["RANK"] == "0":  # has its first column's first task on disk; waits for the other to break
            Path(done).touch()
            time.sleep(120)
        while not Path(done).exists():
            time.sleep(0.05)
        if way == "error":
            from linearize.errors import InputError
            raise InputError("broken in process 1")
        Path(done + "1").touch()
        time.sleep(120)
    return original(scorer, entry, limit, seed)

compare.run = run
runpy.run_module("linearize.cli", run_name="__main__")
"""


@pytest.mark.parametrize("way", ["error", "interrupt"])
def test_what_one_process_meets_ends_all_and_is_gone_on_with(
    way: str, student: Path, suite: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS)
    out, mark, began = tmp_path / "out" / "results.json", tmp_path / "mark", time.monotonic()
    command = [sys.executable, *LAUNCHER, str(tmp_path / "breaks.py"), way, str(mark)]
    command += ["eval", str(student), "--suite", str(suite), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if way == "interrupt":
        while not Path(f"{mark}1").exists():
            assert process.poll() is None and time.monotonic() < began + 120
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=110)
    assert process.returncode != 0 and shown == "" and not out.exists()
    # Their launcher tells of it too; ours is in test_cli.
    told = "Error: broken in process 1" if way == "error" else "Interrupted."
    assert errors.splitlines().count(told) == 1
    left = sorted(path.name for path in out.parent.iterdir())
    assert left == [".results.json.1.partial", ".results.json.partial"]
    kept = [results_file.read(out.parent / name)["columns"] for name in left]
    assert [[name for name in columns if columns[name]["tasks"]] for columns in kept] == [["student"], ["source"]]

    process = start(student, suite, out, "--resume")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    found = results_file.read(out)
    assert comparable(found) == comparable(alone)
    assert sorted(path.name for path in out.parent.iterdir()) == ["report.html", "results.json"]


def test_shares_are_neighbours_and_cover_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*COLUMNS]
    for count in (1, 2, 3, 6, 8):
        shares = []
        for rank in range(count):
            monkeypatch.setenv("WORLD_SIZE", str(count))
            monkeypatch.setenv("RANK", str(rank))
            shares.append(Processes().share(names[:6]))
        assert sum(shares, []) == names[:6] and max(map(len, shares)) - min(map(len, shares)) <= 1
        assert count > 6 or shares[0], "the main process is never idle while others work"
        if count == 2:
            assert shares == [["source", "window", "converted"], ["student", "student/window", "student/memory"]]


def test_weights_that_a_launcher_would_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="cannot be divided by FSDP"), Processes().joined():
        pass
    assert os.environ["WORLD_SIZE"] == "2"
