"""The comparison as a table on the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from linearize import results as results_file


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Print the table of a results file, with its notes.

    Args:
        results: valid results.
        console: where to; None means stdout, at least 100 characters wide where that is no terminal.
    """
    if console is None:
        console = Console()
        console.width = console.width if console.is_terminal else max(console.width, 100)
    content = results_file.table(results)
    table = Table(box=box.SIMPLE_HEAD, title=f"{results['model']}, suite {results['suite']}", title_justify="left")
    table.add_column(content.header[0], no_wrap=True)
    for name in content.header[1:]:
        # Two lines for the columns with one branch off: six columns then fit on 100 characters.
        table.add_column(name.replace("/", "\n/"), justify="right", style="bold" if name == "student" else None)
    summarised = False
    for row in content.rows:
        # A rule above each block: tasks, summary, perplexities.
        if row[0] == "perplexity" or not summarised and row[0] in ("average", "kept of the source"):
            summarised = True
            table.add_section()
        table.add_row(*row)
    console.print(table)
    for note in content.notes:
        console.print(f"• {note}", highlight=False)
