"""Where installed packages lie, found without importing anything: what a recipe names is looked up and never run."""

import importlib.util
from importlib.machinery import PathFinder
from pathlib import Path

from linearize.checkpoint.reading import reading
from linearize.errors import InputError


def folder_of(package: str) -> Path | None:
    """The folder of an installed package; None if there is no such package, or it is a single module.

    `find_spec` imports what stands before a dot; so each part is looked up in the folder of the one before.

    Raises:
        InputError: it is no name of a package.
    """
    first, *rest = package.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        raise InputError(f"source.package: {package!r} is no name of a package; give the name that is imported")
    with reading(package, "cannot be looked up", "install it again"):
        spec = importlib.util.find_spec(first)
        for i, _ in enumerate(rest, 1):
            inside = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(".".join([first, *rest[:i]]), inside) if inside else None
    inside = list(spec.submodule_search_locations or ()) if spec else []
    return next((Path(path) for path in inside if Path(path).is_dir()), None)
