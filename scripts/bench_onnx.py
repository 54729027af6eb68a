"""An exported graph beside the model it came from: tokens, time per token, memory, start-up, size on disk.

    python scripts/bench_onnx.py --folder runs/best/merged --graphs /tmp/graphs --parts export equal size
    python scripts/bench_onnx.py --folder runs/best/merged --graphs /tmp/graphs --parts speed start --more

export writes into --graphs what is not there yet: the model in fp32 and int8, and its source in fp32, as graphs. equal
compares greedy tokens of the fp32 graph with those of `generate`, on pieces of the embedded validation text. speed is
the median of decoded tokens, batch 1, decoders interleaved; beyond --read tokens the counters of a linearized state
are set (neither its size nor what a step does changes) and a source's cache is repeated, as `linearize bench` does.

Writes eval/results/bench-onnx-NAME.json as it goes, and a table (.md) beside it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import bench_common as common
import numpy as np
import torch
from bench_common import Cell
from transformers import DynamicCache

from linearize.checkpoint.open import load
from linearize.checkpoint.sources import load_source, relocate
from linearize.conversion import graphs
from linearize.conversion.export import export
from linearize.evaluation import perplexity
from linearize.evaluation.caches import stretch
from linearize.evaluation.speed import decode, prefill, prompt
from linearize.generation.graph import Graph

GRAPHS = {"fp32": None, "int8": "int8"}


def part_export(given: argparse.Namespace) -> Iterator[Cell]:
    given.graphs.mkdir(parents=True, exist_ok=True)
    for name, quantize in GRAPHS.items():
        if not (given.graphs / name).exists():
            started = time.perf_counter()
            export(given.folder, "onnx", given.graphs / name, quantize=quantize)
            yield {"part": "export", "graph": name, "seconds": time.perf_counter() - started}
    source = given.graphs / "source"
    if not source.exists():
        source.mkdir()
        model, _ = load_source(relocate(load(given.folder)[0].config.linearize["source"]), "float32")
        graphs.onnx(graphs.Piece(model), 1, source / "step.onnx", None, {})


def part_size(given: argparse.Namespace) -> Iterator[Cell]:
    for name in (*GRAPHS, "source"):
        yield {"part": "size", "graph": name, "bytes": _bytes(given.graphs / name)}
    yield {"part": "size", "graph": "folder", "bytes": _bytes(given.folder)}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def part_equal(given: argparse.Namespace) -> Iterator[Cell]:
    """Prompts of 16 to 320 tokens; both write --tokens greedily and never stop."""
    model, tokenizer = load(given.folder, "float32", "cpu")
    graph = Graph(given.graphs / "fp32", given.threads)
    ids = perplexity.cut(common.validation_text(), tokenizer, 320, given.prompts)
    for number in range(given.first, given.prompts):
        own = ids[number, : 16 + 16 * number]
        theirs = model.generate(
            own[None], max_new_tokens=given.tokens, min_new_tokens=given.tokens, do_sample=False, pad_token_id=0
        )[0, len(own) :].tolist()
        ends = np.asarray([model.generation_config.eos_token_id]).flatten()
        state, logits, ours = graph.empty(), None, []
        read: Any = own.tolist()
        while len(ours) < given.tokens:
            logits, state = graph.read(read, state)
            logits = logits[0].copy()
            logits[ends] = -np.inf  # min_new_tokens
            ours.append(int(logits.argmax()))
            read = ours[-1:]
        where = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        cell = {"part": "equal", "prompt": number, "length": len(own), "tokens": given.tokens, "differs_at": where}
        if where is not None:  # how near the two tokens were in the model's own eyes
            with torch.no_grad():
                text = torch.tensor([own.tolist() + theirs[:where]])
                row = model(text, use_cache=False).logits[0, -1]
            cell["gap"] = float((row[ours[where]] - row[theirs[where]]).abs())
        yield cell


def part_speed(given: argparse.Namespace) -> Iterator[Cell]:
    """Graphs and models interleaved, context by context: what else the machine does falls on all of them."""
    decoders = {name: make() for name, make in runners(given).items()}
    for context in given.contexts:
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(given.rounds):
            for name, decoded in decoders.items():
                seconds[name] += decoded(context)
        for name, each in seconds.items():
            cell = {"part": "speed", "what": name, "context": context, "token_seconds": median(each)}
            yield cell | {"low": min(each), "high": max(each), "steps": len(each)}


def runners(given: argparse.Namespace) -> dict[str, Callable[[], Callable[[int], list[float]]]]:
    """Name of a row -> what makes its decoder: context -> seconds of each of --steps tokens."""

    def graph(name: str) -> Callable[[], Callable[[int], list[float]]]:
        def make() -> Callable[[int], list[float]]:
            opened = Graph(given.graphs / name, given.threads)
            return lambda context: _graph_steps(opened, context, given)

        return make

    def eager(source: bool) -> Callable[[int], list[float]]:
        model, _ = load(given.folder, "float32", "cpu")
        if source:
            model, _ = load_source(relocate(model.config.linearize["source"]), "float32")
        return lambda context: _eager_steps(model, context, given)

    made = {f"graph {name}": graph(name) for name in GRAPHS}
    made |= {"eager": lambda: eager(False), "source eager": lambda: eager(True)}
    made["source graph fp32"] = lambda: lambda context: _source_steps(given, context)
    return {name: make for name, make in made.items() if not given.only or name in given.only}


def _times(run: Callable[[], None], steps: int) -> list[float]:
    seconds = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds[2:]


def _graph_steps(graph: Graph, context: int, given: argparse.Namespace) -> list[float]:
    from onnxruntime import OrtValue

    ids = np.random.default_rng(given.seed).integers(100, graph.rows - 100, min(context, given.read))
    logits, state = graph.read(ids, graph.empty())
    for name in [name for name in state if name.endswith(".count")]:
        state[name] = OrtValue.ortvalue_from_numpy(np.array([context]))

    def run() -> None:
        nonlocal logits, state
        logits, state = graph.read([int(logits.argmax())], state)

    return _times(run, given.steps)


@torch.inference_mode()
def _eager_steps(model: Any, context: int, given: argparse.Namespace) -> list[float]:
    cache, ids = DynamicCache(config=model.config), prompt(model, min(context, given.read), given.seed)
    token = prefill(model, cache, ids, 256)[:, -1].argmax(-1, keepdim=True)
    return decode(model, stretch(cache, context), token, given.steps)


def _source_steps(given: argparse.Namespace, context: int) -> list[float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = given.threads, 3
    file = str(given.graphs / "source" / "step.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {}
    for entry in session.get_inputs():
        if entry.name != "input_ids":
            shape = [1, entry.shape[1], context, entry.shape[3]]
            values = np.random.default_rng(given.seed).standard_normal(shape, np.float32)
            feed[entry.name] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
    names = [entry.name for entry in session.get_outputs()]
    token = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([[500]]))

    def run() -> None:
        nonlocal feed
        made = dict(zip(names, session.run_with_ort_values(names, {**feed, "input_ids": token}), strict=True))
        feed = {name: made[name.replace("input.", "output.", 1)] for name in feed}

    return _times(run, given.steps)


START = """
import json, sys, time
started, folder = time.perf_counter(), sys.argv[1]
from linearize.generation.graph import is_graph
if is_graph(folder):
    from linearize.generation.graph import generate
else:
    from linearize.generation import generate
said = generate(folder, "The river rose in the night.", raw=True, temperature=0, max_new_tokens=32)
first = time.perf_counter() - started - (said.seconds - said.prefill_seconds)
with open("/proc/self/status") as file:  # ru_maxrss of a process begins with its parent's
    peak = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
print(json.dumps({"first_token_seconds": first, "peak_bytes": peak}))
"""
"""A new process, until the first token of a short prompt, and its peak after 32 tokens."""


def part_start(given: argparse.Namespace) -> Iterator[Cell]:
    for name in (*GRAPHS, "folder"):
        folder = given.folder if name == "folder" else given.graphs / name
        command = [sys.executable, "-c", START, str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        yield {"part": "start", "graph": name, **json.loads(done.stdout.splitlines()[-1])}


def claims(cells: list[Cell]) -> list[common.Claim]:
    made: list[common.Claim] = []
    equal = [cell for cell in cells if cell["part"] == "equal"]
    if equal:
        same = sum(cell["differs_at"] is None for cell in equal) / len(equal)
        made.append(common.claim(f"texts of {len(equal)} with all {equal[0]['tokens']} tokens equal", "≥ 1", same))
    for context in sorted({cell["context"] for cell in cells if cell["part"] == "speed"}):
        for name, limit in (("graph fp32", "≥ 1.5"), ("graph int8", "≥ 2.5")):
            made += common.ratio(
                cells, f"{name}: speed over eager at {context}", limit, "token_seconds",
                {"what": "eager"}, {"what": name}, part="speed", context=context,
            )  # fmt: skip
    return made


def report(results: dict[str, Any]) -> list[str]:
    """Lines of the tables beside the results."""
    cells, machine = results["cells"], results["environment"]
    about = results["settings"] | {"threads": results.get("added", [results["settings"]])[-1]["threads"]}
    lines = [
        f"{machine['cpu']}, {about['threads']} threads, commit {machine['commit']}, seed {about['seed']}; batch 1."
    ]
    contexts = sorted({cell["context"] for cell in cells if cell["part"] == "speed"})
    rows = [
        (what, *(common.shown(common.find(cells, "token_seconds", what=what, context=n), ".1f", 1e3) for n in contexts))
        for what in dict.fromkeys(cell["what"] for cell in cells if cell["part"] == "speed")
    ]
    lines += common.table(("ms per token", *map(str, contexts)), rows)
    names = list(dict.fromkeys(cell["graph"] for cell in cells if cell["part"] in ("size", "start")))
    rows = [
        (
            name,
            common.shown(common.find(cells, "bytes", part="size", graph=name), ".0f", 1 / (1 << 20)),
            common.shown(common.find(cells, "first_token_seconds", part="start", graph=name), ".1f"),
            common.shown(common.find(cells, "peak_bytes", part="start", graph=name), ".0f", 1 / (1 << 20)),
        )
        for name in names
    ]
    lines += common.table(("", "MiB on disk", "s to the first token", "peak MiB"), rows)
    return lines + common.claims_table(results["claims"], "export to ONNX")


def main() -> None:
    parser = common.options(__doc__, name="bench-onnx")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--graphs", type=Path, help="where the exported graphs lie, or are to lie")
    parts = {"export": part_export, "size": part_size, "equal": part_equal, "speed": part_speed, "start": part_start}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt, to go on from")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 8192, 32768])
    parser.add_argument("--read", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help="of a decoder in each round")
    parser.add_argument("--rounds", type=int, default=3, help="of all decoders at a context, one after another")
    parser.add_argument("--only", nargs="*", help="rows of speed")
    parser.add_argument("--more", action="store_true", help="add to the cells that the results file holds")
    given = parser.parse_args()
    results, target = common.begin(given)
    if given.more and target.is_file():
        earlier = json.loads(target.read_text())
        results = earlier | {"added": [*earlier.get("added", []), results["settings"]]}
    for part in given.parts:
        common.collect(results, parts[part](given), claims, target)
    common.write_markdown(report(results), target)


if __name__ == "__main__":
    main()
