"""Speed and memory of a LoRA step by length: the source, the window control and the converted model, side by side.

    python scripts/bench_train.py                                             # half an hour on two cores, 16 GiB
    python scripts/bench_train.py --lengths 512 1024 --repeats 2 --rows source student --parts time

A step is forward, backward, clipping and optimiser, on one block of random tokens, with the settings of the recipe's
first stage (peft, optimiser, rates) in fp32. The source is the plain, unconverted transformers model with the same
adapters on the same projections. Rows learn the next token; `student+kl` learns the source's distribution instead, as
`linearize train` does it: one more forward of the same weights, adapters off.

Times are medians over rounds in which all rows are interleaved, so that noise of the machine meets all alike. Memory is
the peak of a process of its own, weights and interpreter included, after a first, short step that is not counted.

Writes eval/results/bench-train.json after every cell, and a table (.md) beside it at the end.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import bench_common as common
import peft
import torch
from bench_common import Cell, Claim
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.checkpoint import adapters
from linearize.checkpoint.sources import Located, load_source
from linearize.errors import InputError
from linearize.evaluation.clock import PEAK, forget_peak, read_task, status, summary
from linearize.evaluation.columns import sharing_copy
from linearize.evaluation.speed import prompt
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recipe.schema import Recipe, Stage
from linearize.recovery import optim
from linearize.recovery.losses import count_targets, token_losses

ROWS = ("source", "window", "student", "student+kl")
WARM = 128
"""Tokens of the first step: libraries load and moments of the optimiser appear; neither belongs to a later step."""


class Trained:
    """A model with adapters and its optimiser, as `linearize train` makes them; it shares the source's weights."""

    def __init__(self, source: PreTrainedModel, row: str, mixer: dict[str, Any], stage: Stage):
        teacher = row.endswith("+kl")
        if stage.peft is None or not adapters.keeps_source(stage.peft):
            raise InputError(f"train.{stage.name}.peft: this benchmark is about adapters; choose a stage that has some")
        self.stage = replace(stage, lm=0.0 if teacher else 1.0, kl=1.0 if teacher else 0.0)
        control = {"name": "window", "window": mixer["window"], "sinks": mixer["sinks"]}
        # Of the source too: only a linearized model knows which projections the roles are.
        model = linearize_(sharing_copy(source), mixer if row.startswith("student") else control)
        model = adapters.attach(model, stage.peft)
        if row == "source":
            model = peft.get_peft_model(sharing_copy(source), copy.deepcopy(model.peft_config["default"]))
        self.model: Any = model.train()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer, _ = optim.build(self.model, self.stage, steps=1000)

    def step(self, ids: Tensor) -> float:
        """One optimiser step on ids int64 [1, T]; returns the loss before it, nats per token."""
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


def part_time(located: Located, wanted: Recipe, given: argparse.Namespace) -> Iterator[Cell]:
    """Seconds of a step, all rows interleaved."""
    source, _ = load_source(located, "float32")
    models = {row: Trained(source, row, dict(wanted.convert.mixer), wanted.stage()) for row in given.rows}
    for length in given.lengths:
        block = prompt(source, length, given.seed)
        for model in models.values():
            model.step(block[:, :WARM])
        steps = {row: partial(model.step, block) for row, model in models.items()}
        seconds = common.interleaved(steps, given.repeats)
        for row, model in models.items():
            cell = {"part": "time", "row": row, "length": length, "weights": sum(w.numel() for w in model.weights)}
            yield cell | summary(seconds[row])


def part_memory(located: Located, wanted: Recipe, given: argparse.Namespace) -> Iterator[Cell]:
    """Peak memory of a step, each cell in a process of its own."""
    for length in given.lengths:
        for row in given.rows:
            what = {"row": row, "length": length}
            task = {"located": located, "wanted": wanted, "threads": given.threads}
            yield {"part": "memory"} | what | common.in_own_process(__file__, **what, **task)


def worker(located: Located, row: str, length: int, wanted: Recipe, threads: int) -> Cell:
    """Bytes of one step, in a process that holds nothing else: the peak, and what is held between steps."""
    torch.set_num_threads(threads)
    source, _ = load_source(located, "float32")
    model, ids = Trained(source, row, dict(wanted.convert.mixer), wanted.stage()), prompt(source, length, 0)
    model.step(ids[:, :WARM])
    held = forget_peak()
    model.step(ids)
    return {"peak_bytes": status(PEAK), "held_bytes": held}


def claims(cells: list[Cell]) -> list[Claim]:
    """The promised numbers, where this run has measured what they need."""
    source, student, teacher = ({"row": row} for row in ("source", "student", "student+kl"))
    made = []
    for length, limit in ((1024, "≤ 1.15"), (4096, "≤ 0.9")):
        name = f"student: time of a step over the source's at {length}"
        made += common.ratio(cells, name, limit, "seconds", student, source, part="time", length=length)
    for length in sorted({cell["length"] for cell in cells}):
        name = f"student: peak memory with a teacher over without at {length}"
        made += common.ratio(cells, name, "≤ 1.25", "peak_bytes", teacher, student, part="memory", length=length)
    return made


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines: a table by row and length, and the claims."""
    machine = results["environment"]
    return [
        f"A LoRA step of {results['recipe']}: {machine['cpu']}, {machine['threads']} threads, commit "
        f"{machine['commit']}.",
        "fp32, one block: median seconds, of the source's, and peak resident memory of a process that trains.",
        *common.rows_by_length(results["cells"], "source", ms=False, scale=2.0**-30, unit="GiB"),
        *common.claims_table(results["claims"], "one block, fp32"),
    ]


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, "smollm2-135m", "bench-train")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=("memory", "time"), default=("memory", "time"))
    given = parser.parse_args()
    if given.worker:
        return print(json.dumps(worker(**read_task())))
    (results, target), wanted = common.begin(given), recipes.load(given.recipe, given.set)
    results |= {"recipe": given.recipe, "source": wanted.source.id, "mixer": dict(wanted.convert.mixer)}
    located = common.source_of(wanted)
    # Memory first: after the times this process holds several models, which its children would lack.
    for name, part in (("memory", part_memory), ("time", part_time)):
        if name in given.parts:
            common.collect(results, part(located, wanted, given), claims, target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
