"""The recipes that ship with the package, by the name a user types.

A file is one recipe, named by its stem, or a template of many: its ``models`` give each a name and its source, its
``variants`` what another device needs changed, under a suffix of the name (``llama-3.1-8b-24gb``). The template's own
name stands for its first model: ``--recipe 8b`` is for another model of the size.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from linearize.errors import InputError, suggest
from linearize.recipe.resources import package_folder


class Shipped(NamedTuple):
    """A recipe: its file, what is set over it (dotted keys), and whether it is listed."""

    path: Path
    changes: dict[str, Any]
    listed: bool


@cache
def shipped() -> dict[str, Shipped]:
    """Name -> recipe, in order; a variant stands behind what it is one of."""
    found: dict[str, Shipped] = {}
    for path in sorted(package_folder("recipes").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        found[path.stem] = Shipped(path, {}, "models" not in content)
        for name, source in content.get("models", {}).items():
            found[name] = Shipped(path, {"source.id": source}, True)
            for variant, changes in content.get("variants", {}).items():
                found[f"{name}-{variant}"] = Shipped(path, {"source.id": source, **changes}, True)
    return dict(sorted(found.items()))


def names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return [name for name, recipe in shipped().items() if recipe.listed]


def find(name: str) -> Shipped:
    """A shipped recipe.

    Raises:
        InputError: none has this name.
    """
    if name not in shipped():
        raise InputError(f"unknown recipe {name!r}. {suggest(name, names())}. A file is named with its ending, .yaml")
    return shipped()[name]


def source_of(name: str) -> str:
    """Id of the source of a shipped recipe."""
    path, changes, _ = find(name)
    return changes.get("source.id") or plain(yaml.safe_load(path.read_text(encoding="utf-8")))["source"]["id"]


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a file without what makes it a template; its source is that of the first model."""
    models = values.get("models")
    if not isinstance(models, dict) or not models:
        return values
    rest = {key: value for key, value in values.items() if key not in ("models", "variants")}
    return {"source": {"id": next(iter(models.values()))}, **rest}
