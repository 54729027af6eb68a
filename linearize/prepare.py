"""What the stages between conversion and training share: their block of the recipe, a converted folder with a little
text to read, and what they leave beside the weights."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import AutoTokenizer

from linearize import adapters, recipe
from linearize.data import blocks
from linearize.errors import InputError
from linearize.files import MANIFEST, write_manifest
from linearize.schema import Reading


def settle(wanted: recipe.Recipe, block: str, **given: Any) -> tuple[recipe.Recipe, Any]:
    """The recipe with this block in it, and the block: values that are given (not None) go before those it has.

    Raises:
        InputError: a value that the block does not allow.
    """
    values = recipe.to_dict(wanted)
    values[block] = {**(values[block] or {}), **{key: value for key, value in given.items() if value is not None}}
    settled = recipe.from_dict(values)
    return settled, getattr(settled, block)


def read(folder: Path, wanted: recipe.Recipe, settings: Reading) -> tuple[Any, Tensor]:
    """A converted model, on the GPU if there is one, and text of the recipe's data for it.

    Returns:
        The model, in evaluation mode, and int64 [tokens // seq_len, seq_len].

    Raises:
        InputError: the folder holds adapters or no linearized model, or the data cannot be read.
    """
    if adapters.is_adapter(folder):
        raise InputError(f"{folder}: these are adapters; fold them in first: linearize merge {folder} --out DIR")
    model: Any = adapters.open_model(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = blocks(wanted.data, tokenizer, settings.seq_len, settings.tokens // settings.seq_len)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), ids[:]


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr while the block runs; yields a function to call after each of `total` parts."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def finish(
    folder: Path,
    work: Path,
    wanted: recipe.Recipe,
    name: str,
    made: dict[str, Any],
    hashes: dict[str, str | None] | None = None,
) -> None:
    """Write what stands beside the weights: the small files of `folder`, the recipe, and a manifest.

    Args:
        folder: that was read.
        work: that is written; its weights and config.json are there.
        wanted: the recipe, from `settle`.
        name, made: what the manifest tells of this stage, JSON-safe, and under which name.
        hashes: as for `write_manifest`.
    """
    adapters.carry(folder, work)
    (work / "recipe.yaml").write_text(recipe.to_yaml(wanted))
    origin = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else {}
    facts = {key: value for key, value in origin.items() if key in ("source", "calibration", "selection")}
    facts |= {name: {**made, "data": recipe.to_dict(wanted)["data"]}, "versions": adapters.versions()}
    write_manifest(work, {"source": None, **facts}, hashes or {})
