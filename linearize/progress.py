"""The one progress bar: on stderr where that is a terminal, nothing or one line elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes on stderr while the block runs; nothing where stderr is no terminal.

    Args:
        description: what is being done.
        total: bytes.

    Yields:
        A function to call with the number of bytes done since the last call.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def step_progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr while the block runs; yields a function to call after each of `total` parts."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


class Bar:
    """A progress bar on a terminal; elsewhere one line when a column is finished."""

    def __init__(self, enabled: bool):
        self._console = Console(stderr=True)
        live = enabled and sys.stderr.isatty()
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=self._console, disable=not live, transient=True)
        self._enabled = enabled
        self._task = None

    def __enter__(self) -> "Bar":
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def start(self, text: str, total: int | None = None) -> None:
        """Begin a new bar in place of the last one; without a total it only moves."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=total)

    def expect(self, total: int) -> None:
        """Say how many steps the bar begun last has."""
        if self._task is not None:
            self._bars.update(self._task, total=total)

    def advance(self, count: int = 1) -> None:
        if self._task is not None:
            self._bars.advance(self._task, count)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(text, highlight=False)
