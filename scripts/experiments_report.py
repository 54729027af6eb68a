"""Tables and plots of what scripts/experiments.py measures."""

from itertools import cycle, product
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from matplotlib.figure import Figure

from linearize.reporting.plot import COLOURS

Results = dict[str, Any]
BIN, POINT = 32, 8
"""Positions per stored loss, and stored losses per point of the plot of quality."""
NEAR = 1.6
"""Of the source's perplexity: what the second panel of curves shows."""


def quality_markdown(results: Results) -> list[str]:
    """Lines: a row per mixer."""
    machine, source, rows = results["environment"], results["columns"]["source"]["perplexity"], []
    for name, column in results["columns"].items():
        row = [name]
        for n, state in product(source, (column, column.get("calibrated"))):
            number = state["perplexity"][n] if state else None
            row += [f"{number:.2f}", f"{number / source[n]:.3f}×"] if number else ["", ""]
        rows.append(row)
    read = ", ".join(f"{count} blocks of {length}" for length, count in results["blocks"].items())
    head = [title for n in source for title in (f"{n} tokens", "of the source", "calibrated", "of the source")]
    return [
        f"Perplexity of {results['recipe']} with no training, all layers replaced: WikiText-2 validation, {read}; "
        f"calibrated on {results['calibrate']} tokens of the recipe's data; {machine['cpu']}, "
        f"commit {machine['commit']}.",
        *common.table(["mixer", *head], rows),
    ]


def quality_plot(results: Results, path: Path) -> None:
    """Perplexity over the source's, by position, of the controls and the mixers that differ from them."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, columns = figure.subplots(), results["columns"]
    smooth = {name: torch.tensor(column["losses"]).unfold(0, POINT, POINT).mean(-1) for name, column in columns.items()}
    for name, loss in smooth.items():
        if name == "source" or (name != "window" and columns[name]["losses"] == columns["window"]["losses"]):
            continue
        positions = BIN * POINT * (torch.arange(len(loss)) + 0.5)
        style = {"color": "black", "linewidth": 2.5} if name == "window" else {}
        axes.plot(positions, (loss - smooth["source"]).exp(), "o-", markersize=3, label=name, **style)
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.set(xlabel="position (tokens)", ylabel="perplexity / the source's", title="No training, by position")
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=150)


def curves_markdown(results: Results) -> list[str]:
    """Lines: a row per line and per variant."""
    machine, measured, source = results["environment"], results["measured"], results["lines"]["source"]
    rows = [
        [name, *[""] * 4, f"{line:.2f}", f"{line / source:.3f}×", "", ""] for name, line in results["lines"].items()
    ]
    for name, variant in results["variants"].items():
        points, limit = variant["points"], results["lines"][variant["control"]]
        first, last = points[0], points[-1]
        half = min(points, key=lambda point: abs(2 * point["tokens"] - first["tokens"] - last["tokens"]))
        below = next((f"{point['tokens']:,}" for point in points if point["perplexity"] < limit), "never")
        row = [name, f"{first['tokens']:,}", f"{last['tokens'] - first['tokens']:,}"]
        row += [f"{point['perplexity']:.2f}" for point in (first, half, last)]
        rows.append([*row, f"{last['perplexity'] / source:.3f}×", below, f"{last['seconds'] / 60:.1f}"])
    head = [
        "",
        "calibrated on",
        "trained on",
        "before",
        "half way",
        "end",
        "of the source",
        "below its window after",
        "minutes",
    ]
    return [
        f"Perplexity of {results['recipe']} by tokens read: WikiText-2 validation, {measured['blocks']} blocks of "
        f"{measured['length']} tokens; {machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}.",
        "The source reads the same blocks; below is where a curve first passes the window control of its own W and "
        "sinks.",
        *common.table(head, rows),
    ]


def curves_plot(results: Results, path: Path) -> None:
    """Curves over tokens; source and window controls are horizontal lines."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    whole, near = figure.subplots(1, 2)
    # Linear up to the first step, so that a curve that begins at no token has a point for it.
    linear = min(point["tokens"] for variant in results["variants"].values() for point in variant["points"][1:])
    for axes in (whole, near):
        # The source first; another style for every window control, of which there are few. Colours are for the curves.
        for (name, line), style in zip(results["lines"].items(), cycle(("-", "--", ":", "-."))):
            axes.axhline(line, color=COLOURS["source"], linestyle=style, linewidth=1.5, label=name)
        for name, variant in results["variants"].items():
            tokens, losses = ([point[key] for point in variant["points"]] for key in ("tokens", "perplexity"))
            axes.plot(tokens, losses, "o-", markersize=3, label=name)
        axes.set_xscale("symlog", base=2, linthresh=linear)
        axes.set(xlabel="tokens read", ylabel="perplexity, WikiText-2")
    whole.set_yscale("log")
    whole.set_title(f"{results['recipe']}: learning curves")
    near.set_ylim(0.97 * results["lines"]["source"], NEAR * results["lines"]["source"])
    near.set_title("near the source")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
