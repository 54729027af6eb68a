"""Whether what a run needs can fit into this machine at all, in memory and on disk: seen before the work, not after an
hour of it. And where what can be made again is kept."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from linearize.errors import InputError
from linearize.formats import format_bytes

_LINK = "choose a folder on another disk, or, in a conversion, share weights with the source by --link"
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


def check_space(out: Path, needed: int, advice: str = _LINK) -> None:
    """Check that the file system of `out` has room.

    Args:
        out: the folder to be written; it need not exist.
        needed: bytes.
        advice: beside freeing space.

    Raises:
        InputError: there is less room than `needed`.
    """
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise InputError(
            f"{out}: the result needs {format_bytes(needed)} and the disk has {format_bytes(free)} free; free some "
            f"space, {advice}"
        )


def _existing_parent(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    return next(parent for parent in (path, *path.parents) if parent.exists())


def cache_folder() -> Path:
    """Where tokenised data sets and what sources say of them are kept; safe to delete at any time.

    Raises:
        InputError: the user has no home folder, and no other is named.
    """
    if named := os.environ.get("LINEARIZE_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linearize"
    except RuntimeError as error:
        raise InputError(
            "LINEARIZE_CACHE: is not set, and this user has no home folder (HOME) to keep tokenised text in; set it to "
            "a folder that you may write to"
        ) from error
