"""Whether what a run needs can fit into this machine at all: seen before the work, not after an hour of it."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from linearize.errors import InputError
from linearize.formats import format_bytes

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may have."""


def memory(device: torch.device | None = None) -> int:
    """Bytes of memory that a device has in all; None means the machine, as far as this container may use it."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    sizes = []
    with suppress(OSError, ValueError, AttributeError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in LIMITS:
        with suppress(OSError, ValueError):
            sizes.append(int(Path(file).read_text()))
    return min(sizes, default=1 << 62)


def check_memory(needed: int, where: str, advice: str, device: torch.device | None = None) -> None:
    """Refuse what no free memory could make possible.

    Args:
        needed: bytes, at the very least.
        where: what needs them, for the error.
        advice: what to do.
        device: that must hold them.

    Raises:
        InputError: all memory that there is would not do.
    """
    if needed > (there := memory(device)):
        what = f"device {device}" if device is not None and device.type != "cpu" else "this machine"
        raise InputError(
            f"{where} needs at least {format_bytes(needed)} of memory, and {what} has {format_bytes(there)}; {advice}"
        )
