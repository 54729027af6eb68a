"""The manifest of a folder: what was written, from what, with which versions; and the check of its files."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from linearize.checkpoint.copying import sha256
from linearize.checkpoint.reading import read_json, reading
from linearize.errors import InputError
from linearize.progress import byte_progress
from linearize.version import __version__

MANIFEST = "linearize.json"


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


def facts_of(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder records; nothing where it has none.

    Raises:
        InputError: it cannot be read.
    """
    return read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}


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
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: holds no {MANIFEST}, which every folder written by `linearize convert` has")
    advice, problem = "convert the source again", "is not a manifest of `linearize convert`"
    with reading(folder / MANIFEST, problem, advice):
        files = read_json(folder / MANIFEST, advice, problem)["files"]
        strange = [name for name in files if Path(name).name != name]
        if strange:
            raise ValueError(f"{strange[0]!r} is not the name of a file in the folder")
        total = sum(entry["bytes"] for entry in files.values())
        _ = [entry["sha256"] for entry in files.values()]
    problems = []
    with byte_progress("Checking", total) as advance:
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{name}: is missing")
            elif path.stat().st_size != entry["bytes"]:
                problems.append(f"{name}: has {path.stat().st_size} bytes, {entry['bytes']} were written")
            elif entry["sha256"] is not None and sha256(path, advance) != entry["sha256"]:
                problems.append(f"{name}: the content has changed since it was written (sha256 differs)")
    return problems


def versions() -> dict[str, str]:
    """What a result may depend on, for manifests: package -> version."""
    others = {name: version(name) for name in ("transformers", "peft")}
    return {"linearize": __version__, "torch": str(torch.__version__), **others}
