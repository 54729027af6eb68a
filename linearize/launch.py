"""Run a verb of the command line under `accelerate launch`, and stop it, whatever it is stopped by."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import FrameType

from linearize.errors import InputError

GRACE = 45.0
"""Seconds in which stopped processes end by themselves; torch gives those that it has started 30."""
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal that ends this process as Ctrl-C does; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def stoppable(main: Callable[[], None]) -> Callable[[], None]:
    """Let SIGTERM and SIGHUP end a command line as SIGINT does: work so far is kept, the exit code is 128 + signal.

    A signal that was ignored before (``nohup``) stays ignored, and a second one does not disturb the end.
    """

    @wraps(main)
    def run() -> None:
        if threading.current_thread() is not threading.main_thread():
            return main()
        before = {number: signal.getsignal(number) for number in STOPS}
        mine, came = [number for number in STOPS if before[number] == signal.SIG_DFL], []

        def stop(number: int, frame: FrameType | None) -> None:
            for each in mine:
                signal.signal(each, signal.SIG_IGN)
            came.append(number)
            raise Stopped(number)

        for number in mine:
            signal.signal(number, stop)
        try:
            return main()
        except (SystemExit, Stopped) as ended:
            if came and (isinstance(ended, Stopped) or ended.code):
                raise SystemExit(128 + came[0]) from None
            raise
        finally:
            for number in mine:
                signal.signal(number, before[number])

    return run


def check_flags(verb: str, flags: Sequence[str]) -> None:
    """Refuse what stands where flags of ``accelerate launch`` do and is none.

    Raises:
        InputError: says where it belongs.
    """
    if flags and not flags[0].startswith("-"):
        instead = "give each override its own --set" if "=" in flags[0] else "flags for `accelerate launch` go after --"
        raise InputError(f"{verb}: found {flags[0]!r} after the folder; {instead}")


def _check_deepspeed(verb: str, flags: Sequence[str]) -> None:
    """Refuse flags that ask for DeepSpeed where it is not installed: accelerate would end with a traceback."""
    files = [Path(value) for flag, value in pairwise([*flags, ""]) if flag in ("--config_file", "--config-file")]
    files += [Path(flag.partition("=")[2]) for flag in flags if flag.startswith(("--config_file=", "--config-file="))]
    wanted = "--use_deepspeed" in flags or "--use-deepspeed" in flags
    for file in files:
        with suppress(OSError):
            wanted = wanted or re.search(r"^distributed_type:\s*['\"]?DEEPSPEED", file.read_text(), re.MULTILINE)
    if wanted and find_spec("deepspeed") is None:
        raise InputError(
            f"{verb}: the flags ask for DeepSpeed (ZeRO-3), which is not installed: pip install deepspeed, on a "
            "machine with a GPU and its compiler; or divide the weights without it, by recipes/accelerate/fsdp2.yaml"
        )


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
        InputError: the flags are none, ask for what is not installed, or the processes failed (they have said why).
    """
    check_flags(verb, flags)
    _check_deepspeed(verb, flags)
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", module, *arguments]
    # A session of its own: whatever stops this process is told to all that the launcher has started, once.
    process = subprocess.Popen(command, stdout=stdout, start_new_session=True)
    try:
        code = process.wait()
    except BaseException as stop:
        _end(process, stop.number if isinstance(stop, Stopped) else signal.SIGINT)
        raise
    if code:
        raise InputError(
            f"{verb}: `accelerate launch {' '.join(flags)}` ended with code {code}; the reason is printed above"
        )


def _end(process: subprocess.Popen, number: int) -> None:
    """Tell a signal to a launcher and all that it has started; kill what has not ended after a while, or at Ctrl-C."""
    deadline = time.monotonic() + GRACE
    try:
        _tell(process, number)
        while time.monotonic() < deadline and (process.poll() is None or _tell(process, 0)):
            time.sleep(0.05)
    finally:
        _tell(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()


def _tell(process: subprocess.Popen, number: int) -> bool:
    """Send a signal to the group of a process, 0 only asks; returns whether anybody is left in it."""
    try:
        os.killpg(process.pid, number) if hasattr(os, "killpg") else process.send_signal(number)
    except (ProcessLookupError, PermissionError):
        return False
    return process.poll() is None or hasattr(os, "killpg")
