"""What the sections of the report hold: charts, tables and words out of results; `page.html.jinja` lays them out.

One function per section, from a `View` to what the template takes; None or empty where nothing was measured.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from linearize.formats import format_bytes
from linearize.reporting import charts
from linearize.reporting.charts import Points
from linearize.reporting.view import View
from linearize.results.numbers import fixed, interval, percent, score, with_error
from linearize.results.summary import APART, recall_beyond, recall_mean
from linearize.results.table import Table, lay_out


@dataclass(frozen=True)
class Figure:
    """A chart and the words around it.

    Attributes:
        svg: the chart, an `<svg>` element.
        title, note: its caption.
        legend: name, colour and dashes of what is drawn.
        bars: the legend shows blocks of colour, not lines.
    """

    svg: str
    title: str
    note: str = ""
    legend: Sequence[tuple[str, str, str]] = ()
    bars: bool = False


def _legend(shown: View, names: Iterable[str]) -> list[tuple[str, str, str]]:
    return [(name, *shown.styles[name]) for name in names]


def _lines(shown: View, series: dict[str, Points], title: str, note: str, ylabel: str, **options: Any) -> Figure:
    """A chart of lines; the numbers also in its label, for those who cannot see it. Options as of `charts.lines`."""
    words = "; ".join(
        f"{name}: " + ", ".join(f"{y:.4g} at {x:g}" for x, y in points) for name, points in series.items()
    )
    chart = charts.lines(series, shown.styles, f"{title}. {words}", ylabel, **options)
    return Figure(chart, f"{title}.", note, _legend(shown, series))


def _middle(bucket: dict[str, Any]) -> float:
    """Where a bucket of positions start ≤ t < end stands on a logarithmic axis."""
    return math.sqrt(bucket["start"] * (bucket["end"] - 1))


def recovery(shown: View) -> Figure | None:
    """The share of the source's score that students and window controls keep, by task."""
    columns = {name: column for name, column in shown.columns.items() if column["tasks"]}
    controls = [name for name in columns if name.startswith("window")]
    compared = [name for name in [*shown.students, *controls] if name in columns]
    if "source" not in columns:
        return None
    values = {name: charts.shares(columns[name], columns["source"]) for name in compared}
    if not any(values.values()):
        return None
    words = "; ".join(
        f"{name}: " + ", ".join(f"{task} {100 * share:.1f} %" for task, (share, _) in kept.items())
        for name, kept in values.items()
    )
    label = f"Share of the source's score by task. {words}"
    note = (
        "Whiskers: 95 % interval of the difference on the same items. The upright line is the source. A student that "
        "does not stand out from its window control has recovered nothing."
    )
    chart = charts.recovery(values, shown.tasks, shown.styles, label)
    return Figure(chart, "Share of the source's score kept, by task.", note, _legend(shown, compared), bars=True)


def numbers(shown: View) -> list[Table]:
    """The table of the terminal, and one of the tasks that are no part of the average, if there are any."""

    def part(apart: bool, **others: Any) -> dict[str, Any]:
        columns = {
            name: {**column, "tasks": {k: v for k, v in column["tasks"].items() if k.startswith(APART) == apart}}
            for name, column in shown.columns.items()
        }
        return {"columns": columns, "environment": shown.reports[0]["environment"], **others}

    summary = {**shown.summary, "paired": {}}
    if len(shown.reports) == 1:
        summary["memory"] = shown.reports[0]["summary"]["memory"]
    lettered = part(True)
    lettered["columns"] = {name: {"tasks": column["tasks"]} for name, column in lettered["columns"].items()}
    asked = any(column["tasks"] for column in lettered["columns"].values())
    return [lay_out(part(False, summary=summary)), *([lay_out(lettered)] if asked else [])]


def paired(shown: View) -> list[dict[str, Any]]:
    """Per student: a chart of its differences from each control by task, and the table of all differences."""
    entries = []
    for student, controls in shown.pairs.items():
        pairs = {control: pair for control, pair in controls.items() if any(pair.values())}
        tasks = {control: pair["tasks"] for control, pair in pairs.items() if pair["tasks"]}
        figure = None
        if tasks:
            label = f"Differences of {student} from {', '.join(tasks)} by task; the table below holds every number"
            chart = charts.differences(tasks, shown.tasks, shown.styles, label)
            title = f"{student} minus each control, by task."
            figure = Figure(chart, title, "Lines: 95 % intervals.", _legend(shown, tasks), bars=True)
        if pairs:
            rows = _paired_rows([*pairs.values()], shown.tasks)
            entries.append({"figure": figure, "header": [f"{student} minus", *pairs], "rows": rows})
    return entries


def _paired_rows(pairs: list[dict[str, Any]], names: dict[str, str]) -> list[list[Any]]:
    """Label, and for each control a cell: the difference, its interval, and whether 0 lies outside."""
    tasks = dict.fromkeys(task for pair in pairs for task in pair["tasks"])
    rows = [(f"{names[task]}, points", [pair["tasks"].get(task) for pair in pairs], 1, 100) for task in tasks]
    rows.append(("average, points", [pair.get("average") for pair in pairs], 1, 100))
    rows.append(("loss, nats per token", [pair.get("loss") for pair in pairs], 4, 1))

    def cell(entry: dict[str, float], digits: int, scale: float) -> dict[str, Any]:
        difference, span = interval(entry, digits, scale)
        return {"difference": difference, "span": span, "apart": not entry["low"] <= 0 <= entry["high"]}

    return [
        [label, *(cell(entry, digits, scale) if entry else "" for entry in entries)]
        for label, entries, digits, scale in rows
        if any(entries)
    ]


def positions(shown: View) -> Figure | None:
    """Perplexity by position, all columns but the memory alone, beside which the others would become one line."""
    series = {
        name: [(_middle(bucket), bucket["ppl"]) for bucket in column["perplexity"]["by_position"]]
        for name, column in shown.columns.items()
        if "perplexity" in column and (name != "student/memory" or len(shown.columns) == 1)
    }
    if not series:
        return None
    note = "Lower is better. Left of the window, all see what the source sees; right of it, only the memory can."
    values = [y for points in series.values() for _, y in points]
    options = {"windows": shown.windows, "log_y": max(values) > 3 * min(values)}
    return _lines(shown, series, "Perplexity by the number of tokens before", note, "perplexity", **options)


def recall(shown: View) -> dict[str, Any] | None:
    """Means, and a heat map per task: the students, and beside them the source and what the window alone does."""
    wanted = [*shown.students, "student/window", "window", "source"]
    columns = {name: shown.columns[name] for name in wanted if shown.columns.get(name, {}).get("recall")}
    if not columns:
        return None
    asked = [entry for column in columns.values() for entry in column["recall"]]
    # The student without its memory says more than the untrained window; both would only fill the page.
    if "student/window" in columns:
        columns.pop("window", None)
    tasks = list(dict.fromkeys(entry["task"] for column in columns.values() for entry in column["recall"]))
    skipped = [f"{e['task']} at {e['length']} tokens: {e['skipped']}" for e in asked if e.get("skipped")]
    return {
        "header": ["average", *tasks, "all", "beyond the window"],
        "rows": [
            [name, *(fixed(recall_mean(column, task), 1, 100) for task in [*tasks, None]), score(recall_beyond(column))]
            for name, column in columns.items()
        ],
        "maps": {task: maps for task in tasks if (maps := _heat_maps(columns, task))},
        "reasons": dict.fromkeys(skipped),
    }


def capacity(shown: View) -> dict[str, Any] | None:
    """Pairs remembered, by how many there were and by the bytes of the cache."""
    columns = {name: column["capacity"] for name, column in shown.columns.items() if column.get("capacity")}
    if not columns:
        return None
    cells = {name: {cell["pairs"]: cell for cell in row} for name, row in columns.items()}
    pairs = sorted(set(itertools.chain(*cells.values())))
    held: dict[str, Points] = {name: [(n, n * cell["value"]) for n, cell in row.items()] for name, row in cells.items()}
    most = {name: max(y for _, y in points) for name, points in held.items()}
    mib = {name: row[max(row)]["cache_bytes"] / 2**20 for name, row in cells.items()}
    best: dict[str, Points] = {name: [(mib[name], most[name])] for name in cells}
    title, note = "Pairs remembered, by the number of pairs", "Where a memory is full, its line bends."
    figures = [
        _lines(shown, held, title, note, "pairs remembered", xlabel="pairs in the text"),
        _lines(shown, best, "Most pairs remembered, by the cache", "", "pairs remembered", xlabel="MiB of cache"),
    ]
    rows = [
        [name, *(score(row.get(n)) for n in pairs), f"{most[name]:.0f}", f"{mib[name]:.1f}"]
        for name, row in cells.items()
    ]
    return {"header": ["right", *(f"of {n}" for n in pairs), "most", "MiB"], "rows": rows, "figures": figures}


def _heat_maps(columns: dict[str, Any], task: str) -> list[Figure]:
    maps = []
    for name, column in columns.items():
        entries = [entry for entry in column["recall"] if entry["task"] == task]
        if any(entry["value"] is not None for entry in entries):
            label = f"Recall of {name} in {task}. {', '.join(map(_recall_words, entries))}"
            window = entries[0]["length"] / entries[0]["multiple"]
            maps.append(Figure(charts.heat_map(entries, window, label), name))
    return maps


def _recall_words(entry: dict[str, Any]) -> str:
    depth = "" if entry["depth"] is None else f" and depth {entry['depth']:g}"
    value = "not asked" if entry["value"] is None else f"{100 * entry['value']:.0f} %"
    return f"{value} at {entry['length']} tokens{depth}"


def behaviour(shown: View) -> dict[str, Any] | None:
    """Distance from the source, agreement, repetition, health of the state."""
    columns = {name: column["behaviour"] for name, column in shown.columns.items() if "behaviour" in column}
    if not columns:
        return None
    others = {name: entry for name, entry in columns.items() if name != "source"}
    figures = []
    if others:
        series = {name: [(_middle(b), b["kl"]) for b in entry["kl"]["by_position"]] for name, entry in others.items()}
        note = "How far the predictions are from the source's, in nats per token; 0 is the source itself."
        title = "KL to the source, by position"
        figures.append(_lines(shown, series, title, note, "nats per token", windows=shown.windows))
        lengths = {name: entry["agreement"]["lengths"] for name, entry in others.items()}
        longest = max(n for entry in columns.values() for n in entry["agreement"]["lengths"])
        words = "; ".join(f"{name}: median {entry['agreement']['median']:g} tokens" for name, entry in others.items())
        label = f"Share of prompts still equal to the source. {words}"
        chart = charts.survival(lengths, longest, shown.styles, label)
        note = "Greedy continuations of the same beginnings."
        figures.append(Figure(chart, "How long it says what the source says.", note, _legend(shown, lengths)))
    for key, title, ylabel in (
        ("norm", "Norm of the memory's state, by position", "norm"),
        ("effective_rank", "Effective rank of the state, by position", "effective rank"),
    ):
        points = {
            name: [(row["position"], row[key]) for row in entry["state"] or () if row[key] is not None]
            for name, entry in columns.items()
        }
        if series := {name: row for name, row in points.items() if row}:
            note = "Mean over layers and heads. A healthy state neither grows without bound nor collapses to rank 1."
            figures.append(_lines(shown, series, title, note, ylabel))
    return {"header": ["", *columns], "rows": _behaviour_rows([*columns.values()]), "figures": figures}


def _behaviour_rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    def of(part: str, key: str, form: str, scale: float = 1) -> Callable[[dict[str, Any]], str]:
        return lambda entry: format(scale * entry[part][key], form)

    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "KL to the source, nats per token": lambda entry: with_error(entry["kl"]["value"], entry["kl"]["stderr"], 4),
        "greedy tokens equal, mean": of("agreement", "mean", ".1f"),
        "… median": of("agreement", "median", ".1f"),
        **{f"repeated {n}-grams, %": of("repetition", f"rep_{n}", ".1f", 100) for n in (2, 3, 4)},
        **{f"distinct {n}-grams, %": of("repetition", f"distinct_{n}", ".1f", 100) for n in (1, 2)},
        "steps equal with and without cache": lambda entry: "{equal} of {checked}".format(**entry["cached"]),
        "… largest difference of logits": of("cached", "difference", ".2g"),
    }
    return [[label, *map(cell, entries)] for label, cell in rows.items()]


def speed(shown: View) -> dict[str, Any] | None:
    """Time per token, memory and cache by context, for every number of rows; and all of it as a table."""
    columns = {name: column["speed"] for name, column in shown.columns.items() if column.get("speed")}
    if not columns:
        return None
    batches = sorted({cell["batch"] for cells in columns.values() for cell in cells})
    return {
        "figures": [figure for batch in batches for figure in _speed_figures(shown, columns, batch)],
        "header": ["", "context", "rows", "prefill, s", "ms per token", "low to high", "peak memory", "cache"],
        "rows": [[name, *_speed_cells(cell)] for name, cells in columns.items() for cell in cells],
        "left_out": [
            f"{name} at {cell['context']} tokens, {cell['batch']} rows: {cell['reason']}"
            for name, column in shown.columns.items()
            for cell in column.get("speed_left_out", ())
        ],
    }


def _speed_figures(shown: View, columns: dict[str, Any], batch: int) -> list[Figure]:
    own = {name: [cell for cell in cells if cell["batch"] == batch] for name, cells in columns.items()}
    own = {name: sorted(cells, key=lambda cell: cell["context"]) for name, cells in own.items() if cells}
    quartiles = {name: [(1e3 * cell["low"], 1e3 * cell["high"]) for cell in cells] for name, cells in own.items()}
    bytes_ = {"as_bytes": True}
    figures = []
    for key, title, scale, ylabel, options in (
        ("token_seconds", "Time per decoded token", 1e3, "milliseconds", {"ranges": quartiles}),
        ("peak_bytes", "Peak memory while decoding", 1, "memory", bytes_),
        ("cache_bytes", "Cache", 1, "cache", bytes_),
    ):
        points = {name: [(c["context"], scale * c[key]) for c in cells if c[key]] for name, cells in own.items()}
        if series := {name: row for name, row in points.items() if row}:
            title, axes = f"{title}, {batch} row{'s' * (batch > 1)}", {"xlabel": "tokens of context", "log_y": True}
            figures.append(_lines(shown, series, title, "By tokens in the cache.", ylabel, **axes, **options))
    return figures


def _speed_cells(cell: dict[str, Any]) -> list[str]:
    time, low, high = (fixed(cell[key], 2, 1e3) for key in ("token_seconds", "low", "high"))
    sizes = ["" if cell[key] is None else format_bytes(cell[key]) for key in ("peak_bytes", "cache_bytes")]
    prefill = f"{cell['prefill_seconds']:.3g}"
    return [str(cell["context"]), str(cell["batch"]), prefill, time, f"{low} to {high}", *sizes]


def layers(shown: View) -> list[Figure]:
    """Which layer has which mixer, window and sinks."""
    figures = []
    for student, report in zip(shown.students, shown.reports, strict=True):
        rows = report.get("layers") or []
        words = [_mixer_words(row) for row in rows]
        kinds = list(dict.fromkeys(words))
        colours = [
            "#222222" if kind == "softmax" else charts.MORE[i % len(charts.MORE)] for i, kind in enumerate(kinds)
        ]
        label = ", ".join(f"{row['layer']} {kind}" for row, kind in zip(rows, words, strict=True))
        counts = [f"{kind}: {words.count(kind)} of {len(rows)} layers" for kind in kinds]
        if rows:
            numbers = [kinds.index(kind) for kind in words]
            chart = charts.layer_map(numbers, colours, f"Layers of {student}. {label}")
            title = f"{shown.prefix(student)}What each layer attends with."
            figures.append(Figure(chart, title, "", [*zip(counts, colours, itertools.repeat("-"))], bars=True))
    return figures


def _mixer_words(row: dict[str, Any]) -> str:
    """``gla, window 64, sinks 4, …``; settings of the mixer in the order of its configuration."""
    if row["mixer"] == "softmax":
        return "softmax"
    settings = {key: value for key, value in row.items() if key not in ("layer", "mixer") and value is not None}
    return ", ".join([row["mixer"], *(f"{key} {value}" for key, value in settings.items())])


def pruning(shown: View) -> list[str]:
    """A sentence for each student whose weights were pruned: how, and what it cost."""
    return [
        f"{shown.prefix(student)}Pruned to {made['sparsity']}: {percent(made['zeros'])} of the weights of its linear "
        f"layers are zero. The loss of text that was held back went from {made['loss_before']:.3f} to "
        f"{made['loss_after']:.3f} nats per token."
        for student, report in zip(shown.students, shown.reports, strict=True)
        if (made := report.get("pruning"))
    ]


def settings(shown: View) -> dict[str, dict[str, Any]]:
    """Per student: settings, machine, versions, data and seconds; None for what is not set."""
    facts = {}
    for student, report in zip(shown.students, shown.reports, strict=True):
        own = {**(report.get("settings") or {}), **report["environment"]}
        own.pop("suite", None)
        nested = {key: own.pop(key) for key in ("source", "versions", "data") if isinstance(own.get(key), dict)}
        own |= {f"{key}: {name}": value for key, values in nested.items() for name, value in values.items()}
        own["seconds"] = ", ".join(f"{name} {column['seconds']:.0f}" for name, column in report["columns"].items())
        facts[student] = own
    return facts
