"""Folders and texts that appear whole or not at all: every stage that writes a folder goes through `output_folder`.

What is written is flushed to the disk, then renamed, then its folder is flushed, so that a machine that stops leaves
the old or the new. ``LINEARIZE_NO_FSYNC=1`` leaves the flushing out, for tests.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from linearize.checkpoint.replacing import REPLACEABLE, check_apart
from linearize.errors import DISK_FULL, InputError, disk_error

_HALF = ".replacing"
_INSIDE = {".partial", ".replaced", _HALF, ".old", ".training", ".lock"}
"""What stands inside an output folder that can have no siblings, until it is complete."""
_held: set[Path] = set()
"""Outputs that this process holds by `held`."""


def check_output(out: Path, overwrite: bool = False, reads: Iterable[Path] = ()) -> None:
    """Refuse an output folder that exists, unless it may be replaced.

    Args:
        out: the folder to be written. An empty folder counts as absent.
        overwrite: allow a model folder in its place to be replaced.
        reads: as for `check_apart`.

    Raises:
        InputError: `out` is a file, not apart from `reads`, a folder with content and `overwrite` is off, or a folder
            that holds no model.
    """
    put_back(out)
    check_apart(out, reads)
    if out.is_dir():
        if not _content(out):
            return
        if not overwrite:
            raise InputError(
                f"{out}: the output folder exists and is not empty; pass --overwrite to replace it when the new one is "
                "complete, or choose another folder"
            )
        if not any((out / name).exists() for name in REPLACEABLE):
            raise InputError(
                f"{out}: --overwrite replaces model folders only, and this one holds none of "
                f"{', '.join(REPLACEABLE)}; choose another folder, or remove this one yourself"
            )
    elif out.exists() or out.is_symlink():
        raise InputError(f"{out}: the output is a file or a broken link; it must be a folder that does not exist yet")


@contextlib.contextmanager
def output_folder(out: str | Path, overwrite: bool = False, key: str | None = None, keep: str = "*") -> Iterator[Path]:
    """Write a folder so that it appears, complete, by one rename at the end of the block.

    The block writes into a hidden sibling, ``.<name>.partial``. When the block raises, the sibling is removed; when the
    process is killed, it stays until the next call for the same folder, which clears it or, with the same `key`, takes
    over its finished files. Behind a link, all of this happens beside the link's target. A mount point, and a folder
    whose parent may not be written, hold the sibling themselves; their files appear one by one, or not at all.

    Args:
        out: the folder to appear.
        overwrite: replace a model folder in its place; it stays until the new one is complete.
        key: names what is being written; None never takes over the files of a killed run.
        keep: pattern of the files that a killed run with the same key leaves complete or not at all; only they stay.

    Yields:
        The folder to write into.

    Raises:
        InputError: see `check_output`; or the folder cannot be made, another process is writing it, or the disk is
            full.
    """
    out = Path(os.path.realpath(out))
    partial = _beside(out, "partial")
    with contextlib.nullcontext() if out in _held else locked(out), explained(out, "nothing was left behind"):
        try:
            _put_back(out)
            check_output(out, overwrite)
            partial.mkdir(exist_ok=True)
            _claim(partial, key, keep)
            yield partial
            check_output(out, overwrite)
            note = _key_file(partial)
            for file in partial.rglob("*"):
                if file != note:
                    sync(file)
            note.unlink()  # what a kill leaves up to here is taken over
            sync(partial)
            _publish(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def held(out: str | Path) -> Iterator[None]:
    """Hold an output for this process from before the work begins; `output_folder` within goes on under the same lock.

    Args:
        out: a folder or file to be written.

    Raises:
        InputError: another process holds it, or nothing can be written there.
    """
    out = Path(os.path.realpath(out))
    with locked(out):
        _held.add(out)
        try:
            yield
        finally:
            _held.discard(out)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock file of an output, in which stands who holds it; the system lets go of it when the process dies.

    Raises:
        InputError: another process holds it, or it cannot be made.
    """
    file, owner = _beside(out, "lock"), "it did not say which"
    made = _make_parents(file, out)
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
        with contextlib.suppress(OSError):  # a full disk has room for the name only
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    except OSError as error:
        if lock.is_locked:
            raise
        if not isinstance(error, Timeout):
            reason = f"cannot be written to ({error.strerror}); choose another folder"
            raise InputError(f"{file.parent}: {reason}") from error
        with contextlib.suppress(OSError):
            owner = file.read_text() or owner
        raise InputError(
            f"{out}: another process is writing here ({owner}); wait for it or end it, or choose another output"
        ) from error
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # on Windows an open file stays
                file.unlink()  # while it is held: filelock notices when it gets a file that is gone
            lock.release()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def working_folder(out: str | Path) -> Path:
    """Where an unfinished training run with an output stands: ``OUT.training``, on the disk that OUT is on."""
    return _beside(Path(os.path.realpath(out)), "training")


def put_back(out: Path) -> None:
    """Put a folder back that a kill in the middle of a swap left aside, unless somebody is writing it.

    Raises:
        InputError: there is nothing else under this name, and what stands aside is no model folder.
    """
    out = Path(os.path.realpath(out))
    if out in _held:
        return
    try:
        if _aside(out) is not None:
            with contextlib.suppress(InputError), locked(out):
                _put_back(out)
    except InputError:
        if not out.exists():
            raise


def _aside(out: Path) -> Path | None:
    """What a kill left aside of an output; None where there is nothing.

    Raises:
        InputError: it is not what this package leaves there.
    """
    replaced = _beside(out, "replaced")
    if not os.path.lexists(replaced):
        return replaced.with_name(_HALF) if replaced.parent == out and (out / _HALF).is_dir() else None
    empty = replaced == out / ".replaced" and (out / ".partial").is_dir()  # an empty mount point was being filled
    if replaced.is_symlink() or not (empty or any((replaced / name).is_file() for name in REPLACEABLE)):
        raise InputError(
            f"{replaced}: stands where this package keeps a model folder while {out.name} is replaced, and is none "
            f"(a folder with one of {', '.join(REPLACEABLE)}); move it elsewhere, or remove it"
        )
    return replaced


def _put_back(out: Path) -> None:
    replaced = _aside(out)
    if replaced is not None and replaced.parent != out:
        shutil.rmtree(replaced) if out.exists() else replaced.rename(out)
    elif replaced is not None:
        if replaced.name != _HALF:
            for entry in _content(out):
                _remove(entry)
            replaced = replaced.rename(out / _HALF)
        for entry in replaced.iterdir():
            entry.rename(out / entry.name)
        replaced.rmdir()
    if _beside(out, "replaced").parent == out:
        shutil.rmtree(out / ".old", ignore_errors=True)


def _beside(out: Path, what: str) -> Path:
    """The sibling of an output for one use; within the output where it can have none."""
    if out.is_dir() and (os.path.ismount(out) or not os.access(out.parent, os.W_OK)):
        return out / f".{what}"
    return out.with_name(f"{out.name}.{what}" if what == "training" else f".{out.name}.{what}")


def _content(out: Path) -> list[Path]:
    return [entry for entry in out.iterdir() if entry.name not in _INSIDE]


def _publish(partial: Path, out: Path) -> None:
    """Let a complete folder appear as `out`; a folder that is there stays whole until then."""
    replaced = _beside(out, "replaced")
    if partial.parent == out:
        (half := out / _HALF).mkdir()
        for entry in _content(out):
            entry.rename(half / entry.name)
        half.rename(replaced)  # from here on what is beside it is new
        for entry in partial.iterdir():
            entry.rename(out / entry.name)
        sync(out)
        replaced.rename(old := out / ".old")  # from here on it is the new one
        shutil.rmtree(old, ignore_errors=True)
    elif not out.exists() or not _exchange(partial, out):
        if there := out.exists():
            out.rename(replaced)
        partial.rename(out)
        if there:
            replaced.rename(partial)  # where it counts as unfinished
    sync(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextlib.contextmanager
def explained(out: Path, left: str) -> Iterator[None]:
    """Turn what the file system says while a folder is written into one paragraph.

    Args:
        out: the folder.
        left: what is there after it.

    Raises:
        InputError: the paragraph, whichever library the error came through.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = disk_error(error)
        if said is None:
            raise
        full = any(text in said for text in DISK_FULL)
        what = "the disk became full while the folder was written" if full else "the folder could not be written"
        raise InputError(
            f"{out}: {what} ({said}), and {left}; free some space or choose a folder on another disk"
        ) from error


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if os.environ.get("LINEARIZE_NO_FSYNC") == "1" or path.is_symlink():
        return
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # not every system syncs folders
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _make_parents(file: Path, out: Path) -> list[Path]:
    """Make the missing parents of a file for `out`; return them, innermost first."""
    try:
        missing = [parent for parent in file.parents if not parent.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{out}: the folder cannot be made ({error.strerror}); choose one that you may write to"
        ) from error
    return missing


def _key_file(partial: Path) -> Path:
    return partial / ".key"


def _claim(partial: Path, key: str | None, keep: str) -> None:
    """Keep what a killed run with the same key has finished in `partial`, clear anything else."""
    note = _key_file(partial)
    same = key is not None and note.is_file() and note.read_text() == key
    for entry in partial.iterdir():
        finished = not entry.name.startswith(".") and fnmatch(entry.name, keep)
        if not (same and (finished or entry == note)):
            _remove(entry)
    if not same:
        note.write_text(key or "")


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Any]:
    """A file to write into, of which other processes, or the next run after a crash, see all or nothing."""
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file.parent))
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    with locked(unfinished):
        try:
            with unfinished.open("wb") as out:
                yield out
            sync(unfinished)
            os.replace(unfinished, file)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()
    sync(file.parent)


def sweep(folder: Path) -> None:
    """Remove what killed runs left of `whole_file` in a folder, and nothing that is being written."""
    locks = [lock.with_name(lock.name.removeprefix(".").removesuffix(".lock")) for lock in folder.glob(".*.tmp.lock")]
    for unfinished in {*folder.glob("*.tmp"), *locks}:
        with contextlib.suppress(InputError, OSError), locked(unfinished):
            unfinished.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file that appears complete, in a folder that is made if needed; several processes may write the same.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another file or folder") from error
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a file of text, UTF-8, that appears complete, by one rename, in a folder that is made if needed.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    return path
