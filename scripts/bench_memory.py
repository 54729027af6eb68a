"""Memories with the same bytes of cache, untrained or as folders: perplexity and recall beside the source's.

    python scripts/bench_memory.py --texts WEB.jsonl.gz --caches 2MiB 7.2MiB 32MiB --threads 1
    python scripts/bench_memory.py --texts WEB.jsonl.gz --rows --folders trained=runs/smollm2-135m-best/1-distil
    python scripts/bench_memory.py --caches 2MiB 7.2MiB 32MiB --speed 30 --threads 2    # times, on a quiet machine
    python scripts/bench_memory.py --texts WEB.jsonl.gz --rows --add A.json B.json    # join what was measured apart

Every layer of the recipe's source is converted, with its window and sinks. The number of clusters, of exact tokens, or
of tokens in the window is the largest with which the cache of one row, tokens in 16 bits, fits the budget. Perplexity
is over the source's, block by block on WikiText-2 and on each other text, with a bootstrap interval over the blocks;
recall is asked some windows back, depths inside the window left out. Times of a token and of a prefill are those of
`linearize bench`, all rows interleaved. Writes eval/results/bench-memory.json, and a table beside it.
"""

import argparse
import gzip
import json
import math
import random
import statistics
from collections.abc import Iterator
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from torch.nn import functional as F

from linearize.checkpoint.open import load
from linearize.checkpoint.sources import load_source
from linearize.evaluation import perplexity, recall, speed
from linearize.formats import format_bytes, parse_bytes
from linearize.model.mixers import build_config
from linearize.model.modeling import linearize_
from linearize.model.sizes import state_bytes
from linearize.recipe import load as recipes

ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a longer window": ({"name": "window", "combine": "none"}, "window"),
    "clusters, int8": ({"name": "clusters", "state_dtype": "int8"}, "clusters"),
    "clusters, int8, by distance": ({"name": "clusters", "state_dtype": "int8", "expected": 0.0}, "clusters"),
    "clusters, int8, by attention": ({"name": "clusters", "state_dtype": "int8", "expected": 1.0}, "clusters"),
    "clusters, int4": ({"name": "clusters", "state_dtype": "int4"}, "clusters"),
    "clusters, bf16": ({"name": "clusters", "state_dtype": "bfloat16"}, "clusters"),
    "clusters, fp32": ({"name": "clusters"}, "clusters"),
    "gated_deltanet + exact, int8": ({"name": "gated_deltanet", "state_dtype": "int8"}, "exact"),
    "gla + exact, int8": ({"name": "gla", "state_dtype": "int8"}, "exact"),
    "kda + exact, int8": ({"name": "kda", "state_dtype": "int8"}, "exact"),
}
"""Row -> mixer, and the number that fills the budget."""
SOURCE = "source"
LENGTH = 2048
"""Tokens at which a cache is counted: beyond window and sinks it no longer grows."""


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


def questions(tokenizer: Any, task: str, window: int, back: int, count: int, seed: int) -> list[recall.Item]:
    """Items of one task `back` windows back, as many at each depth that lies beyond the window."""
    length = back * window
    depths = [depth for depth in recall.depths(task) if (1 - (depth or 0.0)) * length > 2 * window]
    return [x for at in depths for x in recall.items(task, tokenizer, length, seed, count // len(depths), at)]


def models(given: argparse.Namespace, source: Any, reach: dict[str, Any]) -> Iterator[tuple[common.Cell, Any]]:
    """What names a row, and its model: the source, itself in every form, then folders."""
    yield {"row": SOURCE}, source
    for cache in given.caches:
        for row in given.rows:
            mixer, key = ROWS[row]
            mixer = fitted(source, reach | mixer, key, parse_bytes(cache))
            linearize_(source, mixer)
            yield {"row": row, "cache": cache, "number": mixer[key], "of": key}, source
    for name, _, folder in (text.partition("=") for text in given.folders):
        yield {"row": name}, load(folder, dtype=torch.float32)[0]


def opened(given: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The recipe's source, its tokenizer, and the window and sinks of every row."""
    wanted = recipes.load(given.recipe, given.set)
    source, tokenizer = load_source(common.source_of(wanted), torch.float32)[:2]
    return source, tokenizer, {key: wanted.convert.mixer[key] for key in ("window", "sinks")}


def cells(given: argparse.Namespace, texts: dict[str, str]) -> Iterator[common.Cell]:
    """A cell per row and text, or task and distance."""
    source, tokenizer, reach = opened(given)
    blocks = {name: perplexity.cut(text, tokenizer, given.length, given.blocks) for name, text in texts.items()}
    asked = {
        (task, back): questions(tokenizer, task, reach["window"], back, given.items, given.seed)
        for task in given.tasks
        for back in given.back
    }
    losses: dict[str, torch.Tensor] = {}
    whole = deepcopy(source, {id(x): x for x in source.parameters()})
    for facts, model in models(given, source, reach):
        if facts["row"] != SOURCE:
            facts["bytes"] = state_bytes(model.config, LENGTH)["linearized"]
        for name, ids in blocks.items():
            own, nats = beside(model, whole if facts["row"] != SOURCE else None, ids, given.kl)
            value = interval(own, losses.setdefault(name, own), given.seed)
            cell = {**facts, "part": "perplexity", "text": name, "perplexity": math.exp(own.double().mean())}
            yield cell | {"over_source": value}
            if nats:
                yield {**facts, "part": "kl", "text": name, "kl": nats}
        for (task, back), items in asked.items():
            scores = recall.right(model, tokenizer, items, given.batch)
            yield {**facts, "part": "recall", "task": task, "back": back, **recall.summary(scores)}


@torch.inference_mode()
def beside(model: Any, source: Any, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, list[float]]:
    """Losses [blocks, tokens], and of the first `count` blocks the KL divergence to a source, in nats per token."""
    losses, nats = [], []
    for number, block in enumerate(ids):
        if source is None or number >= count:
            losses.append(perplexity.losses(model, block[None])[0])
            continue
        pairs = zip(perplexity.predictions(model, block), perplexity.predictions(source, block), strict=True)
        logs = [(torch.log_softmax(own, -1), torch.log_softmax(far, -1), tokens) for (own, tokens), (far, _) in pairs]
        losses.append(torch.cat([F.nll_loss(own, tokens, reduction="none") for own, _, tokens in logs]))
        far = [F.kl_div(own, far, log_target=True, reduction="none").sum(-1) for own, far, _ in logs]
        nats.append(torch.cat(far).mean().item())
    return torch.stack(losses), nats


def speeds(given: argparse.Namespace) -> Iterator[common.Cell]:
    """Seconds of a token behind --length tokens, and of reading them, all rows interleaved on the same weights."""
    source, _, reach = opened(given)
    shared = {id(x): x for x in source.parameters()}
    rows = [(facts, deepcopy(model, dict(shared))) for facts, model in models(given, source, reach)]
    timed, _ = speed.interleaved({str(i): row[1] for i, row in enumerate(rows)}, given.length, 1, given.speed, 0)
    for i, (facts, model) in enumerate(rows):
        size = {} if facts["row"] == SOURCE else {"bytes": state_bytes(model.config, LENGTH)["linearized"]}
        yield {**facts, **size, "part": "speed", **timed[str(i)]}


def markdown(results: dict[str, Any]) -> list[str]:
    """A row per memory and budget: size, perplexity over the source's on each text, right answers."""
    measured = results["cells"]
    texts = list(dict.fromkeys(cell["text"] for cell in measured if cell["part"] == "perplexity"))
    tasks = list(dict.fromkeys((cell["task"], cell["back"]) for cell in measured if cell["part"] == "recall"))
    far = [f"KL, {text}" for text in texts if any(cell["part"] == "kl" for cell in measured)]
    timed = ["ms a token", "s to read"] if any(cell["part"] == "speed" for cell in measured) else []
    rows = []
    for row, cache in dict.fromkeys((cell["row"], cell.get("cache")) for cell in measured):
        own = [cell for cell in measured if (cell["row"], cell.get("cache")) == (row, cache)]
        line = [row, str(own[0].get("number", "")), format_bytes(own[0]["bytes"]) if "bytes" in own[0] else ""]
        for name in texts:
            value = next((x["over_source"] for x in own if (x["part"], x.get("text")) == ("perplexity", name)), None)
            form = "{:.3f} ({:.3f} to {:.3f})" if row != SOURCE else "1"
            line.append(form.format(*value) if value else "")
        for task, back in tasks:
            value = next((c for c in own if (c.get("task"), c.get("back")) == (task, back)), None)
            line.append(f"{100 * value['value']:.0f} ± {100 * value['stderr']:.0f}" if value else "")
        nats = {cell["text"]: f"{statistics.mean(cell['kl']):.4f}" for cell in own if cell["part"] == "kl"}
        line += [nats.get(name, "") for name in texts if far]
        own = [cell for cell in own if cell["part"] == "speed"]
        if timed:
            line += [f"{1e3 * own[0]['token_seconds']:.0f}", f"{own[0]['prefill_seconds']:.1f}"] if own else ["", ""]
        rows.append(line)
    machine, given, added = results["environment"], results["settings"], results.get("added", [])
    asked = {cell["n"] for cell in measured if cell["part"] == "recall"} or {given["items"]}
    items = " to ".join(str(count) for count in sorted({min(asked), max(asked)}))
    head = ["", "clusters, exact tokens or window", "cache", *(f"perplexity, {text}" for text in texts)]
    quality = (
        f"Perplexity is over the source's, {given['blocks']} blocks of {given['length']} tokens of each text, with a "
        f"bootstrap interval of 95 % over the blocks; recall is right answers in per cent, {items} items each, "
        "± standard error."
    )
    times = f"Times behind {given['length']} tokens, all rows interleaved."
    return [
        f"SmolLM2-135M-Instruct, window of 64 and 4 sinks unless said otherwise, tokens in 16 bits, not trained unless "
        f"said: {machine['cpu']}, {given['threads']} threads, commit {machine['commit']}, seed {given['seed']}.",
        times if timed and not texts else quality,
        *(f"Joined later, {'; '.join(more['rows'])}: {more['cpu']}, commit {more['commit']}." for more in added),
        *common.table((*head, *(f"{task}, {back} windows back" for task, back in tasks), *far, *timed), rows),
    ]


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, "smollm2-135m-best", "bench-memory")
    parser.add_argument("--caches", nargs="+", default=["7.2MiB"], help="bytes of cache of one row")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help=".txt, or .jsonl.gz with a field `text`")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a block")
    parser.add_argument("--blocks", type=int, default=16, help="of each text; 0: no perplexity")
    parser.add_argument("--kl", type=int, default=0, help="blocks of each text on which the KL divergence is measured")
    parser.add_argument("--items", type=int, default=48, help="of each task")
    parser.add_argument("--tasks", nargs="*", choices=recall.TASKS, default=["multikey", "copy", "mqar"])
    parser.add_argument("--back", type=int, nargs="+", default=[16], help="windows from a question to what it asks")
    parser.add_argument("--batch", type=int, default=4, help="prompts at a time")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--folders", nargs="*", default=[], metavar="NAME=DIR", help="more rows, trained or not")
    parser.add_argument("--speed", type=int, default=0, help="tokens to decode: measure times alone")
    parser.add_argument("--add", type=Path, nargs="*", help="join these results and measure nothing")
    given = parser.parse_args()
    results, target = common.begin(given)
    if given.add:
        parts = [json.loads(file.read_text(encoding="utf-8")) for file in given.add]
        results |= {key: parts[0][key] for key in ("settings", "environment")}
        later = [{**part["environment"], **part["settings"]} for part in parts[1:]]
        for part in later:
            part["rows"] = [*part["rows"], *part.get("folders", [])]
        older = [old for old in parts[0].get("added", []) if old["rows"] not in [new["rows"] for new in later]]
        results["added"] = [*older, *later]
        results["cells"] = joined([part["cells"] for part in parts])
        common.save(results, target)
    else:
        results["settings"]["texts"] = [text.name for text in given.texts]
        results["settings"]["folders"] = [text.partition("=")[0] for text in given.folders]
        texts = {"WikiText-2, validation": common.validation_text()} if given.blocks else {}
        texts |= {path.name.split(".")[0]: read(path) for path in given.texts if given.blocks}
        made = speeds(given) if given.speed else cells(given, texts)
        common.collect(results, made, lambda _: [], target)
    common.write_markdown(markdown(results), target)


def joined(parts: list[list[common.Cell]]) -> list[common.Cell]:
    """The cells of several files, of equal ones the last, the source first."""
    keys = ("row", "cache", "part", "text", "task", "back")
    by_key = {tuple(cell.get(key) for key in keys): cell for part in parts for cell in part}
    return sorted(by_key.values(), key=lambda cell: cell["row"] != SOURCE)


def read(path: Path) -> str:
    """A text file, or the first documents of a collection."""
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return "\n\n".join(json.loads(line)["text"] for line in file)[:3_000_000]


if __name__ == "__main__":
    main()
