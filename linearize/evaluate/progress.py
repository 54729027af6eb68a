"""One tidy line per column on stderr, in place of everything that the libraries below would print."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from io import StringIO
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tqdm import tqdm


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars, prints and log lines of the libraries below; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    original = tqdm.__init__

    def silent(self, *args, **kwargs):
        original(self, *args, **{**kwargs, "disable": True})

    # Without it lm-eval's bootstrap of perplexities forks a process per core, each with a copy of the model.
    parallel = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    tqdm.__init__ = silent
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(StringIO()):
            yield
    finally:
        tqdm.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if parallel is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = parallel


@contextlib.contextmanager
def stopwatch(column: dict[str, Any]) -> Iterator[None]:
    """Add the seconds of the block to those of a column."""
    start = time.perf_counter()
    yield
    column["seconds"] += time.perf_counter() - start
