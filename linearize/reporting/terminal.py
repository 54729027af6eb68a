"""The comparison, and its speed alone, as tables on the terminal."""

from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from linearize.formats import format_bytes
from linearize.results.table import Table as Content
from linearize.results.table import lay_out, speed_cell


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Print the table of a results file, with its notes.

    Args:
        results: valid results.
        console: where to; None means stdout, at least 100 characters wide where that is no terminal.
    """
    console = console or _stdout()
    content = lay_out(results)
    table = _comparison(results, content)
    if console.measure(table, options=console.options.update_width(1000)).maximum > console.width:
        table = _comparison(results, replace(content, rows=[list(map(_tight, row)) for row in content.rows]))
    console.print(table)
    for note in content.notes:
        console.print(f"• {note}", highlight=False)


def _comparison(results: dict[str, Any], content: Content) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{results['model']}, suite {results['suite']}", title_justify="left")
    table.collapse_padding = True
    table.add_column(content.header[0], no_wrap=True)
    for name in content.header[1:]:
        # Two lines for the columns with one branch off: six columns then fit on 100 characters.
        style = "bold" if name == "student" else None
        table.add_column(name.replace("/", "\n/"), justify="right", style=style, overflow="fold")
    summarised = False
    for row in content.rows:
        # A rule above each block: tasks, summary, perplexities, speed.
        if (
            row[0] == "perplexity"
            or row[0].startswith("ms per token")
            or not summarised
            and row[0] in ("average", "kept of the source")
        ):
            summarised = True
            table.add_section()
        table.add_row(*row)
    return table


def _tight(cell: str) -> str:
    return cell.replace(" ± ", "±").replace(" %", "%")


def show_speed(results: dict[str, Any], console: Console | None = None) -> None:
    """Print all of `speed`: four rows per context and batch, with the student's share of the source and the control.

    Args:
        results: valid results.
        console: as for `show`.
    """
    console = console or _stdout()
    columns, environment, settings = (results[key] for key in ("columns", "environment", "settings"))
    table = Table(box=box.SIMPLE_HEAD, title=f"{results['model']}: reading and decoding", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name == "student" else None)
    controls = [name for name in columns if name != "student"] if "student" in columns else []
    for name in controls:
        table.add_column(f"student /\n{name}", justify="right")
    cells = [cell for column in columns.values() for cell in column.get("speed", [])]
    for batch, context in sorted({(cell["batch"], cell["context"]) for cell in cells}):
        found = {name: speed_cell(column, context, batch) for name, column in columns.items()}
        table.add_section()
        table.add_row(f"{context} tokens, batch {batch}")
        for label, key, shape in (
            ("  prefill, s", "prefill_seconds", lambda cell: f"{cell['prefill_seconds']:.2f}"),
            ("  ms per token (quartiles)", "token_seconds", _milliseconds),
            ("  cache", "cache_bytes", lambda cell: format_bytes(cell["cache_bytes"])),
            ("  peak memory, decoding", "peak_bytes", lambda cell: format_bytes(cell["peak_bytes"])),
        ):
            there = {name: cell for name, cell in found.items() if cell is not None and cell[key] is not None}
            ratios = [
                f"{there['student'][key] / there[name][key]:.3g}" if {"student", name} <= there.keys() else ""
                for name in controls
            ]
            table.add_row(label, *(shape(there[name]) if name in there else "" for name in found), *ratios)
    console.print(table)
    versions = ", ".join(
        f"{name} {environment['versions'][name]}"
        for name in ("linearize", "torch", "transformers", "flash-linear-attention")
        if name in environment["versions"]
    )
    machine = f"{environment['cpu']}, {environment['threads']} threads"
    if settings["device"] != "cpu":
        machine = f"{environment['device']}; {machine}"
    notes = [f"{machine}; {settings['dtype']}; {versions}; commit {environment['commit'] or 'unknown'}"]
    for name, column in columns.items():
        for cell in column.get("speed_left_out", []):
            notes.append(f"no {name} at {cell['context']} tokens, batch {cell['batch']}: {cell['reason']}")
    for note in notes:
        console.print(f"• {note}", highlight=False)


def speed_panels(results: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float, int]]]]:
    """What `linearize.plot.draw_speed` draws: a panel per batch."""
    panels: dict[str, dict[str, list[tuple[int, float, int]]]] = {}
    for name, column in results["columns"].items():
        for cell in column.get("speed", []):
            points = panels.setdefault(f"batch {cell['batch']}", {}).setdefault(name, [])
            points.append((cell["context"], cell["token_seconds"], cell["cache_bytes"]))
    return panels


def _milliseconds(cell: dict[str, Any]) -> str:
    middle, low, high = (1e3 * cell[key] for key in ("token_seconds", "low", "high"))
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def _stdout() -> Console:
    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, 100)
    return console
