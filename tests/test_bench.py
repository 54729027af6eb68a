"""The decoding benchmark on a tiny model: every part runs, and its numbers are what they are called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_decode.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_every_part_of_the_decoding_benchmark(llama_folder: Path, tmp_path: Path):
    recipe = tmp_path / "tiny.yaml"
    mixer = {"name": "gla", "combine": "memory", "window": 8, "sinks": 2}
    recipe.write_text(json.dumps({"source": {"id": str(llama_folder)}, "convert": {"mixer": mixer}}))

    def run(*options: str) -> dict:
        command = [sys.executable, str(SCRIPT), "--recipe", str(recipe), "--threads", "1", "--out", str(tmp_path)]
        command += ["--name", "tiny", "--dtypes", "float32", "--repeats", "2", "--steps", "2", *options]
        environ = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "bench-decode-tiny.json").read_text())

    lengths = ["--contexts", "16,64", "--prefill", "32", "--long", "100", "--piece", "24", "--source-prefill", "24"]
    results = run("--parts", "decode,prefill,long,profile", "--batches", "1,3", "--prefill-repeats", "1", *lengths)
    assert results["environment"]["threads"] == 1 and results["mixer"] == mixer
    cells = {(cell["part"], cell["kind"], cell["batch"], cell["context"]): cell for cell in results["cells"]}
    assert len(cells) == 3 * 2 * 2 + 3 + 1 + 3
    assert cells["decode", "student", 1, 64]["samples"] == 2 * 2
    # 6 layers, 2 heads of 16 for keys and for values, 4 bytes
    assert cells["decode", "source", 3, 64]["cache_bytes"] == 3 * 64 * 6 * 2 * (16 + 16) * 4
    for kind in ("window", "student"):
        sizes = {cells["decode", kind, 3, context]["cache_bytes"] for context in (16, 64)}
        assert sizes == {3 * cells["decode", kind, 1, 64]["cache_bytes"]}
    assert cells["long", "student", 1, 100]["peak_bytes"] > 50e6
    shares = [operator["share"] for operator in cells["profile", "student", 1, 64]["operators"]]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 1
    assert "| float32 | 3 | 64 |" in (tmp_path / "bench-decode-tiny.md").read_text()

    results = run("--parts", "memory", "--kinds", "student", "--batches", "1", "--contexts", "64")
    (cell,) = results["cells"]
    assert cell["peak_bytes"] > 50e6
    assert cell["cache_bytes"] == cells["decode", "student", 1, 64]["cache_bytes"]
