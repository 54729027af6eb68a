"""Speed and memory by context length: the source, the window control and the student, interleaved in one process.

1. A prompt is random tokens, the same for all; the rows of a batch are alike. Its prefill is one forward pass, as
   `generate` makes it; its time is the median over `PREFILLS` rounds, or over fewer once they took `ENOUGH` seconds.
2. Then tokens are decoded greedily, `TURN` at a time by one model after the other, after one that is not counted. In
   every round another model goes first: noise of the machine meets all alike. Times are of single tokens.
3. Peak memory while decoding: on a GPU, what the model's weights and cache and a step take together; on a CPU, the
   resident memory of a process of its own, interpreter and libraries included, from after its prefill on. There, beyond
   `READ` tokens, the cache of a model that is not linearized is filled by repeating its first keys and values, whose
   content does not change its size; a linearized one reads every token.
4. On a GPU the clock is read only when it is idle.
"""

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from linearize.checkpoint.describe import learned_positions
from linearize.checkpoint.sources import Located
from linearize.errors import InputError
from linearize.evaluation.caches import cache_bytes, stretch
from linearize.evaluation.clock import (
    PEAK,
    forget_peak,
    has_peak,
    in_process,
    no_memory,
    read_task,
    rotated,
    status,
    summary,
    timed,
)
from linearize.evaluation.columns import Models, read_config
from linearize.evaluation.quiet import quiet
from linearize.evaluation.suite import SpeedSpec
from linearize.model.attention import linearized_modules
from linearize.model.sizes import text_sizes
from linearize.model.transformers_api import CACHE
from linearize.progress import Bar

COLUMNS = ("source", "window", "student")
"""Columns that take part; the others run one of these models' code."""

PREFILLS = 3
ENOUGH = 20.0
TURN = 3
READ = 2048
WARM = 32
"""Tokens of a first prefill that is not timed."""

Cell = dict[str, Any]

# --- one model --------------------------------------------------------------------------------------------------------


def prefill(model: PreTrainedModel, cache: Cache, ids: Tensor, piece: int) -> Tensor:
    """Read a prompt into a cache.

    Args:
        model: a causal LM.
        cache: to read into.
        ids: int64 [B, T].
        piece: tokens of one forward pass.

    Returns:
        Logits of the last position [B, 1, vocabulary].
    """
    for part in ids.split(piece, dim=1):
        logits = model(part, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
    return logits


def decode(model: PreTrainedModel, cache: Cache, token: Tensor, steps: int) -> list[float]:
    """Decode greedily; one more token goes before those that count, to warm up.

    A cache that can forget its last tokens is as long afterwards as before.

    Args:
        model: a causal LM.
        cache: holds what was read.
        token: int64 [B, 1], the first one.
        steps: how many tokens count.

    Returns:
        Seconds of each token.
    """

    def step() -> Tensor:
        return model(token, **{CACHE: cache}, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    seconds = []
    for _ in range(steps + 1):
        token, spent = timed(step, model.device)
        seconds.append(spent)
    # Asked by class: sliding layers claim that they can be cropped, and cannot once their window is full.
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.crop(-steps - 1)
    return seconds[1:]


def _resident_peak(model: PreTrainedModel, cache: Cache, batch: int) -> int:
    """Peak of this process's resident bytes while a model on the CPU decodes; the cache holds one row."""
    cache.batch_repeat_interleave(batch)
    forget_peak()  # what the prefill needed: the peak from here on is that of decoding
    decode(model, cache, torch.zeros(batch, 1, dtype=torch.int64), TURN)
    return status(PEAK)


def _allocated_peak(model: PreTrainedModel, cache: Cache, batch: int) -> int:
    """Peak bytes on the GPU while decoding, as if nothing but this model and its cache were there."""
    device = model.device
    torch.cuda.reset_peak_memory_stats(device)
    own = sum(x.nbytes for x in [*model.parameters(), *model.buffers()]) + cache_bytes(cache)
    others = torch.cuda.memory_allocated(device) - own
    decode(model, cache, torch.zeros(batch, 1, dtype=torch.int64, device=device), TURN)
    return torch.cuda.max_memory_allocated(device) - others


def prompt(model: PreTrainedModel, context: int, seed: int) -> Tensor:
    """Random tokens.

    Args:
        model: for its vocabulary and device.
        context: how many.
        seed: the same seed gives the same tokens.

    Returns:
        int64 [1, context].
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(text_sizes(model.config).vocabulary, (1, context), generator=generator).to(model.device)


# --- several, interleaved ---------------------------------------------------------------------------------------------


class _Clocked:
    """One model at one context and batch: its cache and times.

    Args:
        name: of its column.
        model: a causal LM.
        ids: the prompt, int64 [batch, context].
        steps: tokens to decode.
    """

    def __init__(self, name: str, model: PreTrainedModel, ids: Tensor, steps: int):
        self.name, self.model, self.ids, self.steps = name, model, ids, steps
        self.cache, self.cache_bytes, self.peak_bytes = DynamicCache(config=model.config), 0, None
        self.reading: list[float] = []
        self.writing: list[float] = []

    def read(self) -> None:
        self.cache = cache = DynamicCache(config=self.model.config)  # lets go of the last round's
        context = self.ids.shape[1]
        logits, spent = timed(lambda: prefill(self.model, cache, self.ids, context), self.model.device)
        if logits.isnan().any():
            raise InputError(
                f"{self.name}: the prediction after {context} tokens is not a number; the model's weights are damaged, "
                "or its dtype is too narrow: try --dtype float32"
            )
        self.cache_bytes = cache_bytes(cache)
        self.reading.append(spent)

    def write(self) -> None:
        count = min(TURN, self.steps - len(self.writing))
        self.writing.extend(decode(self.model, self.cache, self.ids[:, :1], count))

    def weigh(self) -> None:
        if self.model.device.type == "cuda":
            self.peak_bytes = _allocated_peak(self.model, self.cache, len(self.ids))

    def cell(self) -> Cell:
        token = summary(self.writing)
        return {
            "prefill_seconds": statistics.median(self.reading),
            "token_seconds": token["seconds"],
            "low": token["low"],
            "high": token["high"],
            "peak_bytes": self.peak_bytes,
            "cache_bytes": self.cache_bytes,
        }


@torch.inference_mode()
def interleaved(
    models: dict[str, PreTrainedModel], context: int, batch: int, steps: int, seed: int
) -> tuple[dict[str, Cell], dict[str, str]]:
    """Times of several models for one context and batch, each doing a little at a time, one after the other.

    Args:
        models: by column.
        context: tokens of the prompt.
        batch: rows, all alike.
        steps: tokens to decode.
        seed: of the prompt.

    Returns:
        Cells of columns[name]["speed"] without their context, batch and, on a CPU, peak; and why a model has none.

    Raises:
        InputError: a model's prediction is not a number.
    """
    clocked = {
        name: _Clocked(name, model, prompt(model, context, seed).expand(batch, -1), steps)
        for name, model in models.items()
    }
    failed: dict[str, str] = {}

    def each(act: Callable[[_Clocked], None], first: int = 0) -> None:
        for name in rotated([*clocked], first):
            try:
                act(clocked[name])
            except (RuntimeError, MemoryError) as error:
                if not no_memory(error):
                    raise
                failed[name] = "out of memory"
                del clocked[name]

    for number in range(PREFILLS):
        each(_Clocked.read, first=number)
        if sum(sum(model.reading) for model in clocked.values()) > ENOUGH:
            break
    for number in range(-(-steps // TURN)):
        each(_Clocked.write, first=number)
    each(_Clocked.weigh)
    return {name: model.cell() for name, model in clocked.items()}, failed


@torch.inference_mode()
def _warm_up(models: dict[str, PreTrainedModel], seed: int) -> None:
    """Read and decode a few tokens with each model: libraries load and compile on first use."""
    for model in models.values():
        cache = DynamicCache(config=model.config)
        prefill(model, cache, prompt(model, WARM, seed), WARM)
        decode(model, cache, prompt(model, 1, seed), 1)


# --- memory on a CPU: one process per cell ----------------------------------------------------------------------------


@torch.inference_mode()
def worker(task: dict[str, Any]) -> Cell:
    """Peak resident bytes of one column, context and batch, in a process that holds nothing else."""
    torch.set_num_threads(task["threads"])
    try:
        with quiet(), _models(**task["models"]).column(task["column"]) as model:
            cache, context = DynamicCache(config=model.config), task["context"]
            read = context if linearized_modules(model) else min(context, READ)
            prefill(model, cache, prompt(model, read, task["seed"]), read)
            return {"peak_bytes": _resident_peak(model, stretch(cache, context), task["batch"])}
    except (RuntimeError, MemoryError) as error:
        if no_memory(error):
            return {"failed": "out of memory"}
        raise


def _models(folder: str, located: Located, dtype: str, seed: int, quantize: str | None) -> Models:
    return Models(folder, read_config(folder), located, dtype, "cpu", seed, quantize=quantize)


def process_peak(models: Models, column: str, context: int, batch: int) -> Cell:
    """Peak of resident memory while one column decodes in a process of its own.

    Args:
        models: says what to open.
        column: of `COLUMNS`.
        context: tokens in the cache.
        batch: rows.

    Returns:
        {peak_bytes} or {failed: reason}; empty on a GPU, which needs no process, and where the system does not tell.
    """
    if models.device.type != "cpu" or not has_peak():
        return {}
    dtype = str(models.dtype).removeprefix("torch.")
    opening = {"folder": models.folder, "located": models.located, "dtype": dtype, "seed": models.seed}
    opening |= {"quantize": models.quantize}
    task = {"models": opening, "threads": torch.get_num_threads(), "seed": models.seed}
    command = ["-m", "linearize.evaluation.speed"]
    return in_process(command, {**task, "column": column, "context": context, "batch": batch})


# --- the section ------------------------------------------------------------------------------------------------------


def section(
    spec: SpeedSpec, models: Models, columns: dict[str, dict[str, Any]], bar: Bar, save: Callable[[], None]
) -> None:
    """Measure what columns of results.json lack of their `speed`, and call `save` after each context and batch.

    What cannot be measured goes to `speed_left_out` with its reason, and is not tried again.

    Args:
        spec: contexts, batches and steps.
        models: opens the models.
        columns: name -> column; those that are none of `COLUMNS` are left as they are.
        bar: shows what is running.
        save: keeps the columns as they are now.
    """
    names = [name for name in columns if not complete(spec, name, columns[name])]
    if not names:
        return
    bar.start("speed: loading")
    with models.together(names) as opened:
        _warm_up(opened, models.seed)
        for context, batch in _keys(spec):
            todo = [name for name in names if (context, batch) not in _done(columns[name])]
            if not todo:
                continue
            bar.start(f"speed: {context} tokens, batch {batch}", total=len(todo) + 1)
            cells, reasons = _measure(models, {name: opened[name] for name in todo}, context, batch, spec.steps, bar)
            for name in todo:
                key = {"context": context, "batch": batch}
                if name in cells:
                    columns[name].setdefault("speed", []).append({**key, **cells[name]})
                else:
                    columns[name].setdefault("speed_left_out", []).append({**key, "reason": reasons[name]})
                    bar.line(f"speed: without {name} at {context} tokens, batch {batch}: {reasons[name]}")
            save()
    bar.line("speed: measured")


def _measure(
    models: Models, opened: dict[str, PreTrainedModel], context: int, batch: int, steps: int, bar: Bar
) -> tuple[dict[str, Cell], dict[str, str]]:
    """Cells of one context and batch, and why a model has none."""
    # A cache that cannot forget its last tokens grows in every turn by those that it counts and the one before them.
    length = context + steps + -(-steps // TURN) + TURN + 1
    reasons: dict[str, str] = {}
    peaks: dict[str, Cell] = {}
    for name, model in opened.items():
        limit = learned_positions(model)
        if limit is not None and length > limit:
            reasons[name] = f"the model has learned positions for {limit} tokens"
            continue
        peak = process_peak(models, name, context, batch)
        if "failed" in peak:
            reasons[name] = peak["failed"]
        else:
            peaks[name] = peak
        bar.advance()
    cells, failed = interleaved({name: opened[name] for name in peaks}, context, batch, steps, models.seed)
    return {name: cell | peaks[name] for name, cell in cells.items()}, reasons | failed


def complete(spec: SpeedSpec | None, name: str, column: dict[str, Any]) -> bool:
    """Whether a column has all that this section gives it.

    Args:
        spec: what was asked for; None where nothing was.
        name: of the column.
        column: its entry in results.json.
    """
    return spec is None or name not in COLUMNS or set(_keys(spec)) <= _done(column)


def _keys(spec: SpeedSpec) -> list[tuple[int, int]]:
    return sorted((context, batch) for context in spec.contexts for batch in spec.batches)


def _done(column: dict[str, Any]) -> set[tuple[int, int]]:
    cells = [*column.get("speed", []), *column.get("speed_left_out", [])]
    return {(cell["context"], cell["batch"]) for cell in cells}


if __name__ == "__main__":
    print(json.dumps(worker(read_task())))
