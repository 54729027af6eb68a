"""The command line: each verb reads its arguments, calls one function and prints what it returns.

Results go to stdout, as text or with ``--json`` as JSON; plans, progress and errors go to stderr. Exit codes: 0 done,
1 a comparison fell short, 2 bad input, 130 interrupted. Everything heavy is imported inside the verbs, so that
``--help`` answers at once.
"""

import sys
import time
import warnings

from linearize.cli import conversion, evaluation, listings, recovery, use
from linearize.cli.app import app, is_main
from linearize.errors import InputError
from linearize.launch import stoppable

__all__ = ["app", "conversion", "evaluation", "listings", "main", "recovery", "use"]

ORDER = (
    *("convert", "calibrate", "select", "train", "transfer", "distil", "long", "merge", "run"),
    *("eval", "bench", "report", "generate", "push", "export"),
)
"""Of the verbs in `--help`: as data flow. Those that only tell come last."""
SECONDS_TO_SAY_IT = 10.0
_names = {id(command): command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
app.registered_commands.sort(key=lambda command: (*ORDER, _names[id(command)]).index(_names[id(command)]))


@stoppable
def main() -> None:
    """Run the command line; bad input ends in one paragraph on stderr and exit code 2."""
    # A dependency that warns of changes to come in another dependency tells the user nothing; the tests catch them.
    warnings.simplefilter("ignore", FutureWarning)
    try:
        app()
    except InputError as error:
        if not is_main():  # the main process mostly says the same, and its launcher ends this one meanwhile
            time.sleep(SECONDS_TO_SAY_IT)
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if is_main():
            print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
