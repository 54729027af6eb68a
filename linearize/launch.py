"""Run a verb of the command line under `accelerate launch`."""

import signal
import subprocess
import sys
from collections.abc import Sequence

from linearize.errors import InputError

TOLD = 3.0
"""Seconds in which a launcher ends after Ctrl-C on a terminal, which reaches it too; a signal to this process alone has
to be passed on, since the processes that a launcher starts would otherwise go on without it."""


def launch(
    verb: str, flags: Sequence[str], module: str, arguments: Sequence[str], *, stdout: int | None = None
) -> None:
    """Run a module under ``accelerate launch``, and wait for it.

    Args:
        verb: of the command line, for errors.
        flags: of ``accelerate launch``.
        module: what the processes run, ``linearize.cli``.
        arguments: of the module.
        stdout: where their stdout goes, as for `subprocess.Popen`; None leaves it where ours goes.

    Raises:
        InputError: the flags are none, or the launched processes failed (they have said why).
    """
    if not flags[0].startswith("-"):
        instead = "give each override its own --set" if "=" in flags[0] else "flags for `accelerate launch` go after --"
        raise InputError(f"{verb}: found {flags[0]!r} after the folder; {instead}")
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", module, *arguments]
    process = subprocess.Popen(command, stdout=stdout)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(TOLD)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        raise
    if code:
        raise InputError(
            f"{verb}: `accelerate launch {' '.join(flags)}` ended with code {code}; the reason is printed above"
        )
