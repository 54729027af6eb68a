"""Files copied, linked and hashed."""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from linearize.errors import InputError

CHUNK = 1 << 20  # bytes read at a time: what a core's own cache holds


def _ignore(count: int) -> None:
    pass


def sha256(path: Path, advance: Callable[[int], None] = _ignore) -> str:
    """Hash a file.

    Args:
        path: the file.
        advance: called with the number of bytes read, as it goes.

    Returns:
        64 hexadecimal digits.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


def known_sha256(path: Path) -> str | None:
    """The hash that the Hub's cache states for a file: large files are stored there under their own hash. Else None."""
    blob = path.resolve()
    is_hash = len(blob.name) == 64 and set(blob.name) <= set("0123456789abcdef")
    return blob.name if blob.parent.name == "blobs" and is_hash else None


def weight_files(folder: str | Path) -> list[Path]:
    """Configuration and weights of a local folder, or a local file; empty for a model on the Hub."""
    folder = Path(folder).expanduser()
    if folder.is_file():
        return [folder]
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]) if folder.is_dir() else []


def fingerprint(folder: str | Path, advance: Callable[[int], None] = _ignore) -> str:
    """One sha256 over the configuration and weights of a local folder or file; the name itself for a model on the Hub.

    Args:
        folder: folder, file or Hub id.
        advance: called with the number of bytes read since the last call.
    """
    paths = weight_files(folder)
    return digest_of(paths, advance) if paths else str(folder)


def digest_of(paths: list[Path], advance: Callable[[int], None] = _ignore) -> str:
    """One sha256 over the content of files; the arguments as for `fingerprint`."""
    return hashlib.sha256("".join(sha256(path, advance) for path in paths).encode()).hexdigest()


def copy(
    source: Path,
    target: Path,
    advance: Callable[[int], None] = _ignore,
    digest: Callable[[Path, Callable[[int], None]], str] = sha256,
) -> str:
    """Copy a file inside the kernel, and hash it meanwhile from what the system has just read.

    `target` appears by rename when it is complete. No more than a chunk of the file is ever in memory.

    Args:
        source: the file to copy.
        target: the new file; an existing one is replaced.
        advance: called with the number of bytes hashed, as it goes.
        digest: hashes `source`, with `advance`, and may look at it on the way; what it raises ends the copy.

    Returns:
        The sha256 of the content, 64 hexadecimal digits.

    Raises:
        InputError: the source changed meanwhile, or stands in the Hub's cache under another hash: its download is
            corrupt.
    """
    writing = target.with_name(f"{target.name}.writing")
    before = source.stat()
    with ThreadPoolExecutor(1) as thread:
        copied = thread.submit(shutil.copyfile, source, writing)
        value = digest(source, advance)
        copied.result()
    after = source.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{source}: the file changed while it was copied; leave the source alone meanwhile")
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
    digest: Callable[[Path, Callable[[int], None]], str] = sha256,
) -> str | None:
    """Hard-link a file: no space, no time, and the same bytes under two names from then on.

    The arguments are those of `copy`; `digest` is not called.

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
