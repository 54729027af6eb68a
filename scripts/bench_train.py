"""Speed and memory of a LoRA step by length: the source, the window control and the converted model, side by side.

    python scripts/bench_train.py                                             # half an hour on two cores, 16 GiB
    python scripts/bench_train.py --lengths 512,1024 --repeats 2 --rows source,student --no-memory

A step is forward, backward, clipping and optimiser, on one block of text, with the settings of the recipe's first stage
(peft, optimiser, rates) in fp32. The source is the plain, unconverted transformers model with the same adapters on the
same projections. Rows learn the next token; `student+kl` learns the source's distribution instead, as `linearize train`
does it: one more forward of the same weights, adapters off.

The loop of `linearize train` opens converted folders only, so what is timed is put together from its pieces:
`adapters.attach`, `adapters.as_source`, `losses.token_losses`, `optim.build`.

Times are medians over rounds in which all rows take turns, so that noise of the machine meets all alike. Memory is the
peak of a process of its own, weights and interpreter included, after a first, short step that is not counted.

Writes eval/results/bench-train.json after every cell, and a table (.md) beside it at the end.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from bench_common import LIVE, Cell, claim, claims_table, find, numbers, some
from bench_decode import as_kind, open_model, token_ids
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.checkpoint import adapters
from linearize.checkpoint.sources import load_source, locate
from linearize.errors import InputError
from linearize.evaluation.clock import PEAK, forget_peak, in_process, read_task, rotated, status, summary, timed
from linearize.evaluation.columns import sharing_copy
from linearize.evaluation.environment import environment
from linearize.recipe import load as recipes
from linearize.recipe.schema import Stage
from linearize.recovery import optim
from linearize.recovery.losses import count_targets, token_losses

ROWS = {"source": ("source", False), "window": ("window", False), "student": ("student", False)}
ROWS["student+kl"] = "student", True
"""Row -> which model, and whether it has a teacher."""
LIMITS = {1024: "≤ 1.15", 4096: "≤ 0.9"}
"""Length -> the student's step over the source's."""
TEACHER = "≤ 1.25"
"""Memory with a teacher over memory without."""
WARM = 128
"""Tokens of the first step: libraries load and moments of the optimiser appear; neither belongs to a later step."""

# --- one step ---------------------------------------------------------------------------------------------------------


class Trained:
    """A model with adapters and its optimiser.

    Args:
        source: plain; its weights are shared, not copied.
        row: of ROWS.
        mixer: of the converted model.
        stage: adapters, optimiser, rates.
    """

    def __init__(self, source: PreTrainedModel, row: str, mixer: dict[str, Any], stage: Stage):
        kind, teacher = ROWS[row]
        if stage.peft is None or not adapters.keeps_source(stage.peft):
            raise InputError(f"train.{stage.name}.peft: this benchmark is about adapters; choose a stage that has some")
        self.stage = replace(stage, lm=0.0 if teacher else 1.0, kl=1.0 if teacher else 0.0)
        # Of the source too: only a linearized model knows which projections the roles are.
        model = adapters.attach(as_kind(source, kind if kind != "source" else "window", mixer), stage.peft)
        if kind == "source":
            model = peft.get_peft_model(sharing_copy(source), copy.deepcopy(model.peft_config["default"]))
        self.model: Any = model.train()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer, _ = optim.build(self.model, self.stage, steps=1000)

    def step(self, ids: Tensor) -> float:
        """One optimiser step on ids [1, T]; returns the loss before it."""
        source = None
        if self.stage.kl:
            with adapters.as_source(self.model):
                source = self.model(input_ids=ids, use_cache=False).logits
        logits = self.model(input_ids=ids, use_cache=False).logits
        losses = token_losses(logits, ids, source, lm=self.stage.lm, kl=self.stage.kl)
        loss = losses.total / count_targets(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.stage.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


# --- the parts --------------------------------------------------------------------------------------------------------


def part_time(folder: str, ids: Tensor, mixer: dict, stage: Stage, given: argparse.Namespace) -> Iterable[Cell]:
    source = open_model(folder, "source", "float32", mixer)
    models = {row: Trained(source, row, mixer, stage) for row in given.rows}
    for length in given.lengths:
        block = ids[:, :length]
        seconds: dict[str, list[float]] = {row: [] for row in models}
        for model in models.values():
            model.step(block[:, :WARM])
        for round_ in range(given.repeats):
            for row in rotated(list(models), round_):
                seconds[row].append(timed(partial(models[row].step, block), block.device)[1])
        for row, model in models.items():
            cell = {"part": "time", "row": row, "length": length, "weights": sum(w.numel() for w in model.weights)}
            yield cell | summary(seconds[row])


def part_memory(folder: str, mixer: dict, stage: Stage, given: argparse.Namespace) -> Iterable[Cell]:
    for length in given.lengths:
        for row in given.rows:
            task = {"folder": folder, "row": row, "length": length, "mixer": mixer, "stage": stage}
            cell = {"part": "memory", "row": row, "length": length}
            yield cell | in_process([__file__, "--worker"], task | {"threads": given.threads}, LIVE)


def worker(folder: str, row: str, length: int, mixer: dict[str, Any], stage: Stage, threads: int) -> Cell:
    torch.set_num_threads(threads)
    model = Trained(open_model(folder, "source", "float32", mixer), row, mixer, stage)
    ids = torch.load(Path(folder) / "ids.pt")[:, :length]
    model.step(ids[:, :WARM])
    held = forget_peak()
    model.step(ids)
    return {"peak_bytes": status(PEAK), "held_bytes": held}


# --- the report -------------------------------------------------------------------------------------------------------


def claims(cells: list[Cell]) -> list[dict[str, Any]]:
    """The promised numbers, where this run has measured what they need."""
    found = []

    def ratio(name: str, limit: str, part: str, key: str, length: int, over: str, under: str) -> None:
        top, bottom = (find(cells, key, part=part, row=row, length=length) for row in (over, under))
        if top and bottom:
            found.append(claim(f"{name} at {length}", limit, top / bottom))

    for length, limit in LIMITS.items():
        ratio("student: time of a step over the source's", limit, "time", "seconds", length, "student", "source")
    for length in sorted({cell["length"] for cell in cells}):
        name = "student: peak memory with a teacher over without"
        ratio(name, TEACHER, "memory", "peak_bytes", length, "student+kl", "student")
    return found


def markdown(results: dict[str, Any]) -> str:
    cells, machine = results["cells"], results["environment"]
    lengths = sorted({cell["length"] for cell in cells})
    lines = [
        f"A LoRA step of {results['recipe']}: {machine['cpu']}, {machine['threads']} threads, commit "
        f"{machine['commit']}.",
        "fp32, one block: median seconds, of the source's, and peak resident memory of a process that trains.",
        "",
        f"| | {' | '.join(f'{length}: s | of the source | GiB' for length in lengths)} |",
        f"|---|{'---:|' * 3 * len(lengths)}",
    ]
    for row in dict.fromkeys(cell["row"] for cell in cells):
        columns = []
        for length in lengths:
            seconds, source = (find(cells, "seconds", part="time", row=r, length=length) for r in (row, "source"))
            memory = find(cells, "peak_bytes", part="memory", row=row, length=length)
            columns += [
                f"{seconds:.2f}" if seconds else "",
                f"{seconds / source:.3f}" if seconds and source else "",
                f"{memory / 2**30:.2f}" if memory else "",
            ]
        lines.append(f"| {row} | {' | '.join(columns)} |")
    return "\n".join([*lines, *claims_table(results["claims"], "one block, fp32")]) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smollm2-135m", help="names source, mixer and stage (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, e.g. convert.mixer.window=128")
    parser.add_argument("--rows", type=some(tuple(ROWS)), default=list(ROWS))
    parser.add_argument("--lengths", type=numbers, default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--no-time", action="store_true", help="memory only")
    parser.add_argument("--name", default="bench-train", help="of the output (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "eval" / "results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.worker:
        return print(json.dumps(worker(**read_task())))
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    wanted = recipes.load(given.recipe, given.set)
    mixer, stage = dict(wanted.convert.mixer), wanted.stage()
    target = given.out / f"{given.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    options = {key: value for key, value in vars(given).items() if key not in ("worker", "out", "name")}
    results: dict[str, Any] = {"schema": 1, "recipe": given.recipe, "source": wanted.source.id, "mixer": mixer}
    results |= {"settings": options, "environment": environment(torch.device("cpu"), given.seed, {}), "cells": []}
    with tempfile.TemporaryDirectory() as folder:
        located = locate(wanted.source.id, wanted.source.revision, package=wanted.source.package)
        model, tokenizer = load_source(located, "float32")
        model.save_pretrained(folder)
        del model
        ids = token_ids(tokenizer, max(given.lengths))
        torch.save(ids, Path(folder) / "ids.pt")
        # Memory first: after the times this process holds several models, which its children would lack.
        parts = () if given.no_memory else (part_memory(folder, mixer, stage, given),)
        parts += () if given.no_time else (part_time(folder, ids, mixer, stage, given),)
        for part in parts:
            for cell in part:
                print(json.dumps(cell), file=sys.stderr)
                results["cells"].append(cell)
                results["claims"] = claims(results["cells"])
                target.write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    target.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
