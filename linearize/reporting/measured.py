"""The sections of the report that show what was measured along positions, contexts and layers."""

import math
from collections.abc import Callable
from html import escape
from typing import Any

from linearize.formats import format_bytes
from linearize.reporting import charts
from linearize.reporting.charts import Styles
from linearize.reporting.markup import colour_key, figure, figures, legend, more, section, table
from linearize.reporting.view import View


def _lines(
    series: dict[str, list[tuple[float, float]]], title: str, note: str, colours: Styles, ylabel: str, **options: Any
) -> str:
    """A chart of lines with its legend and caption; the numbers also in its label, for those who cannot see it."""
    words = "; ".join(
        f"{name}: " + ", ".join(f"{y:.4g} at {x:g}" for x, y in points) for name, points in series.items()
    )
    chart = charts.lines(series, colours, f"{title}. {words}", ylabel, **options)
    return figure(chart, f"<strong>{title}.</strong> {note}", legend(series, colours))


def _middle(bucket: dict[str, Any]) -> float:
    """Where a bucket of positions start ≤ t < end stands on a logarithmic axis."""
    return math.sqrt(bucket["start"] * (bucket["end"] - 1))


def positions(shown: View) -> str:
    """Perplexity by position, all columns."""
    series = {
        name: [(_middle(bucket), bucket["ppl"]) for bucket in column["perplexity"]["by_position"]]
        for name, column in shown.columns.items()
        if "perplexity" in column
    }
    if not series:
        return ""
    note = (
        "Left of the window, window and student see all that the source sees; right of it, only the memory can. "
        "Lower is better; a point stands for the tokens of its range of positions."
    )
    values = [y for points in series.values() for _, y in points]
    chart = _lines(
        series,
        "Perplexity by the number of tokens before",
        note,
        shown.styles,
        "perplexity",
        windows=shown.windows,
        log_y=max(values) > 3 * min(values),
    )
    return section("Perplexity by position", chart)


def recall(shown: View) -> str:
    """A heat map per task: the students, and beside them the source and what the window alone does."""
    wanted = [*shown.students, "student/window", "window", "source"]
    columns = {name: found for name in wanted if (found := shown.columns.get(name, {}).get("recall"))}
    if not columns:
        return ""
    asked = [entry for found in columns.values() for entry in found]
    # The student without its memory says more than the untrained window; both would only fill the page.
    if "student/window" in columns:
        columns.pop("window", None)
    parts = [
        '<p class="dim">Right answers in per cent to questions about something said earlier in a prompt; W is the '
        "window. Beyond one window, only the memory can know.</p>"
    ]
    means = [
        [escape(name), *(_mean(found, task) for task in _tasks(columns)), _mean(found)]
        for name, found in columns.items()
    ]
    parts.append(table(["average", *map(escape, _tasks(columns)), "all"], means))
    for task in _tasks(columns):
        maps = []
        for name, found in columns.items():
            entries = [entry for entry in found if entry["task"] == task]
            if any(entry["value"] is not None for entry in entries):
                words = ", ".join(_entry_words(entry) for entry in entries)
                window = entries[0]["length"] / entries[0]["multiple"]
                chart = charts.heat_map(entries, window, f"Recall of {name} in {task}. {words}")
                maps.append(figure(chart, f"<strong>{escape(name)}</strong>"))
        parts += [f"<h3>{escape(task)}</h3>", figures(maps)] if maps else []
    reasons = dict.fromkeys(f"{e['task']} at {e['length']} tokens: {e['skipped']}" for e in asked if e.get("skipped"))
    parts += [f'<p class="dim">Not asked: {escape(reason)}.</p>' for reason in reasons]
    return section("Recall", *parts)


def _tasks(columns: dict[str, list[dict[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(entry["task"] for found in columns.values() for entry in found))


def _mean(entries: list[dict[str, Any]], task: str | None = None) -> str:
    values = [entry["value"] for entry in entries if task in (None, entry["task"]) and entry["value"] is not None]
    return f"{100 * sum(values) / len(values):.1f}" if values else ""


def _entry_words(entry: dict[str, Any]) -> str:
    depth = "" if entry["depth"] is None else f" and depth {entry['depth']:g}"
    value = "not asked" if entry["value"] is None else f"{100 * entry['value']:.0f} %"
    return f"{value} at {entry['length']} tokens{depth}"


def behaviour(shown: View) -> str:
    """Distance from the source, agreement, repetition, health of the state."""
    columns = {name: column["behaviour"] for name, column in shown.columns.items() if "behaviour" in column}
    if not columns:
        return ""
    drawn = []
    series = {
        name: [(_middle(bucket), bucket["kl"]) for bucket in found["kl"]["by_position"]]
        for name, found in columns.items()
        if found.get("kl") and name != "source"
    }
    if series:
        note = "How far the predictions are from the source's, in nats per token; 0 is the source itself."
        drawn.append(
            _lines(series, "KL to the source, by position", note, shown.styles, "nats per token", windows=shown.windows)
        )
    lengths = {
        name: found["agreement"]["lengths"]
        for name, found in columns.items()
        if found.get("agreement") and name != "source"
    }
    if lengths:
        longest = max(n for found in columns.values() for n in found["agreement"]["lengths"])
        words = "; ".join(f"{name}: median {columns[name]['agreement']['median']:g} tokens" for name in lengths)
        caption = "<strong>How long it says what the source says.</strong> Greedy continuations of the same beginnings."
        chart = charts.survival(lengths, longest, shown.styles, f"Share of prompts still equal to the source. {words}")
        drawn.append(figure(chart, caption, legend(lengths, shown.styles)))
    for key, title, ylabel in (
        ("norm", "Norm of the memory's state, by position", "norm"),
        ("effective_rank", "Effective rank of the state, by position", "effective rank"),
    ):
        points = {
            name: [(row["position"], row[key]) for row in found.get("state") or () if row[key] is not None]
            for name, found in columns.items()
        }
        if series := {name: row for name, row in points.items() if row}:
            note = "Mean over layers and heads. A healthy state neither grows without bound nor collapses to rank 1."
            drawn.append(_lines(series, title, note, shown.styles, ylabel))
    return section("Behaviour", table(*_behaviour_rows(columns)), figures(drawn))


def _behaviour_rows(columns: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [label, *(cell(found) for found in columns.values())]

    def of(part: str, key: str, form: str, scale: float = 1) -> Callable[[dict[str, Any]], str]:
        return lambda found: format(scale * found[part][key], form) if found.get(part) else ""

    rows = [
        row("KL to the source, nats per token", lambda found: _with_error(found.get("kl"))),
        row("greedy tokens equal, mean", of("agreement", "mean", ".1f")),
        row("… median", of("agreement", "median", ".1f")),
        *(row(f"repeated {n}-grams, %", of("repetition", f"rep_{n}", ".1f", 100)) for n in (2, 3, 4)),
        *(row(f"distinct {n}-grams, %", of("repetition", f"distinct_{n}", ".1f", 100)) for n in (1, 2)),
        row("steps equal with and without cache", _cached),
        row("… largest difference of logits", of("cached", "difference", ".2g")),
    ]
    return ["", *map(escape, columns)], [cells for cells in rows if any(cells[1:])]


def _with_error(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    return f"{entry['value']:.4f}" + ("" if entry.get("stderr") is None else f" ± {entry['stderr']:.4f}")


def _cached(found: dict[str, Any]) -> str:
    entry = found.get("cached")
    return f"{entry['equal']} of {entry['checked']}" if entry else ""


def speed(shown: View) -> str:
    """Time per token, memory and cache by context, for every number of rows; and all of it as a table."""
    columns = {name: column["speed"] for name, column in shown.columns.items() if column.get("speed")}
    if not columns:
        return ""
    drawn = []
    for batch in sorted({row["batch"] for rows in columns.values() for row in rows}):
        own = {name: [row for row in rows if row["batch"] == batch] for name, rows in columns.items()}
        own = {name: sorted(rows, key=lambda row: row["context"]) for name, rows in own.items() if rows}
        at = f"{batch} row" + "s" * (batch > 1)
        for key, title, scale, ylabel in (
            ("token_seconds", "Time per decoded token", 1000, "milliseconds"),
            ("peak_bytes", "Peak memory while decoding", 1, "memory"),
            ("cache_bytes", "Cache", 1, "cache"),
        ):
            series = {
                name: [(row["context"], scale * row[key]) for row in rows if row.get(key)] for name, rows in own.items()
            }
            series = {name: points for name, points in series.items() if points}
            if not series:
                continue
            whiskers = None
            if key == "token_seconds":
                whiskers = {
                    name: [(1000 * row["low"], 1000 * row["high"]) for row in rows] for name, rows in own.items()
                }
            drawn.append(
                _lines(
                    series,
                    f"{title}, {at}",
                    "By tokens in the cache.",
                    shown.styles,
                    ylabel,
                    xlabel="tokens of context",
                    log_y=True,
                    as_bytes=scale == 1,
                    ranges=whiskers,
                )
            )
    header = ["", "context", "rows", "prefill, s", "ms per token", "low to high", "peak memory", "cache"]
    rows = [[escape(name), *_speed_cells(row)] for name, found in columns.items() for row in found]
    left_out = [
        f'<p class="dim">Not measured: {escape(name)} at {cell["context"]} tokens, {cell["batch"]} rows: '
        f"{escape(cell['reason'])}.</p>"
        for name, column in shown.columns.items()
        for cell in column.get("speed_left_out", ())
    ]
    numbers = more("All times and sizes", table(header, rows))
    return section("Speed and memory by context", figures(drawn), *left_out, numbers)


def _speed_cells(row: dict[str, Any]) -> list[str]:
    low, high = (1000 * row[key] for key in ("low", "high"))
    sizes = ["" if row[key] is None else format_bytes(row[key]) for key in ("peak_bytes", "cache_bytes")]
    prefill = "" if row["prefill_seconds"] is None else f"{row['prefill_seconds']:.3g}"
    times = [f"{1000 * row['token_seconds']:.2f}", f"{low:.2f} to {high:.2f}"]
    return [str(row["context"]), str(row["batch"]), prefill, *times, *sizes]


def layers(shown: View) -> str:
    """Which layer has which mixer, window and sinks."""
    parts = []
    for student, report in zip(shown.students, shown.reports, strict=True):
        rows = report.get("layers")
        if not rows:
            continue
        words = [_layer_words(row) for row in rows]
        kinds = list(dict.fromkeys(words))
        colours = {kind: "#222222" if kind == "softmax" else charts.MORE[i] for i, kind in enumerate(kinds)}
        name = f"{student}: " if len(shown.students) > 1 else ""
        label = f"Layers of {student}. " + ", ".join(
            f"{row['layer']} {kind}" for row, kind in zip(rows, words, strict=True)
        )
        counts = [(f"{kind}: {words.count(kind)} of {len(rows)} layers", colours[kind], "-") for kind in kinds]
        chart = charts.layer_map([kinds.index(kind) for kind in words], [colours[kind] for kind in kinds], label)
        parts.append(figure(chart, f"<strong>{escape(name)}What each layer attends with.</strong>", colour_key(counts)))
    return section("Layers", figures(parts)) if parts else ""


def _layer_words(row: dict[str, Any]) -> str:
    """``gla, window 64, sinks 4, …``; settings of the mixer in the order of its configuration."""
    if row["mixer"] == "softmax":
        return "softmax"
    return ", ".join(
        [
            row["mixer"],
            *(f"{key} {value}" for key, value in row.items() if key not in ("layer", "mixer") and value is not None),
        ]
    )
