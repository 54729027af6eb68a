"""Folders and texts that appear whole or not at all, copies hashed on the way, the manifest that checks a folder later.

Standard library and a progress bar only: every stage that writes a folder goes through `output_folder`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from linearize.errors import InputError

MANIFEST = "linearize.json"
CHUNK = 32 << 20  # bytes moved at a time: large enough to keep a disk busy, small enough not to be noticed in memory
PIECE = 1 << 20  # bytes hashed at a time: what a core's own cache holds
# A folder without any of these was not written by this package or by transformers, and is never replaced.
_REPLACEABLE = ("config.json", "adapter_config.json", MANIFEST)


def format_bytes(count: float) -> str:
    """Write a number of bytes for people: ``1.50 GiB``; below 1 KiB ``512 bytes``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def check_output(out: Path, overwrite: bool = False) -> None:
    """Refuse an output folder that exists, unless it may be replaced.

    Args:
        out: the folder to be written. An empty folder counts as absent.
        overwrite: allow a model folder in its place to be replaced.

    Raises:
        InputError: `out` is a file, or a folder with content and `overwrite` is off, or a folder that holds no model.
    """
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
    try:
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{partial.parent}: cannot be written to ({error.strerror}); choose another folder") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have renamed the folder into place between our two calls.
            held = partial.exists() and os.path.samestat(os.fstat(handle), partial.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise InputError(
                f"{partial}: another process is writing this folder; wait for it, or choose another folder"
            )
        try:
            yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


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


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes on stderr while the block runs; nothing where stderr is no terminal.

    Args:
        description: what is being done.
        total: bytes.

    Yields:
        A function to call with the number of bytes done since the last call.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


def _ignore(count: int) -> None:
    pass


def _no_look(offset: int, content: memoryview) -> None:
    pass


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
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    return path


def sha256(
    path: Path, advance: Callable[[int], None] = _ignore, look: Callable[[int, memoryview], None] = _no_look
) -> str:
    """Hash a file.

    Args:
        path: the file.
        advance: called with the number of bytes read, as it goes.
        look: called with the offset and content of each piece; may raise.

    Returns:
        64 hexadecimal digits.
    """
    digest, buffer = hashlib.sha256(), bytearray(min(CHUNK, max(1, path.stat().st_size)))
    with path.open("rb", buffering=0) as file:
        offset = 0
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            look(offset, memoryview(buffer)[:count])
            offset += count
            advance(count)
    return digest.hexdigest()


def known_sha256(path: Path) -> str | None:
    """The hash that the Hub's cache states for a file: large files are stored there under their own hash. Else None."""
    blob = path.resolve()
    is_hash = len(blob.name) == 64 and set(blob.name) <= set("0123456789abcdef")
    return blob.name if blob.parent.name == "blobs" and is_hash else None


def copy(
    source: Path,
    target: Path,
    advance: Callable[[int], None] = _ignore,
    look: Callable[[int, memoryview], None] = _no_look,
) -> str:
    """Copy a file inside the kernel (a reflink where the file system has them) and hash it in the same pass.

    `target` appears by rename when it is complete. No more than a chunk of the file is ever in memory.

    Args:
        source: the file to copy.
        target: the new file; an existing one is replaced.
        advance: called with the number of bytes copied, as it goes.
        look: called with the offset and content of each piece, on another thread; what it raises ends the copy.

    Returns:
        The sha256 of the content, 64 hexadecimal digits.

    Raises:
        InputError: the source stands in the Hub's cache under another hash: its download is corrupt.
    """
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)

    def read(file: int, offset: int, count: int) -> memoryview:
        view, done = memoryview(buffer)[:count], 0
        while done < count:
            got = os.preadv(file, [view[done:]], offset + done)
            if not got:
                raise InputError(
                    f"{source}: the file became shorter while it was copied; leave the source alone meanwhile"
                )
            done += got
        return view

    def hash_range(file: int, offset: int, count: int) -> None:
        for start in range(offset, offset + count, PIECE):
            view = read(file, start, min(PIECE, offset + count - start))
            digest.update(view)
            look(start, view)

    writing = target.with_name(f"{target.name}.writing")
    with source.open("rb") as reader, writing.open("wb", buffering=0) as writer, ThreadPoolExecutor(1) as thread:
        offset, size, in_kernel, hashed = 0, os.fstat(reader.fileno()).st_size, hasattr(os, "copy_file_range"), Future()
        hashed.set_result(None)
        while offset < size:
            count = min(CHUNK, size - offset)
            if in_kernel:
                try:
                    count = os.copy_file_range(reader.fileno(), writer.fileno(), count, offset)
                except OSError as error:
                    # Across some file systems, or on kernels and network mounts without the call: copy through memory.
                    if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                        raise
                    in_kernel = False
            hashed.result()  # the buffer is free again; hashing never falls more than one chunk behind
            if not in_kernel:
                view = read(reader.fileno(), offset, count)
                while view:
                    view = view[writer.write(view) or 0 :]
            elif count == 0:
                raise InputError(
                    f"{source}: the file became shorter while it was copied; leave the source alone meanwhile"
                )
            hashed = thread.submit(hash_range, reader.fileno(), offset, count)
            offset += count
            advance(count)
        hashed.result()
    value = digest.hexdigest()
    if known_sha256(source) not in (None, value):
        raise InputError(
            f"{source}: its content does not have the hash under which the Hub stores it, so the download is corrupt; "
            "delete the file and download it again"
        )
    writing.replace(target)
    return value


def link(
    source: Path,
    target: Path,
    advance: Callable[[int], None] = _ignore,
    look: Callable[[int, memoryview], None] = _no_look,
) -> str | None:
    """Hard-link a file: no space, no time, and the same bytes under two names from then on; `look` sees nothing.

    Returns:
        The sha256 where it is known without reading the file (see `known_sha256`), else None.

    Raises:
        InputError: the two are on different file systems, or the file system has no hard links.
    """
    try:
        target.unlink(missing_ok=True)
        os.link(source.resolve(), target)
    except OSError as error:
        raise InputError(
            f"{source}: cannot be hard-linked to {target.parent} ({error.strerror}); leave out --link to copy it"
        ) from error
    advance(target.stat().st_size)
    return known_sha256(source)


def write_manifest(folder: Path, facts: dict[str, Any], hashes: dict[str, str | None]) -> None:
    """Record what stands in a folder, for `verify`.

    Args:
        folder: a complete folder; every file directly in it is recorded.
        facts: JSON-safe values to record beside the files (versions, source, recipe).
        hashes: file name -> sha256 where it is known already. None: record the size only. Other files are hashed here.
    """
    files = {}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in [folder / name for name in names if name != MANIFEST]:
        digest = hashes[path.name] if path.name in hashes else sha256(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, **facts, "files": files}, indent=2) + "\n")


def verify(folder: str | Path) -> list[str]:
    """Compare the files of a folder with its manifest.

    Args:
        folder: a folder with ``linearize.json``.

    Returns:
        One sentence per difference; empty when every recorded file is there, unchanged.

    Raises:
        InputError: the folder has no manifest, or an unreadable one.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        total = sum(entry["bytes"] for entry in files.values())
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: holds no {MANIFEST}, which every folder written by `linearize convert` has"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / MANIFEST}: is not a manifest of `linearize convert`; convert the source again"
        ) from error
    problems = []
    with progress("Checking", total) as advance:
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{name}: is missing")
            elif path.stat().st_size != entry["bytes"]:
                problems.append(f"{name}: has {path.stat().st_size} bytes, {entry['bytes']} were written")
            elif entry["sha256"] is not None and sha256(path, advance) != entry["sha256"]:
                problems.append(f"{name}: the content has changed since it was written (sha256 differs)")
    return problems
