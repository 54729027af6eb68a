"""What weights in 8 and 4 bits cost: source, window control and student, in fp32, bf16, int8, int4 and nf4.

    python scripts/bench_quantized.py --folder runs/best/merged
    python scripts/bench_quantized.py --folder runs/best/merged --parts quality --blocks 2

Perplexity of the embedded WikiText-2 validation text (512 and 2,048 tokens) and recall (needle, pairs) by the code of
`linearize eval`; bytes of weights as they are held; ms per decoded token, the median, at one context. Training is LoRA
beside QLoRA: the recipe, cut to --tokens in blocks of --seq-len, each run in a process of its own.

Writes eval/results/bench-quantized-NAME.json as it goes, and a table (.md) beside it.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import bench_common as common
import torch
from bench_common import Cell
from transformers import DynamicCache

from linearize.checkpoint.quantize import held_bytes
from linearize.checkpoint.sources import locate, relocate
from linearize.evaluation import perplexity, recall
from linearize.evaluation.clock import in_process
from linearize.evaluation.columns import Models, read_config, window_of
from linearize.evaluation.speed import decode, prefill, prompt
from linearize.evaluation.suite import RecallSpec
from linearize.formats import format_bytes

WEIGHTS = {"fp32": ("float32", None), "bf16": ("bfloat16", None), "int8": ("float32", "int8")}
WEIGHTS |= {"int4": ("float32", "int4"), "nf4": ("float32", "nf4")}
COLUMNS = ("source", "window", "student")


TRAIN = """
import json, os, sys, tempfile
import linearize
from linearize.evaluation.clock import PEAK, read_task, status
from linearize.recovery.monitor import LOG, read_log
task = read_task()
with tempfile.TemporaryDirectory() as folder:
    saved = os.dup(1)
    os.dup2(2, 1)  # what training prints is not the answer
    made = linearize.train(task["folder"], f"{folder}/trained", set=task["set"])
    os.dup2(saved, 1)
    log = [{key: line[key] for key in ("tokens", "lm", "kl")} for line in read_log(made / LOG)]
print(json.dumps({"log": log, "peak_bytes": status(PEAK)}))
"""


def training(given: argparse.Namespace) -> Iterator[Cell]:
    for name in ("fp32", "nf4"):
        size = {"tokens": given.tokens, "seq_len": given.seq_len, "batch": 1, "micro_batch": 1, "save_every": 1000}
        changes = [f"train.distil.{key}={json.dumps(value)}" for key, value in size.items()]
        changes += ["train.distil.quantize=nf4"] if name == "nf4" else []
        started = time.perf_counter()
        done = in_process(["-c", TRAIN], {"folder": str(given.folder), "set": changes})
        cell = {"part": "training", "weights": name, **done, "seconds": time.perf_counter() - started}
        yield cell | {"quarters": quarters(done["log"])}


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    if "training" in given.parts:
        yield from training(given)
    if given.parts == ["training"]:
        return
    config = read_config(given.folder)
    located = locate(given.source) if given.source else relocate(config.linearize["source"])
    window = (window_of(config) or (None, None))[0]
    for name in given.weights:
        dtype, quantize = WEIGHTS[name]
        models = Models(str(given.folder), config, located, dtype, "cpu", given.seed, quantize=quantize)
        for column in given.columns:
            with models.column(column) as model:
                where = {"column": column, "weights": name}
                if "quality" in given.parts:
                    yield {**where, "bytes": held_bytes(model), **quality(model, models.tokenizer, given)}
                if "recall" in given.parts:
                    yield {**where, **recalled(model, models.tokenizer, window, given)}
                if "speed" in given.parts:
                    yield {**where, **speed(model, given)}
        models.close()
        gc.collect()


@torch.no_grad()
def quality(model: Any, tokenizer: Any, given: argparse.Namespace) -> Cell:
    cell = {}
    for length in given.lengths:
        blocks = max(1, given.blocks * 512 // length)
        ids = perplexity.cut(common.validation_text(), tokenizer, length, blocks)
        cell |= {f"perplexity_{length}": float(perplexity.losses(model, ids).mean().exp()), f"blocks_{length}": blocks}
    return cell


def recalled(model: Any, tokenizer: Any, window: int | None, given: argparse.Namespace) -> Cell:
    spec = RecallSpec(tasks=["needle", "mqar"], multiples=[4], items=given.items)
    measured = recall.measure(model, tokenizer, spec, window, given.seed, 8)
    scores = [score for each in measured for score in each["items"]]
    return {"recall": sum(scores) / len(scores), "items": len(scores)}


@torch.inference_mode()
def speed(model: Any, given: argparse.Namespace) -> Cell:
    cache, ids = DynamicCache(config=model.config), prompt(model, given.context, given.seed)
    token = prefill(model, cache, ids, 512)[:, -1].argmax(-1, keepdim=True)
    seconds = decode(model, cache, token, given.steps)
    return {"token_seconds": median(seconds), "context": given.context, "steps": len(seconds)}


def fastest(cells: list[Cell], **where: Any) -> float | None:
    """Seconds a token in the fastest of the runs that the results hold: others had the machine not for themselves."""
    own = (cell for cell in cells if all(cell.get(key) == value for key, value in where.items()))
    return min((cell["token_seconds"] for cell in own if "token_seconds" in cell), default=None)


def report(results: dict[str, Any]) -> list[str]:
    """Lines of the table beside the results."""
    found, about = results["cells"], results["settings"]
    rows = []
    for column in COLUMNS:
        for name in WEIGHTS:
            own = {"column": column, "weights": name}
            numbers = [common.shown(common.find(found, f"perplexity_{n}", **own), ".2f") for n in about["lengths"]]
            share = common.find(found, "recall", **own)
            numbers += ["" if share is None else f"{share:.0%}"]
            numbers += [common.shown(common.find(found, "bytes", **own), ".0f", 1 / (1 << 20))]
            numbers += [common.shown(fastest(found, **own), ".0f", 1e3)]
            if any(numbers):
                rows.append((column, name, *numbers))
    head = ("column", "weights", *(f"perplexity, {n}" for n in about["lengths"]), "recall", "MiB", "ms per token")
    machine, threads = results["environment"], results.get("added", [about])[-1]["threads"]
    lines = [
        f"`{about['folder']}`, {machine['cpu']}, {threads} threads, commit {machine['commit']}, seed {about['seed']}; "
        "milliseconds of the fastest run."
    ]
    runs = [cell for cell in found if cell.get("part") == "training"]
    trained = [
        (cell["weights"], *(f"{each['kl']:.4f}" for each in cell["quarters"]), format_bytes(cell["peak_bytes"]),
         f"{cell['seconds']:.0f}")
        for cell in runs
    ]  # fmt: skip
    lines += common.table(head, rows, 2)
    if runs:
        until = (f"KL to {each['tokens']:,} tokens" for each in runs[0]["quarters"])
        lines += ["Training by the recipe, frozen weights in fp32 and in nf4; mean KL to the source of each quarter."]
        lines += common.table(("weights", *until, "peak memory", "s"), trained)
    return lines


def quarters(log: list[Cell]) -> list[Cell]:
    """The mean KL of each quarter of a log, with the tokens at its end."""
    step = max(1, len(log) // 4)
    parts = [log[start : start + step] for start in range(0, step * 4, step)]
    return [
        {"tokens": part[-1]["tokens"], "kl": sum(line["kl"] for line in part) / len(part)} for part in parts if part
    ]


def main() -> None:
    parser = common.options(__doc__, name="bench-quantized")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--source", help="default: the recorded one")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parts = ("quality", "recall", "speed", "training")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--tokens", type=int, default=16384, help="of training")
    parser.add_argument("--seq-len", type=int, default=2048, help="of training")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--blocks", type=int, default=8, help="of 512 tokens; longer ones are fewer")
    parser.add_argument("--items", type=int, default=20, help="of each task and depth of recall")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--more", action="store_true", help="add to the cells that the results file holds")
    given = parser.parse_args()
    results, target = common.begin(given)
    if given.more and target.is_file():
        earlier = json.loads(target.read_text())
        results = earlier | {"added": [*earlier.get("added", []), results["settings"]]}
    common.collect(results, cells(given), lambda found: [], target)
    common.write_markdown(report(results), target)


if __name__ == "__main__":
    main()
