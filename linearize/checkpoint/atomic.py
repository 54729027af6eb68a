"""Folders and texts that appear whole or not at all: every stage that writes a folder goes through `output_folder`."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from linearize.checkpoint.manifest import MANIFEST
from linearize.errors import InputError
from linearize.formats import format_bytes

# A folder without any of these was not written by this package or by transformers, and is never replaced.
_REPLACEABLE = ("config.json", "adapter_config.json", MANIFEST)


def check_output(out: Path, overwrite: bool = False, reads: Iterable[Path] = ()) -> None:
    """Refuse an output folder that exists, unless it may be replaced.

    Args:
        out: the folder to be written. An empty folder counts as absent.
        overwrite: allow a model folder in its place to be replaced.
        reads: folders that are read for it, or that what is written will need: `out` must be none and hold none of
            them, under whatever name.

    Raises:
        InputError: `out` is a file, one of `reads`, a folder with content and `overwrite` is off, or a folder that
            holds no model.
    """
    for folder in reads if out.exists() else ():
        inside = folder.resolve()
        if any(parent.exists() and parent.samefile(out) for parent in (inside, *inside.parents)):
            raise InputError(f"{out}: is the source, or holds it; choose another output folder")
    if out.is_dir():
        content = next(out.iterdir(), None)
        if content is None:
            return
        if not overwrite:
            raise InputError(
                f"{out}: the output folder exists and is not empty; pass --overwrite to replace it when the new one is "
                "complete, or choose another folder"
            )
        if not any((out / name).exists() for name in _REPLACEABLE):
            raise InputError(
                f"{out}: --overwrite replaces model folders only, and this one holds none of "
                f"{', '.join(_REPLACEABLE)}; choose another folder, or remove this one yourself"
            )
    elif out.exists() or out.is_symlink():
        raise InputError(f"{out}: the output is a file or a broken link; it must be a folder that does not exist yet")


def check_space(out: Path, needed: int) -> None:
    """Check that the file system of `out` has room.

    Args:
        out: the folder to be written; it need not exist.
        needed: bytes.

    Raises:
        InputError: there is less room than `needed`.
    """
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise InputError(
            f"{out}: the result needs {format_bytes(needed)} and the disk has {format_bytes(free)} free; free some "
            "space, choose a folder on another disk, or share unchanged weights with the source by --link"
        )


@contextlib.contextmanager
def output_folder(out: str | Path, overwrite: bool = False, key: str | None = None, keep: str = "*") -> Iterator[Path]:
    """Write a folder so that it appears, complete, by one rename at the end of the block.

    The block writes into a hidden sibling, ``.<name>.partial``. When the block raises, the sibling is removed; when the
    process is killed, it stays until the next call for the same folder, which clears it or, with the same `key`, takes
    over its finished files.

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
    out = Path(os.path.abspath(out))
    partial, replaced = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.replaced")
    made = _make_parents(out)
    try:
        with _locked(partial):
            # A kill between the two renames of the swap below: put the old folder back, or drop it if the new one is
            # in place.
            if replaced.exists():
                if out.exists():
                    shutil.rmtree(replaced)
                else:
                    replaced.rename(out)
            check_output(out, overwrite)
            _claim(partial, key, keep)
            yield partial
            _key_file(partial).unlink()
            check_output(out, overwrite)
            if out.exists():
                out.rename(replaced)
            partial.rename(out)
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if _disk_full(error):
            raise InputError(
                f"{out}: the disk became full while the folder was written ({_reason(error)}), and nothing was left "
                "behind; free some space or choose a folder on another disk"
            ) from error
        raise


def _existing_parent(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _make_parents(out: Path) -> list[Path]:
    """Make the missing parents of `out`; return them, innermost first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{out}: the folder cannot be made ({error.strerror}); choose one that you may write to"
        ) from error
    return missing


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make the folder `partial` and hold it for this process; remove it when the block raises."""
    lock = FileLock(partial.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{partial}: another process is writing this folder; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise InputError(f"{partial.parent}: cannot be written to ({error.strerror}); choose another folder") from error
    try:
        partial.mkdir(exist_ok=True)
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        with contextlib.suppress(OSError):  # on Windows an open file stays
            os.unlink(lock.lock_file)  # while it is held: filelock notices when it gets a file that is gone
        lock.release()


def _key_file(partial: Path) -> Path:
    return partial / ".key"


def _claim(partial: Path, key: str | None, keep: str) -> None:
    """Keep what a killed run with the same key has finished in `partial`, clear anything else."""
    note = _key_file(partial)
    same = key is not None and note.is_file() and note.read_text() == key
    for entry in partial.iterdir():
        if same and not entry.name.startswith(".") and fnmatch(entry.name, keep):
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    note.write_text(key or "")


def _reason(error: BaseException) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else os.strerror(errno.ENOSPC)


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        # safetensors raises an exception of its own, with the system's text in it.
        by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if by_number or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__
    return False


def write_text(path: Path, text: str) -> Path:
    """Write a file of text, UTF-8, that appears complete, by one rename, in a folder that is made if needed.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    return path
