"""What belongs to a folder: its files, and what a Hub cache links into it.

A link that leads elsewhere would let whoever made the folder have any file of this machine copied and published.
"""

from pathlib import Path

from linearize.errors import InputError

TEMPLATES = "additional_chat_templates"
"""The one subfolder that a tokenizer reads."""


def own(folder: Path, path: Path) -> Path:
    """A path in a folder, unless it leads out of the folder.

    Args:
        folder: may be a link itself.
        path: in it.

    Returns:
        `path`.

    Raises:
        InputError: it is a link to something that is neither in the folder nor in a cache of the Hub.
    """
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()) and not _in_hub_cache(target):
        raise InputError(
            f"{path}: is a link that leaves the folder, to {target}; only links inside the folder and into a cache of "
            "the Hub are followed; put the file itself in its place, or remove the link"
        )
    return path


def check(folder: Path) -> None:
    """Refuse a folder with links that leave it, among the files that a model folder is read for.

    Raises:
        InputError: see `own`.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() and path.is_file() and not path.name.startswith("."):
            own(folder, path)
    for path in [folder / TEMPLATES, *(folder / TEMPLATES).rglob("*")]:
        own(folder, path)


def hub_id(folder: Path) -> str | None:
    """The Hub id of a snapshot in a cache of the Hub, ``models--ORG--NAME/snapshots/COMMIT``; else None."""
    path = folder.resolve()
    repo = path.parent.parent.name
    return repo[8:].replace("--", "/", 1) if path.parent.name == "snapshots" and repo.startswith("models--") else None


def _in_hub_cache(path: Path) -> bool:
    return any(each.name == "blobs" and each.parent.name.startswith("models--") for each in path.parents)
