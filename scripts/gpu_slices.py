"""The slices of scripts/gpu_all.sh, which says what they are for.

A slice is a command that writes its results itself, and either is short or goes on where it was stopped: training from
its last checkpoint, an evaluation behind its last column. It is stopped (SIGTERM) when the time of the call is over.
What is done is noted in $LINEARIZE_GPU/done, with seconds; what failed is tried again by the next call. Training mostly
waits for its launches, so several of them (--only, one call each at the same time) share a GPU well; times do not.
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
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
STORE = Path(os.environ.get("LINEARIZE_GPU", Path.home() / ".cache" / "linearize-gpu"))
RESULTS = ROOT / "eval" / "results"
BASE = "smollm2-135m-best"
RECIPES = {
    # Name -> what differs from BASE: the best (clusters in the bytes of 128 in fp32), gla as a memory, and Liger's as
    # published.
    "best": [],
    "gla": ["convert.mixer={name: gla, combine: memory, window: 64, sinks: 4}"],
    "liger": ["convert.mixer={name: gla, combine: liger, window: 64, sinks: 0}", "train.distil.lm=1.0",
              "train.distil.kl=0.0", "train.distil.peft={r: 8, alpha: 8, roles: [q, k, v]}"],
}  # fmt: skip
TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "lambada_openai")
SUITE: dict[str, Any] = {
    "description": "What a trained model is compared by on a GPU: six tasks, perplexity on every text, recall.",
    "columns": ["source", "window", "converted", "student"],
    "limit": 100,
    "tasks": [{"task": f"embedded_{name}", "metric": "acc", "label": name} for name in TASKS],
    "perplexity": [{"text": "wikitext2_valid", "length": 2048, "blocks": 16}],
    "recall": {"tasks": ["needle", "multikey", "copy", "mqar"], "multiples": [4, 16, 64], "items": 16},
}
TINY = {
    "description": "A look.", "columns": ["source", "student"],
    "perplexity": [{"text": "wikitext2_valid", "length": 128, "blocks": 1}],
}  # fmt: skip
ENOUGH = 20.0
"""Seconds that must be left for a slice to be begun."""


class Slice(NamedTuple):
    """A command, and about how many seconds it takes on an H100; `files` are copied to the results as they are."""

    command: list[str]
    seconds: float
    files: dict[Path, str] = {}


def settings(name: str, tiny: bool) -> list[str]:
    """All that is set in the recipe of a training slice."""
    texts = STORE / "pack" / "text"
    data = [{"path": str(texts / "*") if texts.is_dir() and any(texts.iterdir()) else "demo-text"}]
    size: dict[str, object] = {"tokens": 512, "seq_len": 128, "batch": 2, "micro_batch": 2, "save_every": 1}
    if not tiny:
        size = {"tokens": 20_000_000, "seq_len": 2048, "batch": 16, "micro_batch": 16, "save_every": 100}
        size |= {"dtype": "bfloat16", "gradient_checkpointing": True, "lr": 5e-4}
    stage = [f"train.distil.{key}={value}" for key, value in size.items()]
    return [*RECIPES[name], *stage, f"data={json.dumps(data)}", f"eval.suite={STORE / 'suite.yaml'}"]


def slices(tiny: bool) -> Iterator[tuple[str, Slice]]:
    """All of them, in their order."""
    python, cli = [sys.executable], [sys.executable, "-m", "linearize.cli"]
    device = ["--device", "cpu" if tiny else "cuda"]
    small = ["--shapes", "tiny", "--contexts", "64", "--batches", "1", "--steps", "3"]
    yield "decode", Slice([*python, "scripts/gpu_decode.py", *device, *small * tiny], 300)
    tests = [
        "-m",
        "pytest",
        "-q",
        "-o",
        "filterwarnings=",
        "tests/model/ops/test_kernels_gpu.py",
        "-p",
        "no:cacheprovider",
    ]
    log = STORE / "parity.xml"
    yield "parity", Slice([*python, *tests, *([] if tiny else ["-k", "fla"]), f"--junit-xml={log}"], 240,
                          {log: "gpu-parity.xml"})  # fmt: skip
    for name in RECIPES:
        folder = STORE / "runs" / name
        changed = [word for change in settings(name, tiny) for word in ("--set", change)]
        files = {folder / "results.json": f"smollm2-135m-gpu-{name}.json"}
        for log in ("1-distil", "1-distil.training"):
            files[folder / log / "train_log.jsonl"] = f"gpu-{name}-log.jsonl"
        yield f"run {name}", Slice([*cli, "run", BASE, "--out", str(folder), *changed], 0, files)
    which = ["kl-512"] if tiny else ["1b", "8b", "8b-gla"]
    yield "plan", Slice([*python, "scripts/check_plan.py", "--name", "gpu-plan", *device, "--only", *which], 120)
    small = ["--lengths", "64", "--naive", "64", "--naive-once", "64", "--repeats", "1", "--rows", "softmax", "window"]
    small += ["--no-memory"]
    yield "ops", Slice([*python, "scripts/bench_ops.py", *device, "--name", "gpu-ops", *small * tiny], 300)


def table() -> None:
    """Seconds of every slice on an H100: training from `linearize plan`, the others as they are limited."""
    import linearize

    total = 0.0
    for name, each in slices(tiny=False):
        seconds, about = each.seconds, "a limit"
        if name.startswith("run "):
            made = linearize.plan(BASE, gpu="h100", set=settings(name.removeprefix("run "), tiny=False))
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
    ends = time.monotonic() + 60 * given.minutes - 30 * (given.minutes > 1)
    texts = [{"text": str(text), "length": 2048, "blocks": 16} for text in sorted((STORE / "pack" / "eval").glob("*"))]
    suite = TINY if given.tiny else SUITE | {"perplexity": [*SUITE["perplexity"], *texts]}
    (STORE / "suite.yaml").write_text(json.dumps(suite))
    (done := STORE / "done").mkdir(exist_ok=True)
    failed, left = [], []
    for name, each in slices(given.tiny):
        note = done / f"{name.replace(' ', '-')}.json"
        if note.is_file() or (given.only and name not in given.only):
            continue
        if ends - time.monotonic() < ENOUGH:
            left.append(name)
            continue
        started = time.monotonic()
        print(f"--- {name}", flush=True)
        code = run(each, ends - started)
        if code == 0:
            note.write_text(json.dumps({"slice": name, "seconds": round(time.monotonic() - started, 1)}) + "\n")
        elif code is None:
            left.append(name)
        else:
            failed.append(name)
    finished = [json.loads(note.read_text()) for note in sorted(done.iterdir())]
    print(f"done: {finished}; failed: {failed}; left: {left}", flush=True)
    sys.exit(1 if failed else 3 if left else 0)


if __name__ == "__main__":
    main()
