"""The charts of the report, one function each: from columns of results.json to an `<svg>` element.

Legends stand in the page, where they wrap; here every column has its colour and its dashes.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from linearize.formats import format_bytes
from linearize.reporting.plot import svg
from linearize.results.numbers import tokens
from linearize.results.summary import headline

Styles = dict[str, tuple[str, str]]  # column -> colour, dashes
Points = list[tuple[float, float]]  # (x, y)
Shares = dict[str, tuple[float, float | None]]  # task -> share, half of its interval
# Okabe and Ito's colours: told apart by the colour-blind.
STYLES = {
    "source": ("#222222", "-"),
    "window": ("#d55e00", "--"),
    "converted": ("#8c8c8c", ":"),
    "student": ("#0072b2", "-"),
    "student/window": ("#56b4e9", "--"),
    "student/memory": ("#cc79a7", "-."),
    "other": ("#009e73", "-"),
}
MORE = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#8c564b", "#7b5cd6")
WINDOWS = ("#d55e00", "#e69f00", "#f2c57c")  # of window controls, where several students have their own


def styles(columns: Iterable[str]) -> Styles:
    """Colour and dashes of each column; names outside `STYLES` get the colours of `WINDOWS` or `MORE` in turn."""
    controls = [name for name in columns if name.startswith("window of ")]
    others = [name for name in columns if name not in STYLES and name not in controls]
    own = {name: (MORE[i % len(MORE)], "-" if i < len(MORE) else "--") for i, name in enumerate(others)}
    own |= {name: (WINDOWS[i % len(WINDOWS)], "--") for i, name in enumerate(controls)}
    return {name: own.get(name) or STYLES[name] for name in columns}


def shares(column: dict[str, Any], source: dict[str, Any]) -> Shares:
    """Share of the source's score kept per task of the average, and half of its 95 % interval.

    The interval is that of the difference on the same items, 1.96 times its standard error over the source's score; of
    tasks without items, that of the column's score alone; None where lm-eval gives no standard error.

    Args:
        column: as in results.json.
        source: the column of the source.
    """
    kept = {}
    for name in headline(source["tasks"]):
        ours, theirs = column["tasks"].get(name), source["tasks"][name]
        if ours is None or theirs["value"] <= 0:
            continue
        error = ours["stderr"]
        if ours.get("items") and theirs.get("items") and len(ours["items"]) > 1:
            difference = np.array(ours["items"], float) - np.array(theirs["items"], float)
            error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
        kept[name] = (ours["value"] / theirs["value"], None if error is None else 1.96 * error / theirs["value"])
    return kept


def recovery(values: dict[str, Shares], names: dict[str, str], colours: Styles, label: str) -> str:
    """Bars per task: share of the source's score, one bar per column.

    Args:
        values: column -> `shares`.
        names: task -> its name in the chart.
        colours: see `styles`.
        label: in words.
    """
    tasks = list(dict.fromkeys(task for share in values.values() for task in share))
    thickness = 0.8 / len(values)

    def draw(axes: Any) -> None:
        for i, (name, kept) in enumerate(values.items()):
            heights = [row + (i + 0.5) * thickness - 0.4 for row, task in enumerate(tasks) if task in kept]
            widths = [100 * share for share, _ in kept.values()]
            errors = [100 * (half or 0) for _, half in kept.values()]
            axes.barh(
                heights, widths, thickness * 0.9, xerr=errors, color=colours[name][0], ecolor="#555555", capsize=2
            )
        axes.axvline(100, color=STYLES["source"][0], linewidth=1.5)
        axes.set_yticks(range(len(tasks)), [_short(names[task]) for task in tasks])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel("% of the source's score")

    return svg(draw, label, 0.9 + len(tasks) * (0.25 + 0.17 * len(values)))


def lines(
    series: dict[str, Points],
    colours: Styles,
    label: str,
    ylabel: str,
    xlabel: str = "tokens before it",
    windows: Sequence[int] = (),
    log_y: bool = False,
    as_bytes: bool = False,
    ranges: dict[str, Points] | None = None,
) -> str:
    """Lines over positions or contexts, on a logarithmic axis.

    Args:
        series: (x, y) by column.
        colours: see `styles`.
        label: in words.
        ylabel: name of the axis.
        xlabel: name of the axis.
        windows: marked by upright lines.
        log_y: a logarithmic axis for y too.
        as_bytes: y is a number of bytes.
        ranges: low and high of every y, drawn as whiskers.
    """

    def draw(axes: Any) -> None:
        axes.set_xscale("log", base=2)
        if log_y:
            axes.set_yscale("log")
        for name, points in series.items():
            x, y = zip(*points, strict=True)
            colour, dashes = colours[name]
            axes.plot(x, y, dashes, color=colour, marker="o", markersize=3.5, linewidth=1.8)
            if ranges is not None:
                low, high = zip(*ranges[name], strict=True)
                axes.vlines(x, low, high, color=colour, linewidth=1)
        for i, window in enumerate(windows):
            axes.axvline(window, color="#999999", linestyle=":", linewidth=1.2)
            at = {"transform": axes.get_xaxis_transform(), "fontsize": 9, "va": "bottom"}
            axes.text(window, 1 + 0.06 * i, f" window {window}", **at)
        shown = sorted({x for points in series.values() for x, _ in points})
        first, last = math.floor(math.log2(shown[0])), math.ceil(math.log2(shown[-1]))
        ticks = [2.0**power for power in range(first, last + 1, max(1, round((last - first) / 6)))]
        axes.set_xticks(ticks, [tokens(tick) for tick in ticks])
        low, high = axes.get_ylim()
        if log_y:
            # Powers of 1024 times a small whole number need no decimals.
            words = (lambda tick: format_bytes(tick).replace(".00", "")) if as_bytes else "{:g}".format
            ticks = _log_ticks(low, high, 1024 if as_bytes else 10)
            axes.set_yticks(ticks, [words(tick) for tick in ticks])
        else:
            axes.set_ylim(min(low, 0) if low > 0 and low < 0.5 * high else low, high)
        axes.minorticks_off()
        axes.set(xlabel=xlabel, ylabel=ylabel)

    return svg(draw, label)


def survival(lengths: dict[str, list[int]], longest: int, colours: Styles, label: str) -> str:
    """Share of prompts whose greedy continuation still equals the source's after 1, 2, … `longest` tokens.

    Args:
        lengths: column -> tokens equal, of every prompt.
        longest: the last number of tokens drawn.
        colours: see `styles`.
        label: in words.
    """
    counts = range(longest + 1)

    def draw(axes: Any) -> None:
        for name, equal in lengths.items():
            share = [100 * float(np.mean(np.array(equal) >= count)) for count in counts]
            colour, dashes = colours[name]
            axes.plot(counts, share, dashes, color=colour, linewidth=1.8)
        axes.set(xlabel="greedy tokens", ylabel="% of prompts still equal", ylim=(-3, 103))

    return svg(draw, label)


def heat_map(entries: list[dict[str, Any]], window: float, label: str) -> str:
    """Right answers of one column on one recall task, in per cent: depth downwards, length to the right.

    Args:
        entries: see `linearize.results.schema.Recall`.
        window: in tokens.
        label: in words.
    """
    lengths = sorted({entry["length"] for entry in entries})
    entries = [entry for entry in entries if entry["value"] is not None]
    depths = sorted({entry["depth"] for entry in entries if entry["depth"] is not None}) or [None]
    values = {(entry["depth"], entry["length"]): 100 * entry["value"] for entry in entries}
    grid = np.array([[values.get((depth, length), np.nan) for length in lengths] for depth in depths])

    def draw(axes: Any) -> None:
        edges = [np.arange(count + 1) - 0.5 for count in (len(lengths), len(depths))]
        axes.pcolormesh(*edges, grid, cmap="viridis", vmin=0, vmax=100, edgecolors="white", linewidth=1)
        axes.invert_yaxis()
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "black" if value > 66 else "white"  # viridis is dark below two thirds
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
        axes.grid(False)
        axes.set_xticks(range(len(lengths)), [f"{tokens(n)}\n{n / window:g} W" for n in lengths])
        axes.set_yticks(range(len(depths)), ["" if depth is None else f"{depth:g}" for depth in depths])
        axes.set(xlabel="tokens of the prompt, and in windows", ylabel="" if depths == [None] else "depth")

    return svg(draw, label, 1.15 + 0.33 * len(depths))


def differences(
    pairs: dict[str, dict[str, dict[str, float]]], names: dict[str, str], colours: Styles, label: str
) -> str:
    """Student minus control per task with its 95 % interval, in points.

    Args:
        pairs: control -> task -> {difference, low, high}.
        names: task -> its name in the chart.
        colours: see `styles`.
        label: in words.
    """
    tasks = [task for task in names if any(task in pair for pair in pairs.values())]

    def draw(axes: Any) -> None:
        for i, (control, pair) in enumerate(pairs.items()):
            for row, task in enumerate(tasks):
                if task in pair:
                    entry, height = pair[task], row + (i + 1) / (len(pairs) + 1) - 0.5
                    colour = colours[control][0]
                    axes.hlines(height, 100 * entry["low"], 100 * entry["high"], color=colour, linewidth=2)
                    axes.plot(100 * entry["difference"], height, "o", color=colour, markersize=5)
        axes.axvline(0, color="#555555", linewidth=1)
        axes.set_yticks(range(len(tasks)), [_short(names[task]) for task in tasks])
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.set_xlabel("points, student minus control")

    return svg(draw, label, 0.9 + len(tasks) * (0.2 + 0.16 * len(pairs)))


def layer_map(kinds: list[int], colours: list[str], label: str) -> str:
    """A square per layer in the colour of its kind, 16 to a row.

    Args:
        kinds: number of each layer's kind.
        colours: of each kind.
        label: in words.
    """
    rows = math.ceil(len(kinds) / 16)

    def draw(axes: Any) -> None:
        for layer, kind in enumerate(kinds):
            row, column = divmod(layer, 16)
            axes.bar(column, 0.9, 0.9, row - 0.45, color=colours[kind])
            axes.text(column, row, str(layer), ha="center", va="center", color="white", fontsize=9)
        axes.set(xlim=(-0.5, 15.5), ylim=(rows - 0.4, -0.6))
        axes.set_axis_off()

    return svg(draw, label, 0.33 * rows)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _log_ticks(low: float, high: float, base: int) -> list[float]:
    """Round values between low and high, at most 7; over a wide range only 1, 2 and 5 times a power of 10."""
    if base == 10:
        steps = (1, 2, 3, 4, 5, 6, 7, 8, 9) if high < 10 * low else (1, 2, 5)
    else:
        steps = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    ticks = [step * float(base) ** power for power in range(first, last + 1) for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) <= 7 else inside[:: math.ceil(len(inside) / 7)]
