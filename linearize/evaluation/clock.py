"""Clock and memory of this machine: how everything that compares speed measures it."""

import contextlib
import ctypes
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

PEAK = "VmHWM"
"""Field of /proc/self/status: the peak of resident memory."""


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Time one call.

    Args:
        call: what is timed.
        device: that it runs on; of a GPU the time is that from idle to idle.

    Returns:
        What it returned, and its wall time in seconds.
    """
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a GPU is idle; return at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: list[float]) -> dict[str, float]:
    """{seconds, low, high, samples}: median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"seconds": middle, "low": low, "high": high, "samples": len(seconds)}


def rotated(items: list, by: int) -> list:
    """The items with another one first: `by` is the number of the round, so that nobody always follows the pause."""
    by %= max(len(items), 1)
    return items[by:] + items[:by]


def has_peak() -> bool:
    """Whether this system tells, and forgets, the peak of resident memory; Linux does."""
    return Path("/proc/self/clear_refs").exists()


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status, such as `PEAK`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Give freed memory back and start `PEAK` anew; returns the resident bytes from which it starts."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def no_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice; PyTorch has no class of its own for that of the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def in_process(command: list[str], task: Any, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Measure in a process of its own, whose memory is then that of the task alone.

    Args:
        command: Python's arguments; what runs reads its task with `read_task` and ends with `print(json.dumps(…))`.
        task: anything that can be pickled.
        env: variables added to the environment.

    Returns:
        What the process printed; {"failed": reason} where the system killed it, most likely for its memory.

    Raises:
        RuntimeError: it ended with an error, which stands on stderr.
    """
    command = [sys.executable, *command]
    done = subprocess.run(command, input=pickle.dumps(task), stdout=subprocess.PIPE, env={**os.environ, **(env or {})})
    if done.returncode < 0:
        return {"failed": f"killed by signal {-done.returncode}, most likely for lack of memory"}
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: ended with exit code {done.returncode}; the reason is printed above")
    return json.loads(done.stdout)


def read_task() -> Any:
    """The task that `in_process` gave to this process."""
    return pickle.load(sys.stdin.buffer)


@contextlib.contextmanager
def stopwatch(column: dict[str, Any]) -> Iterator[None]:
    """Add the seconds of the block to those of a column."""
    start = time.perf_counter()
    yield
    column["seconds"] += time.perf_counter() - start
