"""The one progress bar, on stderr: live where that is a terminal, elsewhere one line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10


class _Done(ProgressColumn):
    """Steps done of all, or bytes and their rate."""

    def render(self, task: Task) -> Text:
        """What rich shows of a task."""
        total = "?" if task.total is None else f"{int(task.total)}"
        if not task.fields["count_bytes"]:
            return Text(f"{int(task.completed)}/{total}")
        total = "?" if task.total is None else decimal(int(task.total))
        return Text(f"{decimal(int(task.completed))}/{total}  {decimal(int(task.finished_speed or task.speed or 0))}/s")


class Bar:
    """One bar after the other in the same line, and lines that stay above it.

    Args:
        enabled: False shows nothing at all.
    """

    def __init__(self, enabled: bool = True):
        self._console, self._enabled = Console(stderr=True), enabled
        self._live = enabled and sys.stderr.isatty()
        self._text = TextColumn("{task.description}", markup=False), _Done(), TimeRemainingColumn()
        columns = self._text[0], BarColumn(), *self._text[1:]
        options = {"console": self._console, "disable": not self._live, "transient": True, "redirect_stdout": False}
        self._bars = Progress(*columns, **options)
        self._task, self._told = self._bars.add_task("", total=None, visible=False, count_bytes=False), time.monotonic()

    def __enter__(self) -> "Bar":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, text: str, total: int | None = None, *, done: int = 0, count_bytes: bool = False) -> None:
        """Begin a new bar in place of the last one.

        Args:
            text: what is being done.
            total: steps, or bytes; without it the bar only moves.
            done: how many of them were done before.
            count_bytes: show numbers as bytes, with their rate.
        """
        self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=total, completed=done, count_bytes=count_bytes)

    def expect(self, total: int) -> None:
        """Say how many steps the bar begun last has."""
        self._bars.update(self._task, total=total)

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """Report progress.

        Args:
            count: how many more steps or bytes are done.
            text: what is being done now, where that has changed.
        """
        self._bars.update(self._task, advance=count, description=text)
        if self._enabled and not self._live and time.monotonic() - self._told > SECONDS_BETWEEN_LINES:
            (task,) = self._bars.tasks
            text = "  ".join(["", *(str(column.render(task)) for column in self._text)])
            self.line(f"{text} left" if task.total else text.rstrip())

    def line(self, text: str) -> None:
        """A line that stays."""
        self._told = time.monotonic()
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def step_progress(
    text: str, total: int, enabled: bool = True, count_bytes: bool = False
) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs.

    Args:
        text: what is being done.
        total: steps, or bytes.
        enabled: False shows nothing.
        count_bytes: show numbers as bytes, with their rate.

    Yields:
        A function to call with the number of steps or bytes done since the last call; without it, one.
    """
    with Bar(enabled) as bar:
        bar.start(text, total, count_bytes=count_bytes)
        yield bar.advance


byte_progress = partial(step_progress, count_bytes=True)
"""`step_progress` of bytes."""
