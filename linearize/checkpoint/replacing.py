"""What may stand in the place of an output, so that nothing is lost that it is made from, or that is another's."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from linearize.checkpoint.manifest import MANIFEST
from linearize.errors import InputError

LARGEST = 2**28
"""Bytes of a file that a verb writes."""
REPLACEABLE = ("config.json", "adapter_config.json", MANIFEST)
"""A folder without any of these was not written by this package or by transformers, and is never replaced."""


def check_apart(out: Path, reads: Iterable[Path]) -> None:
    """Refuse an output folder that is, or holds, what it is made from, or lies in a model folder that it is made from.

    Args:
        out: the folder to be written.
        reads: files and folders that are read for it, or that what is written will need, under whatever name.

    Raises:
        InputError: names the one.
    """
    for read in reads:
        read = Path(os.path.abspath(read))
        inside = {read, read.resolve()}
        if out.exists() and any(_same(each, out) for path in inside for each in (path, *path.parents)):
            raise InputError(f"{out}: is the source, or holds it ({read}); choose another output folder")
        model = any(os.path.exists(read / name) for name in REPLACEABLE)
        if model and any(_same(each, read) for each in Path(os.path.realpath(out)).parents):
            raise InputError(f"{out}: lies in {read}, which is read for it; choose an output folder beside that one")


def _same(one: Path, other: Path) -> bool:
    return os.path.exists(one) and one.samefile(other)


def check_file_output(path: Path, kind: str, ours: Callable[[bytes], bool]) -> None:
    """Refuse to replace a file by something of another kind, before any work: it may be a model's, or a text.

    Args:
        path: file to be written; an empty one counts as absent.
        kind: what is written, for the message.
        ours: whether the content of a file is of this kind.

    Raises:
        InputError: the path is a folder, a device, or a file of another kind.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file in it, to write {kind} into")
    if not path.exists():
        return
    try:
        size = path.stat().st_size
        known = path.is_file() and size <= LARGEST and (size == 0 or ours(path.read_bytes()))
    except OSError as error:
        raise InputError(f"{path}: is there and cannot be read ({error.strerror}); choose another file") from error
    if not known:
        raise InputError(
            f"{path}: is there, and is not {kind}, so it is not replaced; choose another file, or remove this one "
            "yourself"
        )
