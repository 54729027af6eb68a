"""What `linearize eval` costs over the same lm-eval runs called by hand: eval/results/bench-eval.json.

The student's column of a suite of tasks, by `linearize eval` and by the command `lm_eval --model hf`, in turns, each a
program of its own: imports, loading and scoring, the same items, batch size and device.

    python scripts/bench_eval.py runs/demo/merged                        # ten minutes on two cores
    python scripts/bench_eval.py DIR --tasks embedded_piqa --limit 20 --repeats 1
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_common import claim

from linearize.evaluation.clock import rotated, summary, timed
from linearize.evaluation.environment import environment
from linearize.recipe.resources import package_folder

RESULTS = Path(__file__).parents[1] / "eval" / "results" / "bench-eval.json"
TASKS = "embedded_piqa,embedded_arc_easy,embedded_hellaswag,embedded_winogrande,embedded_lambada_openai"


def commands(given: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Name -> the program that scores the tasks."""
    sizes = ["--limit", str(given.limit), "--batch-size", str(given.batch)]
    suite = folder / "suite.yaml"
    suite.write_text(json.dumps({"tasks": [{"task": task} for task in given.tasks.split(",")]}))
    ours = [sys.executable, "-m", "linearize.cli", "eval", str(given.folder), "--suite", str(suite)]
    theirs = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--device", "cpu"]
    theirs += ["--model_args", f"pretrained={given.folder}", "--tasks", given.tasks, "--seed", "0"]
    theirs += ["--include_path", str(package_folder("eval") / "tasks"), "--output_path", str(folder / "theirs")]
    return {
        "linearize eval": [*ours, "--columns", "student", "--out", str(folder / "ours.json"), *sizes],
        "lm_eval": [*theirs, *(option.replace("-size", "_size") for option in sizes)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        programs = list(commands(given, Path(temporary)).items())
        for round_ in range(given.repeats):
            for name, command in rotated(programs, round_):
                _, took = timed(lambda command=command: subprocess.run(command, check=True), torch.device("cpu"))
                seconds.setdefault(name, []).append(took)
    found = {name: summary(times) for name, times in seconds.items()}
    ratio = found["linearize eval"]["seconds"] / found["lm_eval"]["seconds"]
    content = {
        "settings": {"tasks": given.tasks, "limit": given.limit, "batch": given.batch, "repeats": given.repeats},
        "seconds": found,
        "claims": [claim("linearize eval over lm_eval, wall time", "≤ 1.05", ratio)],
        "environment": environment(torch.device("cpu"), 0, {}),
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content["claims"], ensure_ascii=False))


if __name__ == "__main__":
    main()
