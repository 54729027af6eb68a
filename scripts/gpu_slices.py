"""The slices of scripts/gpu_all.sh, which says what they are for. Not run yet.

A slice is a command that writes its results itself, and either is short or goes on where it was stopped: training from
its last checkpoint, an evaluation behind its last column. It is stopped (SIGTERM) when the time of the call is over.
What is done is noted in $LINEARIZE_GPU/done.json, with seconds; what failed is tried again by the next call.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
STORE = Path(os.environ.get("LINEARIZE_GPU", Path.home() / ".cache" / "linearize-gpu"))
RESULTS = ROOT / "eval" / "results"
RECIPES = {
    # Name -> recipe and what differs: the best, Liger's as published, and gla as a memory.
    "best": ("smollm2-135m-best", []),
    "liger": ("smollm2-135m-best", ["convert.mixer={name: gla, combine: liger, window: 64, sinks: 0}",
                                    "train.distil.lm=1.0", "train.distil.kl=0.0",
                                    "train.distil.peft={r: 8, alpha: 8, roles: [q, k, v]}"]),
    "gla": ("smollm2-135m-best", ["convert.mixer={name: gla, combine: memory, window: 64, sinks: 4}"]),
}  # fmt: skip
ENOUGH = 20.0
"""Seconds that must be left for a slice to be begun."""


class Slice(NamedTuple):
    """A command, and about how many seconds it takes on an H100; `files` are copied to the results as they are."""

    command: list[str]
    seconds: float
    files: dict[Path, str] = {}


def recipe(name: str, tiny: bool) -> tuple[str, list[str]]:
    """The recipe of a training slice, and all that is set in it."""
    base, changes = RECIPES[name]
    texts = sorted((STORE / "pack" / "text").glob("*"))
    data = [{"path": str(text)} for text in texts] or [{"path": "demo-text"}]
    size: dict[str, object] = {"tokens": 512, "seq_len": 128, "batch": 2, "micro_batch": 2, "save_every": 1}
    if not tiny:
        size = {"tokens": 20_000_000, "seq_len": 2048, "batch": 8, "micro_batch": 8, "save_every": 50}
        size["dtype"] = "bfloat16"
    stage = [f"train.distil.{key}={value}" for key, value in size.items()]
    suite = [f"eval.suite={STORE / 'tiny.yaml'}"] if tiny else ["eval.suite=local"]
    return base, [*changes, *stage, f"data={json.dumps(data)}", *suite]


def slices(tiny: bool) -> Iterator[tuple[str, Slice]]:
    """All of them, in their order."""
    python, cli = [sys.executable], [sys.executable, "-m", "linearize.cli"]
    device = "cpu" if tiny else "cuda"
    tests = ["-m", "pytest", "-q", "tests/model/ops/test_kernels_gpu.py", "-p", "no:cacheprovider"]
    log = STORE / "parity.xml"
    yield "parity", Slice([*python, *tests, *([] if tiny else ["-k", "fla"]), f"--junit-xml={log}"], 240,
                          {log: "gpu-parity.xml"})  # fmt: skip
    small = ["--lengths", "64", "--naive", "64", "--naive-once", "64", "--repeats", "1", "--rows", "softmax", "window"]
    small += ["--parts", "time"]
    yield "ops", Slice([*python, "scripts/bench_ops.py", "--device", device, "--name", "gpu-ops", *small * tiny], 300)
    converted = STORE / "converted"
    base, changes = recipe("best", tiny)
    changed = [word for change in changes for word in ("--set", change)]
    yield "convert", Slice([*cli, "convert", "--model", base, "--out", str(converted), "--overwrite", *changed], 20)
    contexts, steps = ("64,256", "3") if tiny else ("1024,4096,16384,32768,65536,131072", "24")
    curves = [*cli, "bench", str(converted), "--contexts", contexts, "--steps", steps]
    yield "curves", Slice([*curves, "--out", str(RESULTS / "gpu-curves.json")], 300)
    for name in RECIPES:
        base, changes = recipe(name, tiny)
        folder = STORE / "runs" / name
        changed = [word for change in changes for word in ("--set", change)]
        files = {folder / "results.json": f"gpu-{name}.json"}
        for log in ("1-distil", "1-distil.training"):
            files[folder / log / "train_log.jsonl"] = f"gpu-{name}-log.jsonl"
        yield f"run {name}", Slice([*cli, "run", base, "--out", str(folder), *changed], 0, files)


def table() -> None:
    """Seconds of every slice on an H100: training from `linearize plan`, the others as they are limited."""
    import linearize

    total = 0.0
    for name, each in slices(tiny=False):
        seconds, about = each.seconds, "a limit"
        if name.startswith("run "):
            base, changes = recipe(name.removeprefix("run "), tiny=False)
            made = linearize.plan(base, gpu="h100", set=changes)
            (row,) = (row for row in made.rows if row.stage == "train.distil")
            seconds, about = (
                row.seconds + 600,
                f"training {row.seconds:.0f} s by plan, {row.peak / 1e9:.1f} GB; eval 600",
            )
        total += seconds
        print(f"{name:<12} {seconds:>7.0f} s   {about}")
    print(f"{'all':<12} {total:>7.0f} s   {-(-total // 540):.0f} calls of 9 minutes")


def carry(files: dict[Path, str]) -> None:
    """Bring what a slice has written to the results."""
    for file, name in files.items():
        if file.is_file():
            shutil.copyfile(file, RESULTS / name)


def run(each: Slice, seconds: float) -> int | None:
    """Run a slice for so long at most; returns its exit code, None where it was stopped."""
    process = subprocess.Popen(each.command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
        return None if code == 143 else code
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        return None
    finally:
        carry(each.files)


def main() -> None:
    """Run what is left, as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with numbers that mean nothing: a rehearsal")
    parser.add_argument("--table", action="store_true", help="only say how long it takes on an H100")
    parser.add_argument("--only", nargs="+", default=[], help="names of slices")
    given = parser.parse_args()
    if given.table:
        return table()
    ends, done_file = time.monotonic() + 60 * given.minutes - 30 * (given.minutes > 1), STORE / "done.json"
    if given.tiny:
        (STORE / "tiny.yaml").write_text("description: tiny\ncolumns: [source, student]\nperplexity:\n"
                                         "  - {text: wikitext2_valid, length: 128, blocks: 1}\n")  # fmt: skip
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    failed, left = [], []
    for name, each in slices(given.tiny):
        if name in done or (given.only and name not in given.only):
            continue
        if ends - time.monotonic() < ENOUGH:
            left.append(name)
            continue
        started = time.monotonic()
        print(f"--- {name}", flush=True)
        code = run(each, ends - started)
        if code == 0:
            done[name] = round(time.monotonic() - started, 1)
            done_file.write_text(json.dumps(done, indent=1) + "\n")
        elif code is None:
            left.append(name)
        else:
            failed.append(name)
    print(f"done: {done}; failed: {failed}; left: {left}", flush=True)
    sys.exit(1 if failed else 3 if left else 0)


if __name__ == "__main__":
    main()
