"""What is published names things and never says where they lie: paths of this machine become their last parts.

Known keys of known files are edited, parsed as JSON or YAML. Nothing else is touched: a vocabulary may well hold what
looks like a path.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from linearize.checkpoint.manifest import MANIFEST
from linearize.checkpoint.reading import reading

PATHS = {
    "config.json": ("_name_or_path", "linearize.source.path"),
    "adapter_config.json": ("base_model_name_or_path",),
    "tokenizer_config.json": ("name_or_path",),
    "recipe.yaml": ("source.id", "data.*.path", "eval.suite"),
    MANIFEST: ("source.path", "training.model", "training.data.*.path", "calibration.data.*.path",
               "selection.data.*.path"),
    "results.json": ("model", "source", "settings.source.id", "settings.source.path", "other.model"),
}  # fmt: skip
"""File -> keys whose values may be paths, with dots between levels and a star for all entries of a list."""


def is_repo_id(name: str) -> bool:
    """Whether a name has the form ``organisation/name`` of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def without_path(name: str) -> str:
    """The last part of a path of this machine; the id of something on the Hub, or a plain name, as it is."""
    if is_repo_id(name) and not Path(name).exists():
        return name
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else name


def named(file: str, content: bytes) -> bytes:
    """A file's content with names in the place of paths; the same bytes where there is none.

    Args:
        file: its name in the folder.
        content: what stands in it.

    Returns:
        The content to publish.

    Raises:
        InputError: it is not valid JSON or YAML.
    """
    if file not in PATHS:
        return content
    is_yaml = file.endswith(".yaml")
    with reading(file, "cannot be read", "write the folder again"):
        before = after = yaml.safe_load(content) if is_yaml else json.loads(content)
    for path in PATHS[file]:
        after = _shortened(after, path.split("."))
    if after == before:
        return content
    text = yaml.safe_dump(after, sort_keys=False, allow_unicode=True) if is_yaml else json.dumps(after, indent=2) + "\n"
    return text.encode()


def _shortened(values: Any, keys: list[str]) -> Any:
    """The values, with a name in the place of each path that the keys lead to."""
    if not keys:
        return without_path(values) if isinstance(values, str) else values
    if keys[0] == "*" and isinstance(values, list):
        return [_shortened(each, keys[1:]) for each in values]
    if isinstance(values, dict) and keys[0] in values:
        return {**values, keys[0]: _shortened(values[keys[0]], keys[1:])}
    return values
