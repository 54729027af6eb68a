"""A slice of the campaign of faults: half a minute of malformed values, one of everything else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "faults.py"
VALUES = ("config", "tokenizer", "generation_config", "jsonl", "recipe")
FILES = ("safetensors", "index", "gguf", "template", "parquet", "results", "adapters", "converted")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks, and reads /proc")
@pytest.mark.parametrize(
    "part",
    [
        ("--only", "inputs", "--kinds", *VALUES),
        ("--only", "kills", "disk", "two", "clock", "inputs", "--kinds", *FILES),
    ],
    ids=["values", "faults"],
)
def test_nothing_is_lost_and_nothing_ends_in_a_traceback(part: tuple[str, ...], tmp_path: Path) -> None:
    seed = os.environ.get("LINEARIZE_SEED", "0")
    command = [sys.executable, SCRIPT, *part, "--seconds", "30", "--seed", seed, "--folder", tmp_path / "faults"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    assert " 0 bad outcomes" in run.stdout
    assert run.stdout.count("| malformed ") == len(part) - part.index("--kinds") - 1


LATE = """
import os, signal, sys, time
import faults, linearize.cli
class Late:
    def flush(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
def before():
    sys.stdout = Late()
linearize.cli.main = lambda: None
parent = os.getpid()
try:
    print(faults.Run(["x"], faults.Path(sys.argv[1]), before).wait())
finally:
    if os.getpid() != parent:
        os.mkdir(f"{sys.argv[1]}/escaped")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks, and reads /proc")
def test_a_signal_at_the_last_moment_does_not_take_a_child_into_what_its_parent_does(tmp_path: Path) -> None:
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1]), str(SCRIPT.parents[1] / "tests")])
    command = [sys.executable, "-c", LATE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert (run.stdout.strip(), (tmp_path / "escaped").exists()) == ("0", False), run.stderr
