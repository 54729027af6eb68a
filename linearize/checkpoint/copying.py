"""Files copied, linked and hashed, a piece at a time."""

import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from linearize.errors import InputError

CHUNK = 32 << 20  # bytes moved at a time: large enough to keep a disk busy, small enough not to be noticed in memory
PIECE = 1 << 20  # bytes hashed at a time: what a core's own cache holds


def _ignore(count: int) -> None:
    pass


def _no_look(offset: int, content: memoryview) -> None:
    pass


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
