"""One tidy line per column on stderr, in place of everything that the libraries below would print."""

import contextlib
import logging
import os
from collections.abc import Iterator
from io import StringIO

from tqdm import tqdm


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
