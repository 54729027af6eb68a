"""The command line: each verb reads its arguments, calls one function and prints what it returns.

Results go to stdout, as text or with ``--json`` as JSON; plans, progress and errors go to stderr. Exit codes: 0 done,
1 a comparison fell short, 2 bad input, 70 a fault of this package, 129, 130 and 143 stopped by SIGHUP, SIGINT and
SIGTERM, 141 nobody reads stdout any more. Everything heavy is imported inside the verbs, so that ``--help`` answers at
once.
"""

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings

from linearize.cli import conversion, evaluation, listings, recovery, use
from linearize.cli.app import DEBUG, HandedOn, app, is_main
from linearize.errors import InputError, disk_error
from linearize.formats import plain
from linearize.launch import stoppable

__all__ = ["app", "conversion", "evaluation", "listings", "main", "recovery", "use"]

ORDER = (
    *("convert", "allocate", "calibrate", "select", "train", "transfer", "distil", "long", "merge", "prune", "run"),
    *("eval", "bench", "report", "generate", "push", "export"),
)
"""Of the verbs in `--help`: as data flow. Those that only tell come last."""
SECONDS_TO_SAY_IT = 10.0
_names = {id(command): command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
app.registered_commands.sort(key=lambda command: (*ORDER, _names[id(command)]).index(_names[id(command)]))


@stoppable
def main() -> None:
    """Run the command line; bad input ends in one paragraph on stderr and exit code 2, a fault of ours in 70."""
    # A dependency that warns of changes to come in another dependency tells the user nothing; the tests catch them.
    warnings.simplefilter("ignore", FutureWarning)
    for name in ("torchao", "torch.utils._pytree"):  # peft imports torchao, which tells what GPUs it has no code for
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *_: f"Warning: {message}\n"
    try:
        try:
            app()
        except HandedOn as error:
            raise error.__cause__ or error from None
        except SystemExit as ended:
            if isinstance(ended.__context__, BrokenPipeError):  # so does rich
                raise ended.__context__ from None
            if isinstance(ended.code, str):  # a library gave up
                raise RuntimeError(ended.code) from ended
            sys.stdout.flush()
            raise
    except BrokenPipeError:  # what reads stdout has seen enough: `| head`
        with contextlib.suppress(OSError):  # the interpreter flushes it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        if is_main():
            print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        said = disk_error(error)
        own = FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError  # rather a fault of ours
        if said is not None and not isinstance(error, own):  # where nobody has said more
            error = InputError(f"{said}; free some space, or name a folder that can be read and written")
        expected = isinstance(error, InputError)
        if not is_main():  # the main process mostly says the same, and its launcher ends this one meanwhile
            time.sleep(SECONDS_TO_SAY_IT)
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        print(plain(f"Error: {error if expected else _fault(error)}", lines=True), file=sys.stderr)
        raise SystemExit(2 if expected else 70) from None


def _fault(error: Exception) -> str:
    """One line about an exception that nobody foresaw."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return f"not enough memory ({text}); take a smaller batch, context or model, or a machine with more"
    where = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in where if "linearize" in frame.filename] or where
    line = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else "an unknown line"
    return (
        f"linearize met what it did not foresee, at {line}: {text}. Please report it with the command and the output "
        "of `linearize doctor`; `linearize --debug VERB ...` shows the traceback"
    )
