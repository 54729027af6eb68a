"""The command line: each verb reads its arguments, calls one function and prints what it returns.

Results go to stdout, as text or with ``--json`` as JSON; plans, progress and errors go to stderr. Exit codes: 0 done,
1 a comparison fell short, 2 bad input, 130 interrupted. Everything heavy is imported inside the verbs, so that
``--help`` answers at once.
"""

import sys
import warnings

from linearize.cli import prepare, stages, tables
from linearize.cli.app import app, is_main
from linearize.errors import InputError

__all__ = ["app", "main", "prepare", "stages", "tables"]


def main() -> None:
    """Run the command line; bad input ends in one paragraph on stderr and exit code 2."""
    # A dependency that warns of changes to come in another dependency tells the user nothing; the tests catch them.
    warnings.simplefilter("ignore", FutureWarning)
    try:
        app()
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if is_main():
            print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
