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
STUCK = 30.0
"""Seconds between two looks at a process that was stopped and may wait for a thread for ever."""
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal that ends this process as Ctrl-C does; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def stoppable(main: Callable[[], None]) -> Callable[[], None]:
    """Let SIGTERM and SIGHUP end a command line as SIGINT does: work so far is kept, the exit code is 128 + signal.

    A signal that was ignored before (``nohup``) stays ignored, and a second one does not disturb the end. A process
    that then waits for a thread which never ends is ended (see `_end_if_stuck`), also after SIGINT.
    """

    @wraps(main)
    def run() -> None:
        if threading.current_thread() is not threading.main_thread():
            return main()
        before = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGINT)}
        mine, came = [number for number in STOPS if before[number] == signal.SIG_DFL], []
        own = [*mine, *([signal.SIGINT] if before[signal.SIGINT] == signal.default_int_handler else [])]

        def stop(number: int, frame: FrameType | None) -> None:
            for each in mine:
                signal.signal(each, signal.SIG_IGN)
            _end_if_stuck(number)
            came.append(number)
            raise Stopped(number)

        def interrupt(number: int, frame: FrameType | None) -> None:
            _end_if_stuck(number)
            raise KeyboardInterrupt

        for number in own:
            signal.signal(number, stop if number in mine else interrupt)
        try:
            return main()
        except (SystemExit, Stopped) as ended:
            if came and (isinstance(ended, Stopped) or ended.code):
                raise SystemExit(128 + came[0]) from None
            raise
        finally:
            for number in own:
                signal.signal(number, before[number])

    return run


def _end_if_stuck(number: int) -> None:
    """From now on, end this process if its main thread does nothing but wait for another one.

    A signal raises its exception wherever the main thread is. In the middle of `concurrent.futures`, which loads
    weights and talks to the Hub, that can leave a lock held: a thread waits for it for ever, and the main thread, on
    its way out, for the thread.
    """
    if not hasattr(signal, "setitimer") or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        return
    last: list[tuple[FrameType, int]] = []

    def look(_: int, frame: FrameType | None) -> None:
        here = [(frame, frame.f_lasti)] if frame and frame.f_code.co_filename == threading.__file__ else []
        if here and here == last:
            os.write(2, b"Interrupted.\n")
            os._exit(128 + number)
        last[:] = here

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, STUCK, STUCK)


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
