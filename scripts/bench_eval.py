"""What `linearize eval` costs over the same lm-eval runs called by hand: eval/results/bench-eval.json.

The student's column of a suite of tasks, by `linearize eval` and by the command `lm_eval --model hf`, interleaved, each
a program of its own: imports, loading and scoring, the same items, batch size and device.

    python scripts/bench_eval.py runs/demo/merged                        # ten minutes on two cores
    python scripts/bench_eval.py DIR --tasks embedded_piqa --limit 20 --repeats 1
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import bench_common as common

from linearize.evaluation.clock import summary
from linearize.recipe.resources import package_folder

TASKS = "embedded_piqa,embedded_arc_easy,embedded_hellaswag,embedded_winogrande,embedded_lambada_openai"


def commands(given: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Name -> the program that scores the tasks."""
    sizes = ["--limit", str(given.limit), "--batch-size", str(given.batch)]
    suite = folder / "suite.yaml"
    suite.write_text(json.dumps({"tasks": [{"task": task} for task in given.tasks.split(",")]}))
    ours = [sys.executable, "-m", "linearize.cli", "eval", given.folder, "--suite", str(suite)]
    theirs = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--device", "cpu"]
    theirs += ["--model_args", f"pretrained={given.folder}", "--tasks", given.tasks, "--seed", "0"]
    theirs += ["--include_path", str(package_folder("eval") / "tasks"), "--output_path", str(folder / "theirs")]
    return {
        "linearize eval": [*ours, "--columns", "student", "--out", str(folder / "ours.json"), *sizes],
        "lm_eval": [*theirs, *(option.replace("-size", "_size") for option in sizes)],
    }


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, name="bench-eval")
    parser.add_argument("folder")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    results, target = common.begin(given)
    with tempfile.TemporaryDirectory() as temporary:
        programs = commands(given, Path(temporary)).items()
        calls = {name: partial(subprocess.run, command, check=True) for name, command in programs}
        seconds = common.interleaved(calls, given.repeats)
    results["seconds"] = {name: summary(times) for name, times in seconds.items()}
    ours, theirs = (results["seconds"][name]["seconds"] for name in ("linearize eval", "lm_eval"))
    results["claims"] = [common.claim("linearize eval over lm_eval, wall time", "≤ 1.05", ours / theirs)]
    common.save(results, target)
    print(json.dumps(results["claims"], ensure_ascii=False))


if __name__ == "__main__":
    main()
