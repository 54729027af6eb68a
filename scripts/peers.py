"""A converted model beside kvpress's presses: same source, same bytes of cache, same recall items and texts.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install torch "kvpress==0.5.5"    # an environment of its own
    python scripts/peers.py runs/converted --python /tmp/peers/bin/python             # hours on one core
    python scripts/peers.py runs/converted --python ... --lengths 1024 --items 4 --blocks 2    # a look

Everybody reads the context before the question is known. The bytes are those of the folder's cache with weights in
bfloat16, as `linearize inspect` counts them; a press keeps as many bfloat16 keys and values as fit in them. All compute
in float32. The cache of a press grows by the question and the answer, and by the text that goes on; the folder's does
not. Depths inside the window are not asked. CAM compresses only while it decodes: few items, at the shortest length.

Answers are kept in --work, line by line: a second start goes on, and another folder with a cache of as many bytes
takes over what the presses answered. Writes eval/results/peers.json, and tables (.md) beside it.
"""

import argparse
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from peers_kvpress import CAM, FULL, OBSERVED, outcome

from linearize.checkpoint import sources
from linearize.checkpoint.identity import identity
from linearize.checkpoint.open import load, open_config, open_tokenizer
from linearize.errors import InputError
from linearize.evaluation import perplexity, recall
from linearize.evaluation.caches import cache_bytes
from linearize.evaluation.columns import window_of

PRESSES = ("StreamingLLM", "SnapKV", "ExpectedAttention", "KeyDiff", "TOVA", "Merging (SnapKV)", OBSERVED, CAM)
TEXT = "text that goes on"
VERSIONS = (
    "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('kvpress', 'transformers', 'torch')))"
)
CONTINUED = 64
"""Tokens whose loss is measured behind a context."""


def questions(tokenizer: Any, task: str, length: int, window: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Items of one recall task: context, and the tokens of question and answers behind it, with their spans."""
    depths = [depth for depth in recall.depths(task) if (1 - (depth or 0.0)) * length > 2 * window]
    for depth in depths:
        for number, item in enumerate(recall.items(task, tokenizer, length, seed, count // len(depths), depth)):
            whole, context = (tokenizer(text)["input_ids"] for text in (item.text, item.prompt[: item.context]))
            # A token may hold the end of the context and the beginning of the question.
            start = next((i for i, (a, b) in enumerate(zip(whole, context, strict=False)) if a != b), len(context))
            spans = [[len(tokenizer(text)["input_ids"]) - start for text in (a, a + b)] for a, b in item.steps]
            cell = {"task": task, "length": length, "number": number, "depth": depth, "spans": spans}
            yield cell | {"context": whole[:start], "ids": whole[start:]}


def texts(tokenizer: Any, length: int, blocks: int) -> Iterator[dict[str, Any]]:
    """Blocks of WikiText-2, validation: a context, and the tokens behind it; the first of them only begins."""
    for number, row in enumerate(perplexity.cut(common.validation_text(), tokenizer, length + CONTINUED, blocks)):
        split = length - 1
        cell = {"task": TEXT, "length": length, "number": number, "depth": None, "of": blocks}
        yield cell | {"context": row[:split].tolist(), "ids": row[split:].tolist()}


def all_items(tokenizer: Any, window: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """What is asked, the first item of every task before the second of any, the shortest length first."""
    made = []
    for length, count, blocks in zip(given.lengths, given.items, given.blocks, strict=True):
        groups = [questions(tokenizer, task, length, window, count, given.seed) for task in given.tasks]
        cells = [cell for group in [*groups, texts(tokenizer, length, blocks)] for cell in group]
        made += sorted(cells, key=lambda cell: cell["number"])
    for cell in made:
        keys = ("task", "length", "depth", "number", "of")
        cell["id"] = " ".join(str(cell[key]) for key in keys if cell.get(key) is not None) + f" seed {given.seed}"
        cell["cam"] = cell["length"] == min(given.lengths) and cell["number"] < given.cam
    return made


@torch.inference_mode()
def size(folder: Path, tokenizer: Any, length: int) -> tuple[int, int]:
    """Bytes of a folder's cache with weights in bfloat16 behind a text, and of a token in its source's cache."""
    model, _ = load(folder, torch.bfloat16, "cpu")
    ids = perplexity.cut(common.validation_text(), tokenizer, length, 1)
    held = cache_bytes(model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values)
    text = model.config.get_text_config()
    heads, width = text.num_key_value_heads, getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    return held, text.num_hidden_layers * heads * width * 2 * 2


def read(model: Any, context: list[int]) -> Any:
    """The cache behind a context."""
    past, ids = None, torch.tensor([context])
    for piece in ids.split(perplexity.PIECE, dim=1):
        past = model(input_ids=piece, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
    return past


@torch.inference_mode()
def ours(folder: Path, items: list[dict[str, Any]], target: Path) -> None:
    """Answer every item with a folder, a line each; those that a file holds already are kept."""
    model, _ = load(folder, torch.float32, "cpu")
    done = {line["id"] for line in lines(target)}
    with target.open("a") as file:
        for item in items:
            if item["id"] not in done:
                ids = torch.tensor([item["ids"]])
                logits = model(input_ids=ids, past_key_values=read(model, item["context"])).logits[0]
                file.write(json.dumps({"id": item["id"], "system": "linearize", **outcome(logits, item)}) + "\n")
                file.flush()


def lines(path: Path) -> list[dict[str, Any]]:
    """What a file of answers holds."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def peers(source: Path, items: list[dict[str, Any]], kept: int, target: Path, given: argparse.Namespace) -> None:
    """Answer every item with the presses, in their environment."""
    file = given.work / "items.json"
    file.write_text(json.dumps(items))
    task = {"items": str(file), "model": str(source), "kept": kept, "answers": str(target), "presses": given.presses}
    task |= {"threads": given.threads, "observed_up_to": given.observed_up_to}
    script = Path(__file__).with_name("peers_kvpress.py")
    in_their_environment(given.python, str(script), json.dumps(task))


def in_their_environment(python: str, *arguments: str) -> str:
    """Run another Python, where neither this package nor what it sees can be imported; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run([python, *arguments], check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def cells(items: list[dict[str, Any]], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A cell per system, length and task: mean over the items that it and the full cache have answered.

    Losses are compared block by block: `value` is the loss more than the full cache's, in nats per token.
    """
    asked = {item["id"]: item for item in items}
    found: dict[tuple[str, str], dict[str, Any]] = {(a["system"], a["id"]): a for a in answers if a["id"] in asked}
    groups: dict[tuple[str, int, str], list[float]] = {}
    for (system, name), answer in found.items():
        item, full = asked[name], found.get((FULL, name))
        if full is None:
            continue
        value = answer["score"] if "score" in answer else answer["loss"] - full["loss"]
        groups.setdefault((system, item["length"], item["task"]), []).append(value)
    keys = ("system", "length", "task")
    return [{**dict(zip(keys, key, strict=True)), **recall.summary(values)} for key, values in groups.items()]


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines: a table per length, a row per system."""
    machine, given = results["environment"], results["settings"]
    found = {(cell["system"], cell["length"], cell["task"]): cell for cell in results["cells"]}
    text = [
        f"{results['folder']} ({results['mixer']}) beside {results['peers']}: {machine['cpu']}, {given['threads']} "
        f"threads, commit {machine['commit']}, seed {machine['seed']}.",
        f"Cache of {results['bytes'] / 2**20:.2f} MiB each, which holds {results['kept']} tokens of the source in "
        "bfloat16; the full cache holds the whole context.",
        "The context is read before the question is known. Right answers in per cent ± standard error (items), asked "
        "beyond the window only;",
        f"{TEXT}: nats per token that the {CONTINUED} tokens behind a context lose against the full cache.",
    ]
    for length in given["lengths"]:
        systems = list(dict.fromkeys(cell["system"] for cell in results["cells"] if cell["length"] == length))
        rows = [
            [system, *(_shown(found.get((system, length, task))) for task in [*given["tasks"], TEXT])]
            for system in systems
        ]
        text += ["", f"Context of {length} tokens, {length // results['window']} windows:"]
        text += common.table(("", *given["tasks"], TEXT), rows)
    return text


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    scale, form = (1, "+.3f") if cell["task"] == TEXT else (100, ".1f")
    error = "" if cell["stderr"] is None else f" ± {scale * cell['stderr']:{form.lstrip('+')}}"
    return f"{scale * cell['value']:{form}}{error} ({cell['n']})"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__, name="peers")
    parser.add_argument("folder", type=Path, help="converted folder")
    parser.add_argument("--python", required=True, help="of the environment with kvpress")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096], help="tokens of context and question")
    parser.add_argument("--items", nargs="+", type=int, default=[48, 48], help="per task, for each length")
    parser.add_argument("--blocks", nargs="+", type=int, default=[32, 16], help="of text, for each length")
    parser.add_argument("--tasks", nargs="+", choices=recall.TASKS, default=["needle", "multikey", "copy", "mqar"])
    parser.add_argument("--presses", nargs="+", choices=PRESSES, default=list(PRESSES))
    parser.add_argument("--cam", type=int, default=2, help="items of each task and depth for CAM")
    parser.add_argument("--observed-up-to", type=int, default=1024, help="tokens: H2O-like needs all attention weights")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="folder for what was answered so far")
    parser.add_argument("--only", choices=("peers", "ours", "report"), help="answer only for these, or for nobody")
    given = parser.parse_args()
    for name in ("items", "blocks"):
        values = getattr(given, name)[: len(given.lengths)]
        setattr(given, name, values + values[-1:] * (len(given.lengths) - len(values)))
    return given


def main() -> None:
    """Ask, answer, write, print."""
    given = arguments()
    results, target = common.begin(given)
    given.work.mkdir(parents=True, exist_ok=True)
    for key in ("folder", "python", "work"):  # where things lie here, which is nobody's concern later
        del results["settings"][key]
    config, tokenizer = open_config(given.folder), open_tokenizer(given.folder)
    window = (window_of(config) or (recall.WINDOW, 0))[0]
    located = sources.fetch(sources.relocate(config.linearize["source"]))
    held, token = size(given.folder, tokenizer, min(given.lengths))
    kept = held // token
    items = all_items(tokenizer, window, given)
    digest = hashlib.sha256(json.dumps(identity(given.folder)).encode()).hexdigest()[:12]
    files = given.work / f"linearize-{digest}.jsonl", given.work / f"kvpress-{kept}.jsonl"
    if given.only in (None, "peers"):
        source = located.path
        if located.gguf is not None and not (source := given.work / "source").exists():
            sources.materialise(located, source)
        peers(source, items, kept, files[1], given)
    if given.only in (None, "ours"):
        ours(given.folder, items, files[0])
    mixer = next(iter(config.linearize["layers"].values()))
    results["peers"] = in_their_environment(given.python, "-c", VERSIONS).strip()
    results |= {"folder": given.folder.name, "mixer": mixer["name"], "identity": digest, "bytes": held, "kept": kept}
    results |= {"window": window, "cells": cells(items, [*lines(files[1]), *lines(files[0])])}
    common.save(results, target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
