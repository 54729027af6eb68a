"""A slice of the campaign of faults: two minutes of malformed values, two of everything else."""

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
    command = [sys.executable, SCRIPT, *part, "--seconds", "120", "--seed", seed, "--folder", tmp_path / "faults"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    assert " 0 bad outcomes" in run.stdout
    assert run.stdout.count("| malformed ") == len(part) - part.index("--kinds") - 1
