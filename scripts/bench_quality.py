"""Perplexity with no training at all: the source, the window control and every mixer, by length and by position.

    python scripts/bench_quality.py                                   # every mixer: half an hour on two cores
    python scripts/bench_quality.py --mixers gla,retnet --lengths 512 --blocks 4 --calibrate 0

All layers are replaced, with the recipe's window and sinks and each mixer's own defaults for `combine: memory`; then
the same after `linearize calibrate` on a few thousand tokens of the recipe's data. A mixer without a log weight starts
with its gate closed, so it is the window control until it is calibrated or trained.
The text is the embedded validation half of WikiText-2, which no recipe trains on; the defaults of the memory (strength,
τ) were chosen on it.

Writes eval/results/quality-NAME.json after every mixer, and beside it a table (.md) and a plot by position (.png, if
matplotlib is installed).
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from bench_common import numbers, some, validation_text

from linearize.checkpoint.sources import load_source, locate
from linearize.evaluation import perplexity
from linearize.evaluation.environment import environment
from linearize.model.branches import branches
from linearize.model.mixers import MIXERS
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recovery.calibrate import fit
from linearize.recovery.data import blocks

MEMORIES = [name for name, mixer in MIXERS.items() if "memory" in mixer.combines]
BIN, POINT = 32, 8
"""Positions per stored loss, and stored losses per point of the plot."""
SEQ_LEN = 1024
"""Of a block to calibrate on."""


def measure(model: Any, texts: dict[int, torch.Tensor], window: int) -> dict[str, Any]:
    """Perplexity by length, and the mean loss of every BIN positions of the longest."""
    found: dict[str, Any] = {"perplexity": {}}
    for length, ids in texts.items():
        loss = perplexity.losses(model, ids).double()
        buckets, _ = perplexity.by_position(loss, perplexity.edges(length, window))
        found["perplexity"][str(length)] = math.exp(loss.mean())
        found["by_position"] = buckets
        found["losses"] = [float(part.mean()) for part in loss.split(BIN, 1)]
    return found


def columns(given: argparse.Namespace, results: dict[str, Any]):
    """Name and measurement, one after the other."""
    wanted = recipes.load(given.recipe, given.set)
    base = {key: wanted.convert.mixer[key] for key in ("window", "sinks")}
    located = locate(wanted.source.id, wanted.source.revision, package=wanted.source.package)
    model, tokenizer = load_source(located, "float32")
    text = validation_text()
    texts = {
        length: perplexity.cut(text, tokenizer, length, count)
        for length, count in sorted(zip(given.lengths, given.blocks, strict=True))
    }
    results |= {"blocks": {str(length): len(ids) for length, ids in texts.items()}, "calibrate": given.calibrate}
    tokens = given.calibrate // SEQ_LEN
    reading = blocks(wanted.data, tokenizer, SEQ_LEN, tokens)[:] if tokens else None
    linearize_(model.eval(), {"name": "window", **base})
    with branches(model, "source"):
        yield "source", measure(model, texts, base["window"])
    for window in given.windows:
        linearize_(model, {"name": "window", **base, "window": window})
        yield f"window {window}", measure(model, texts, base["window"])
    for name in ("window", *given.mixers):
        linearize_(model, {"name": name, **base})
        found = {"mixer": model.config.linearize["layers"]["0"], **measure(model, texts, base["window"])}
        if reading is not None and name != "window":
            fit(model, reading)
            found["calibrated"] = measure(model, texts, base["window"])
        yield name, found


def markdown(results: dict[str, Any]) -> str:
    cells, machine = results["columns"], results["environment"]
    lengths = list(cells["source"]["perplexity"])
    blocks = ", ".join(f"{count} blocks of {length}" for length, count in results["blocks"].items())
    lines = [
        f"Perplexity of {results['recipe']} with no training, all layers replaced: WikiText-2 validation, {blocks}; "
        f"calibrated on {results['calibrate']} tokens of the recipe's data; {machine['cpu']}, "
        f"commit {machine['commit']}.",
        "",
        f"| mixer | {' | '.join(f'{n} tokens | of the source | calibrated | of the source' for n in lengths)} |",
        f"|---|{'---:|' * 4 * len(lengths)}",
    ]
    for name, column in cells.items():
        parts = []
        for n in lengths:
            for state in (column, column.get("calibrated")):
                value = state["perplexity"][n] if state else None
                parts += [f"{value:.2f}", f"{value / cells['source']['perplexity'][n]:.3f}×"] if value else ["", ""]
        lines.append(f"| {name} | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Loss above the source's, by position, of the controls and the mixers that differ from them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no plot: matplotlib is not installed", file=sys.stderr)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, columns = figure.subplots(), results["columns"]
    smooth = {name: torch.tensor(column["losses"]).unfold(0, POINT, POINT).mean(-1) for name, column in columns.items()}
    for name, loss in smooth.items():
        if name == "source" or (name != "window" and columns[name]["losses"] == columns["window"]["losses"]):
            continue
        where = BIN * POINT * (torch.arange(len(loss)) + 0.5)
        style = {"color": "black", "linewidth": 2.5} if name == "window" else {}
        axes.plot(where, (loss - smooth["source"]).exp(), "o-", markersize=3, label=name, **style)
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.set(xlabel="position (tokens)", ylabel="perplexity / the source's", title="No training, by position")
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smollm2-135m", help="names source, window and sinks")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe")
    parser.add_argument("--mixers", type=some(MEMORIES), default=MEMORIES)
    parser.add_argument("--windows", type=numbers, default=[], help="longer window controls, to compare equal caches")
    parser.add_argument("--lengths", type=numbers, default=[512, 2048])
    parser.add_argument("--blocks", type=numbers, default=[16, 4], help="of each length")
    parser.add_argument("--calibrate", type=int, default=4096, help="tokens to calibrate on; 0: not at all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", help="of the output (default: the recipe's name)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "eval" / "results")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    target = given.out / f"quality-{given.name or given.recipe}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"schema": 1, "recipe": given.recipe, "columns": {}}
    results["environment"] = environment(torch.device("cpu"), 0, {})
    for name, column in columns(given, results):
        after = column.get("calibrated", {}).get("perplexity", {})
        print(name, json.dumps(column["perplexity"]), json.dumps(after), file=sys.stderr)
        results["columns"][name] = column
        target.write_text(json.dumps(results, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(results))
    plot(results, target.with_suffix(".png"))
    print(markdown(results))


if __name__ == "__main__":
    main()
