"""What belongs to a folder: its files, and what a Hub cache links into it.

A link that leads elsewhere would let whoever made the folder have any file of this machine copied and published.
"""

import stat
from pathlib import Path

from linearize.errors import InputError

TEMPLATES = "additional_chat_templates"
"""The one subfolder that a tokenizer reads."""


def own(folder: Path, path: Path) -> Path:
    """A path in a folder, unless it leads out of the folder, or to what would make its reader wait for ever.

    Args:
        folder: may be a link itself.
        path: in it.

    Returns:
        `path`.

    Raises:
        InputError: it is a link to something that is neither in the folder nor among the files that the cache of the
            Hub keeps for this model, or a pipe, socket or device.
    """
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()) and not _in_hub_cache(folder.resolve(), target):
        raise InputError(
            f"{path}: is a link that leaves the folder, to {target}; only links inside the folder are followed, and in "
            "a cache of the Hub those to the model's own blobs; put the file itself in its place, or remove the link"
        )
    if special(target):
        raise InputError(f"{path}: is not a regular file but a pipe, socket or device; put a file in its place")
    return path


def special(path: Path) -> bool:
    """Whether a path is there, and neither a file nor a folder."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check(folder: Path) -> None:
    """Refuse a folder with links that leave it, or pipes, among the files that a model folder is read for.

    Raises:
        InputError: see `own`.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if (path.is_symlink() and path.is_file() or special(path)) and not path.name.startswith("."):
            own(folder, path)
    for path in [folder / TEMPLATES, *(folder / TEMPLATES).rglob("*")]:
        own(folder, path)


def hub_id(folder: Path) -> str | None:
    """The Hub id of a snapshot in a cache of the Hub, ``models--ORG--NAME/snapshots/COMMIT``; else None."""
    path = folder.resolve()
    repo = path.parent.parent.name
    return repo[8:].replace("--", "/", 1) if path.parent.name == "snapshots" and repo.startswith("models--") else None


def _in_hub_cache(folder: Path, target: Path) -> bool:
    """Whether a target is a blob of the model whose snapshot the folder is, or is in."""
    snapshots = next((each for each in folder.parents if hub_id(each / "revision")), None)
    return snapshots is not None and target.is_relative_to((snapshots.parent / "blobs").resolve())
