"""What allocate, calibrate and select share: their block of the recipe, a model with a little text, and small files."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from linearize.checkpoint import atomic, manifest
from linearize.checkpoint.companions import copy_companions
from linearize.checkpoint.describe import check_positions
from linearize.checkpoint.identity import HASHES
from linearize.checkpoint.manifest import MANIFEST, write_manifest
from linearize.checkpoint.open import is_adapter, needed, open_model, open_tokenizer, pick_device
from linearize.checkpoint.reading import read_json
from linearize.checkpoint.room import check_memory
from linearize.errors import InputError
from linearize.model.sizes import text_sizes
from linearize.recipe import load as recipes
from linearize.recipe.schema import Reading
from linearize.recovery.data import blocks
from linearize.recovery.documents import local_files

KEPT = ("source", HASHES, "training", "merged", "allocation", "calibration", "selection", "pruning")
"""Facts of a manifest that a folder made from another one keeps."""


def settle(wanted: recipes.Recipe, block: str, **given: Any) -> tuple[recipes.Recipe, Any]:
    """Settle one block of a recipe: values that are given (not None) go before those it has.

    Args:
        wanted: the recipe.
        block: ``allocate``, ``calibrate`` or ``select``.
        **given: values of the block.

    Returns:
        The recipe with this block in it, and the block.

    Raises:
        InputError: a value that the block does not allow.
    """
    values = recipes.to_dict(wanted)
    values[block] = {**(values[block] or {}), **{key: value for key, value in given.items() if value is not None}}
    settled = recipes.from_dict(values)
    return settled, getattr(settled, block)


def read(folder: Path, wanted: recipes.Recipe, settings: Reading) -> tuple[Any, Tensor]:
    """Open a converted model, on the accelerator if there is one, and text of the recipe's data for it.

    Args:
        folder: the model.
        wanted: the recipe that names the data.
        settings: how much text.

    Returns:
        The model, in evaluation mode, and int64 [tokens // seq_len, seq_len].

    Raises:
        InputError: the folder holds adapters or no linearized model, or the data cannot be read.
    """
    if is_adapter(folder):
        raise InputError(f"{folder}: these are adapters; fold them in first: linearize merge {folder} --out DIR")
    check_memory(8 * settings.tokens, f"tokens: {settings.tokens:,} of them in one piece", "read fewer")
    model: Any = open_model(folder).eval()
    check_positions(model, settings.seq_len, type(settings).__name__.lower())
    count, vocabulary = settings.tokens // settings.seq_len, text_sizes(model.config).vocabulary
    ids = blocks(wanted.data, open_tokenizer(folder), settings.seq_len, count, vocabulary=vocabulary)
    return model.to(pick_device()), ids[:]


def chosen(
    folder: Path, wanted: recipes.Recipe, out: str | Path | None, overwrite: bool, stage: tuple[str, str],
    given: dict[str, Any], choose: Callable[[Any, Tensor, Any], dict[str, Any]],
    write: Callable[[Any, dict[str, Any], Path], dict[str, str | None]],
) -> dict[str, Any]:  # fmt: skip
    """Choose something about a model by a little text, and write a folder with the choice made if one is asked for.

    Args:
        folder: the model.
        wanted: the recipe that names the text.
        out: folder to appear; None: nothing is written.
        overwrite: replace a model folder in the place of `out`.
        stage: its block of the recipe, and the name under which the manifest tells of it.
        given: values of the block.
        choose: (model, ids, block) -> the choice, JSON-safe.
        write: (model, choice, folder) -> hashes, as for `finish`, of the weights and config.json that it wrote there.

    Returns:
        The choice, with the values of the block.
    """
    if out is not None:
        atomic.check_output(Path(out), overwrite, [*needed(folder), *local_files(wanted.data)])
    wanted, settings = settle(wanted, stage[0], **given)
    with nullcontext() if out is None else atomic.held(out):
        model, ids = read(folder, wanted, settings)
        choice = {**asdict(settings), **choose(model, ids, settings)}
        if out is not None:
            with atomic.output_folder(out, overwrite) as work:
                hashes = write(model, choice, work)
                finish(folder, work, wanted, stage[1], choice, hashes)
    return choice


def finish(
    folder: Path,
    work: Path,
    wanted: recipes.Recipe,
    name: str,
    made: dict[str, Any],
    hashes: dict[str, str | None] | None = None,
) -> None:
    """Write the small files beside the weights: those of `folder`, the recipe, and a manifest.

    Args:
        folder: that was read.
        work: that is written; its weights and config.json are there.
        wanted: the recipe, from `settle`.
        name: under which the manifest tells of this stage.
        made: what it tells, JSON-safe.
        hashes: as for `write_manifest`.
    """
    copy_companions(folder, work)
    (work / "recipe.yaml").write_text(recipes.to_yaml(wanted))
    origin = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    facts = {key: value for key, value in origin.items() if key in KEPT}
    facts |= {name: {**made, "data": recipes.to_dict(wanted)["data"]}, "versions": manifest.versions()}
    write_manifest(work, {"source": None, **facts}, hashes or {})
