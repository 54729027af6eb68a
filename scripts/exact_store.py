"""Recurrences with tokens that stay exact, beside clusters and a longer window, with as many bytes of cache.

    python scripts/exact_store.py --text OTHER.jsonl.gz --threads 1
    python scripts/exact_store.py --text OTHER.jsonl.gz --threads 1 --add A.json B.json    # rows measured side by side

Untrained: every layer of the recipe's source is converted, with its window and sinks. The number of exact tokens, of
clusters, or of tokens in the window is the largest with which the cache of one row, tokens in 16 bits, fits the budget.
Perplexity is that of blocks of the source's loss more, per token, with a bootstrap interval over the blocks; recall is
asked 16 windows back, depths inside the window left out. Writes eval/results/exact-store.json, and a table beside it.
"""

import argparse
import gzip
import json
import math
import random
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import bench_common as common
import torch

from linearize.checkpoint.sources import load_source
from linearize.evaluation import perplexity, recall
from linearize.formats import format_bytes, parse_bytes
from linearize.model.mixers import build_config
from linearize.model.modeling import linearize_
from linearize.model.sizes import state_bytes
from linearize.recipe import load as recipes

ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a longer window": ({"name": "window", "combine": "none"}, "window"),
    "clusters, int8": ({"name": "clusters", "state_dtype": "int8"}, "clusters"),
    "gated_deltanet + exact, int8": ({"name": "gated_deltanet", "state_dtype": "int8"}, "exact"),
    "gla + exact, int8": ({"name": "gla", "state_dtype": "int8"}, "exact"),
    "kda + exact, int8": ({"name": "kda", "state_dtype": "int8"}, "exact"),
    "gla + exact, bf16": ({"name": "gla", "state_dtype": "bfloat16"}, "exact"),
}
"""Row -> mixer, and the number that fills the budget."""
SOURCE = "source"
LENGTH, BACK = 2048, 16
"""Tokens of a block of text; windows between a question and the beginning of its context."""


def fitted(model: Any, mixer: dict[str, Any], key: str, budget: int) -> dict[str, Any]:
    """The mixer with the largest number, in steps of 8 for clusters, whose cache fits the budget."""
    step, low, high = 8 if key == "clusters" else 1, 1, 4096

    def fits(number: int) -> bool:
        values, config = build_config({**mixer, key: number * step}).to_dict(), copy(model.config)
        config.linearize = {"layers": dict.fromkeys(map(str, range(config.num_hidden_layers)), values)}
        return state_bytes(config, LENGTH)["linearized"] <= budget

    low = 2 if key == "clusters" else low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {**mixer, key: low * step}


def interval(losses: torch.Tensor, source: torch.Tensor, seed: int) -> list[float]:
    """Perplexity over the source's, and the bounds of 95 of 100 draws of blocks; losses [blocks, tokens]."""
    per_block, rng = (losses - source).double().mean(1).tolist(), random.Random(seed)
    draws = sorted(sum(rng.choices(per_block, k=len(per_block))) / len(per_block) for _ in range(2000))
    return [math.exp(x) for x in (sum(per_block) / len(per_block), draws[50], draws[1949])]


def questions(tokenizer: Any, task: str, window: int, count: int, seed: int) -> list[recall.Item]:
    """Items of one task, as many at each depth that lies beyond the window."""
    length = BACK * window
    depths = [depth for depth in recall.depths(task) if (1 - (depth or 0.0)) * length > 2 * window]
    return [x for at in depths for x in recall.items(task, tokenizer, length, seed, count // len(depths), at)]


def cells(given: argparse.Namespace, texts: dict[str, str]) -> Iterator[common.Cell]:
    """A cell per row, and text or task; first those of other files, whose rows are not measured again."""
    added = [cell for file in given.add for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    order = [SOURCE, *ROWS]
    known = {(c["row"], c.get("text") or c["task"]): c for c in added}
    yield from sorted(known.values(), key=lambda cell: order.index(cell["row"]))
    chosen = {name: row for name, row in ROWS.items() if name in given.rows and name not in {c["row"] for c in added}}
    if not chosen:
        return
    wanted = recipes.load(given.recipe)
    model, tokenizer = load_source(common.source_of(wanted), torch.float32)[:2]
    window, sinks = wanted.convert.mixer["window"], wanted.convert.mixer["sinks"]
    blocks = {name: perplexity.cut(text, tokenizer, LENGTH, given.blocks) for name, text in texts.items()}
    asked = {task: questions(tokenizer, task, window, given.items, given.seed) for task in given.tasks}
    source: dict[str, torch.Tensor] = {}
    for row in (SOURCE, *chosen):
        facts: common.Cell = {"row": row}
        if row in chosen:
            mixer, key = chosen[row]
            mixer = fitted(model, {"window": window, "sinks": sinks, **mixer}, key, parse_bytes(given.cache))
            linearize_(model, mixer)
            facts |= {"mixer": mixer, "number": mixer[key], "of": key}
            facts["bytes"] = state_bytes(model.config, LENGTH)["linearized"]
        for name, ids in blocks.items():
            losses = perplexity.losses(model, ids)
            source.setdefault(name, losses)
            value = interval(losses, source[name], given.seed)
            cell = {**facts, "part": "perplexity", "text": name, "perplexity": math.exp(losses.double().mean())}
            yield cell | {"over_source": value}
        for task, items in asked.items():
            scores = recall.right(model, tokenizer, items, 4)
            yield {**facts, "part": "recall", "task": task, **recall.summary(scores)}


def markdown(results: dict[str, Any]) -> list[str]:
    """A row per memory: size, perplexity over the source's on each text, right answers."""
    found = results["cells"]
    texts = list(dict.fromkeys(cell["text"] for cell in found if cell["part"] == "perplexity"))
    tasks = list(dict.fromkeys(cell["task"] for cell in found if cell["part"] == "recall"))
    rows = []
    for row in dict.fromkeys(cell["row"] for cell in found):
        own = {cell.get("text") or cell["task"]: cell for cell in found if cell["row"] == row}
        first = next(iter(own.values()))
        line = [row, str(first.get("number", "")), format_bytes(first["bytes"]) if "bytes" in first else ""]
        for name in texts:
            value = own.get(name)
            form = "{:.3f} ({:.3f} to {:.3f})" if row != SOURCE else "1"
            line.append(form.format(*value["over_source"]) if value else "")
        for task in tasks:
            value = own.get(task)
            line.append(f"{100 * value['value']:.0f} ± {100 * value['stderr']:.0f}" if value else "")
        rows.append(line)
    machine, given = results["environment"], results["settings"]
    head = ["", "exact tokens, clusters or window", "cache", *(f"perplexity, {text}" for text in texts)]
    return [
        f"SmolLM2-135M-Instruct, untrained, window of 64 and 4 sinks unless said otherwise, cache of {given['cache']} "
        f"with tokens in 16 bits: {machine['cpu']}, {given['threads']} threads, commit {machine['commit']}, seed "
        f"{given['seed']}.",
        f"Perplexity is over the source's, {given['blocks']} blocks of {LENGTH} tokens of each text, with a bootstrap "
        f"interval of 95 % over the blocks; recall is right answers in per cent, {BACK} windows back, "
        f"{given['items']} items each, ± standard error.",
        *common.table((*head, *tasks), rows),
    ]


def main() -> None:
    """Measure what the file does not hold yet, write, print."""
    parser = common.options(__doc__, "smollm2-135m-best", "exact-store")
    parser.add_argument("--cache", default="7.2MiB")
    parser.add_argument("--text", type=Path, required=True, help="another text: .txt, or .jsonl.gz with a field `text`")
    parser.add_argument("--blocks", type=int, default=8, help="of each text")
    parser.add_argument("--items", type=int, default=16, help="of each task")
    parser.add_argument("--tasks", nargs="*", choices=recall.TASKS, default=["multikey", "copy", "mqar"])
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="results files with the same settings")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    given = parser.parse_args()
    results, target = common.begin(given)
    results["settings"]["text"] = given.text.name
    del results["settings"]["add"], results["settings"]["rows"]
    other = given.text.read_text(encoding="utf-8") if given.text.suffix == ".txt" else _field(given.text)
    texts = {"WikiText-2, validation": common.validation_text(), given.text.name.split(".")[0]: other}
    common.collect(results, cells(given, texts), lambda found: [], target)
    common.write_markdown(markdown(results), target)


def _field(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return "\n\n".join(json.loads(line)["text"] for line in file)[:3_000_000]


if __name__ == "__main__":
    main()
