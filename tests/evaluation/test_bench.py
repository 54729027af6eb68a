"""The benchmarks at a tiny size: every part runs, and its numbers are what they are called."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.evaluation import student_of
from helpers.scripts import SCRIPTS, linux


def run_script(*command: str) -> None:
    environ = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run([sys.executable, *command], env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@linux
def test_every_part_of_the_decoding_benchmark(llama_folder: Path, tmp_path: Path):
    recipe = tmp_path / "tiny.yaml"
    mixer = {"name": "gla", "combine": "memory", "window": 8, "sinks": 2}
    recipe.write_text(json.dumps({"source": {"id": str(llama_folder)}, "convert": {"mixer": mixer}}))

    def run(*options: str) -> dict:
        command = [str(SCRIPTS / "bench_decode.py"), "--recipe", str(recipe), "--threads", "1", "--out", str(tmp_path)]
        run_script(*command, "--name", "tiny", "--dtypes", "float32", "--repeats", "2", "--steps", "2", *options)
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


@linux
def test_the_benchmark_of_recurrences(tmp_path: Path):
    options = ["--threads", "1", "--repeats", "3", "--out", str(tmp_path), "--naive", "128", "--naive-once", "256"]
    rows = ["--rows", "additive channel,naive", "--lengths", "256"]
    run_script(str(SCRIPTS / "bench_ops.py"), *options, *rows)
    results = json.loads((tmp_path / "bench-ops.json").read_text())
    assert results["environment"]["threads"] == 1 and results["environment"]["seed"] == 0
    chunked, naive, memory = results["cells"]
    assert [chunked["samples"], naive["samples"], memory["row"]] == [3, 1, "additive channel"]
    # 0.2 s against 0.02 s: chunks matter even here.
    assert naive["seconds"] > chunked["seconds"]
    # At least the gradients of q, k and v: 3 times 9 heads of 64, 4 bytes.
    assert 256 * 3 * 9 * 64 * 4 < memory["peak_bytes"] < 100e6
    assert "| additive channel |" in (tmp_path / "bench-ops.md").read_text()


def test_claims_of_the_recurrences(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_ops

    times = {"softmax": 10.0, "additive channel": 6.0, "naive": 130.0}
    cells = [{"part": "time", "row": row, "length": 4096, "seconds": s} for row, s in times.items()]
    cells += [
        {"part": "memory", "row": "additive channel", "length": length, "peak_bytes": size}
        for length, size in ((4096, 100), (16384, 430))
    ]
    found = {claim["claim"]: (claim["limit"], claim["value"], claim["holds"]) for claim in bench_ops.claims(cells)}
    assert found == {
        "additive channel: time over softmax's at 4096": ("≤ 0.5", 0.6, False),
        "naive: time over additive channel's at 4096": ("≥ 20", 21.6667, True),
        "additive channel: memory at 16384 over 4096": ("≤ 4.4", 4.3, True),
    }


def test_what_a_comparison_costs(llama_folder: Path, tmp_path: Path):
    folder = student_of(llama_folder, tmp_path / "student")
    options = ("--tasks", "embedded_arc_easy", "--limit", "2", "--repeats", "1", "--out", str(tmp_path / "out.json"))
    run_script(str(SCRIPTS / "bench_eval.py"), str(folder), *options)
    found = json.loads((tmp_path / "out.json").read_text())
    assert {name: times["samples"] for name, times in found["seconds"].items()} == {"linearize eval": 1, "lm_eval": 1}
    ours, theirs = (times["seconds"] for times in found["seconds"].values())
    assert found["claims"][0]["value"] == round(ours / theirs, 4)
