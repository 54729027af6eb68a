"""The comparison, and its speed alone, as tables on the terminal."""

import json
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from linearize.formats import aligned, each_string, format_bytes, plain, ranges, recording
from linearize.results.file import presenting
from linearize.results.numbers import fixed
from linearize.results.table import Table as Content
from linearize.results.table import lay_out, speed_cell, speed_left_out

_COUNTS = ("parameters", "new_parameters")


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Print the table of a results file, with its notes.

    Args:
        results: valid results.
        console: where to; None means stdout, at least 100 characters wide where that is no terminal.
    """
    console = console or _stdout()
    results = each_string(results, plain)
    with presenting([results]):
        content = lay_out(results)
    table = _comparison(results, content)
    if console.measure(table, options=console.options.update_width(1000)).maximum > console.width:
        tight = [[cell.replace(" ± ", "±").replace(" %", "%") for cell in row] for row in content.rows]
        table = _comparison(results, replace(content, rows=tight))
    _print(console, table, content.notes)


def _print(console: Console, table: Table, notes: list[str]) -> None:
    console.print(table)
    for note in notes:
        console.print(Text(f"• {note}"))


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(title, "table.title"), title_justify="left")
    table.add_column("", no_wrap=True)
    return table


def _comparison(results: dict[str, Any], content: Content) -> Table:
    table = _table(f"{results['model']}, suite {results['suite']}")
    table.collapse_padding = True
    for name in content.header[1:]:
        # Two lines for the columns with one branch: six columns then fit on 100 characters.
        style = "bold" if name == "student" else None
        table.add_column(Text(name.replace("/", "\n/")), justify="right", style=style, overflow="fold")
    summarised = False
    for label, *cells in content.rows:
        # A rule above each block: tasks, summary, perplexities, speed.
        starts = label == "perplexity" or label.startswith("ms per token")
        if starts or not summarised and label in ("average", "kept of the source"):
            summarised = True
            table.add_section()
        table.add_row(*map(Text, (label, *cells)))
    return table


def show_speed(results: dict[str, Any], console: Console | None = None) -> None:
    """Print all of `speed`: four rows per context and batch, with the student's share of the source and the control.

    Args:
        results: valid results.
        console: as for `show`.
    """
    results = each_string(results, plain)
    columns = results["columns"]
    table = _table(f"{results['model']}: reading and decoding")
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name == "student" else None)
    controls = [name for name in columns if name != "student"] if "student" in columns else []
    for name in controls:
        table.add_column(f"student /\n{name}", justify="right")
    measured = {(cell["batch"], cell["context"]) for column in columns.values() for cell in column.get("speed", [])}
    for batch, context in sorted(measured):
        cells = {name: speed_cell(column, context, batch) for name, column in columns.items()}
        table.add_section()
        table.add_row(f"{context} tokens, batch {batch}")
        for label, key, words in (
            ("  prefill, s", "prefill_seconds", lambda cell: fixed(cell["prefill_seconds"], 2)),
            ("  ms per token (quartiles)", "token_seconds", _milliseconds),
            ("  cache", "cache_bytes", lambda cell: format_bytes(cell["cache_bytes"])),
            ("  peak memory, decoding", "peak_bytes", lambda cell: format_bytes(cell["peak_bytes"])),
        ):
            known = {name: cell for name, cell in cells.items() if cell is not None and cell[key] is not None}
            ratios = [
                f"{known['student'][key] / known[name][key]:.3g}" if {"student", name} <= known.keys() else ""
                for name in controls
            ]
            table.add_row(label, *(words(known[name]) if name in known else "" for name in cells), *ratios)
    _print(console or _stdout(), table, [_machine(results), *speed_left_out(columns)])


def _machine(results: dict[str, Any]) -> str:
    environment, settings = results["environment"], results["settings"]
    versions = ", ".join(
        f"{name} {environment['versions'][name]}"
        for name in ("linearize", "torch", "transformers", "flash-linear-attention")
        if name in environment["versions"]
    )
    device = "" if settings["device"] == "cpu" else f"{environment['device']}; "
    machine = f"{device}{environment['cpu']}, {environment['threads']} threads"
    weights = " ".join(filter(None, (settings["dtype"], settings.get("quantize"))))
    return f"{machine}; {weights}; {versions}; commit {environment['commit'] or 'unknown'}"


def speed_panels(results: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float, int]]]]:
    """What `linearize.reporting.plot.draw_speed` draws: a panel per batch."""
    panels: dict[str, dict[str, list[tuple[int, float, int]]]] = {}
    for name, column in results["columns"].items():
        for cell in column.get("speed", []):
            points = panels.setdefault(f"batch {cell['batch']}", {}).setdefault(name, [])
            points.append((cell["context"], cell["token_seconds"], cell["cache_bytes"]))
    return panels


def _milliseconds(cell: dict[str, Any]) -> str:
    middle, low, high = (fixed(cell[key], 1, 1e3) for key in ("token_seconds", "low", "high"))
    return f"{middle} ({low}–{high})"


def _stdout() -> Console:
    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, 100)
    return console


def inspection(description: dict[str, Any]) -> str:
    """What `inspect` returned, for a terminal: one fact per line, then the layers as a table, equal ones together."""
    parameters = (
        ""
        if description["parameters"] is None
        else f"{description['parameters']:,}, {description['new_parameters']:,} new; "
    )
    origin = description["source"]
    rows = [
        ("folder", description["path"]),
        (
            "type",
            description["model_type"] + (plain(f", from {origin['id']} ({origin['model_type']})") if origin else ""),
        ),
        ("parameters", f"{parameters}{format_bytes(description['bytes'])} {' '.join(description['dtypes'])}".rstrip()),
        *(
            (
                f"cache at {row['context'] // 1024}K",
                f"{format_bytes(row['linearized'])} (source {format_bytes(row['source_kv'])})"
                + recording(description["cache"]),
            )
            for row in description["cache"]["contexts"]
        ),
    ]
    if "adapter" in description:
        adapter = description["adapter"]
        rows.insert(1, ("adapter", f"{adapter['peft_type']}, r {adapter['r']}, {adapter['parameters']:,} parameters"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", *_layers(description["layers"])])


def _layers(layers: list[dict[str, Any]]) -> list[str]:
    """Lines of a table; layers that differ in nothing but their number share a row."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in layers:
        groups.setdefault(json.dumps({key: value for key, value in row.items() if key != "layer"}), []).append(row)
    own = ("layer", "mixer", "window", "sinks", "bytes", "cache_32k", *_COUNTS)
    table: list[tuple[str, ...]] = [
        ("layers", "mixer", "window", "sinks", "parameters", "new", "bytes", "cache at 32K", "settings")
    ]
    for rows in groups.values():
        row = rows[0]
        settings = "" if row["mixer"] == "softmax" else ", ".join(f"{k} {v}" for k, v in row.items() if k not in own)
        reach = [str(row.get(key, "-")) if row["mixer"] != "softmax" else "-" for key in ("window", "sinks")]
        counts = [f"{row[key]:,}" for key in _COUNTS] + [format_bytes(row[key]) for key in ("bytes", "cache_32k")]
        table.append((ranges([each["layer"] for each in rows]), row["mixer"], *reach, *counts, settings))
    return aligned(table)
