"""What stops a command stops all that it has started, and says so by its exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linearize import launch
from linearize.errors import InputError
from linearize.recipe.resources import package_folder

CODE = """
import sys, time
from linearize.launch import launch, stoppable

@stoppable
def main():
    try:
        WORK
    except KeyboardInterrupt:
        time.sleep(0.5)
        print("kept", flush=True)
        raise SystemExit(130)

main()
"""
WAIT = 'print("began", flush=True); time.sleep(60)'
CHILD = """
import os, pathlib, sys, time
from linearize.launch import stoppable

@stoppable
def main():
    pathlib.Path("pid").write_text(str(os.getpid()))
    try:
        time.sleep(60)
    except KeyboardInterrupt as stop:
        time.sleep(1)
        pathlib.Path("ended").write_text(repr(stop))
        raise SystemExit(130)

main()
"""


def begin(code: str, ignored: int | None = None, **options) -> subprocess.Popen:
    def before() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    options |= {"stdout": subprocess.PIPE, "text": True, "preexec_fn": before}
    return subprocess.Popen([sys.executable, "-c", code], **options)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], 129),
        ([signal.SIGINT], 130),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGHUP], 143),
    ],
)
def test_a_signal_ends_a_command_as_an_interrupt_does(numbers: list[int], code: int) -> None:
    with begin(CODE.replace("WORK", WAIT)) as process:
        assert process.stdout and process.stdout.readline() == "began\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)
        assert process.stdout.read() == "kept\n"
    assert process.returncode == code


def test_a_signal_in_the_midst_of_an_error_is_no_traceback() -> None:
    work = f"raise OSError\n    except OSError:\n        {WAIT}\n    try:\n        pass"
    with begin(CODE.replace("WORK", work), stderr=subprocess.STDOUT) as process:
        assert process.stdout and process.stdout.readline() == "began\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == ""
    assert process.returncode == 143


STUCK_POOL = """
import os, signal, time
from concurrent import futures
from linearize import launch

class Interrupted(futures._base._AcquireFutures):
    def __exit__(self, *_):
        futures._base._AcquireFutures = interrupted
        os.kill(os.getpid(), signal.NUMBER)
        super().__exit__()

interrupted, futures._base._AcquireFutures = futures._base._AcquireFutures, Interrupted
launch.STUCK = 0.3

@launch.stoppable
def main():
    try:
        with futures.ThreadPoolExecutor(2) as pool:
            for done in futures.as_completed([pool.submit(time.sleep, 0.2) for _ in range(4)]):
                done.result()
    except KeyboardInterrupt:
        raise SystemExit(130)

main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_lock_that_a_signal_left_held_does_not_keep_the_process(name: str, code: int) -> None:
    """As it happened in an upload: the pool's threads wait for a future's lock, and the end waits for them."""
    with begin(STUCK_POOL.replace("NUMBER", name), stderr=subprocess.PIPE) as process:
        _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (code, "Interrupted.\n")


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    with begin(CODE.replace("WORK", WAIT.replace("60", "1")), ignored=signal.SIGHUP) as process:
        assert process.stdout and process.stdout.readline() == "began\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129), (signal.SIGINT, "", 130)],
)
def test_all_that_a_launcher_has_started_ends_with_it(tmp_path: Path, number: int, name: str, code: int) -> None:
    """The launcher itself dies at once; what it has started takes a moment to keep its work."""
    (tmp_path / "child.py").write_text(CHILD)
    work = "launch('train', ['--cpu', '--num_processes', '1'], 'child', [])"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    with begin(CODE.replace("WORK", work), cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}) as process:
        began = time.monotonic()
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            assert process.poll() is None and time.monotonic() < began + 100
            time.sleep(0.05)
        process.send_signal(number)
        assert process.communicate()[0] == "kept\n"
    assert process.returncode == code
    assert (tmp_path / "ended").read_text() == (f"Stopped('{name}')" if name else "KeyboardInterrupt()")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    with begin(code, start_new_session=True) as process:
        assert process.stdout and process.stdout.readline()
        launch._end(process, signal.SIGTERM)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("flags", [["--use_deepspeed"], ["--config_file", "zero3.yaml"], ["--config_file=zero3.yaml"]])
def test_deepspeed_that_is_not_there_is_one_sentence(flags, tmp_path, monkeypatch) -> None:
    shipped = package_folder("recipes") / "accelerate" / "deepspeed_zero3.yaml"
    (tmp_path / "zero3.yaml").write_text(shipped.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("linearize.launch.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^train: the flags ask for DeepSpeed .ZeRO-3., which is not installed: pip"):
        launch.launch("train", flags, "linearize.cli", [])
