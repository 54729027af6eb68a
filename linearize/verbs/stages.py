"""The verbs of the stages without training: allocate, calibrate, select and prune."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.recipe.schema import Recipe

Name = str | Path
"""A folder, a file, a recipe or a Hub id."""


def calibrate(
    folder: Name, out: Name, *,
    recipe: Name | None = None, tokens: int | None = None, seq_len: int | None = None,
    set: Iterable[str] = (), overwrite: bool = False,
) -> Path:  # fmt: skip
    """Fit how much each head trusts its memory, in closed form, without training.

    Args:
        folder: a converted folder.
        out: folder to appear.
        recipe: name or file; None: `folder`/recipe.yaml.
        tokens: how much text to fit to; None: the recipe's.
        seq_len: tokens in a block; None: the recipe's.
        set: changes of the recipe.
        overwrite: replace a model folder in the place of `out`.

    Returns:
        `out`.

    Raises:
        InputError: no layer has a memory, the blocks are too short, or bad input.

    Example:
        >>> linearize.calibrate("runs/demo/0-converted", "runs/demo/calibrated")
    """
    from linearize.recovery.calibrate import calibrate as run

    wanted = recipe_of_folder(folder, recipe, set, out)
    return run(folder, wanted, out, tokens=tokens, seq_len=seq_len, overwrite=overwrite)


def allocate(
    folder: Name, out: Name | None = None, *,
    cache: str | int | None = None, plot: Name | None = None,
    recipe: Name | None = None, tokens: int | None = None, seq_len: int | None = None,
    set: Iterable[str] = (), overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Divide a budget of cache over the layers by what each gains, and compare it with equal shares.

    Args:
        folder: a converted folder, not calibrated yet.
        out: folder to appear; None: only measure.
        cache: bytes of cache of one row, "8MiB"; None: the recipe's, else as many as the folder has.
        plot: also draw it: FILE.png, .svg or .pdf.
        recipe: name or file; None: `folder`/recipe.yaml.
        tokens: how much text to measure on; None: the recipe's.
        seq_len: tokens in a block; None: the recipe's.
        set: changes of the recipe.
        overwrite: replace a model folder in the place of `out`.

    Returns:
        JSON-safe: the size of each layer, KL of both divisions, and what was predicted; see
        `linearize.recovery.allocate.choose`.

    Raises:
        InputError: a budget that cannot be divided, too little text, or bad input.

    Example:
        >>> linearize.allocate("runs/best/0-converted", tokens=1024, seq_len=256)["kl"]
    """
    from linearize.recovery.allocate import allocate as run
    from linearize.reporting.plot import check_target, draw_allocation

    if plot is not None:
        check_target(Path(plot))  # before the measurement, which takes minutes
    wanted = recipe_of_folder(folder, recipe, set, out)
    chosen = run(folder, wanted, out, cache=cache, tokens=tokens, seq_len=seq_len, overwrite=overwrite)
    if plot is not None:
        draw_allocation(chosen, Path(plot))
    return chosen


def prune(
    folder: Name, out: Name, *,
    sparsity: str = "0.5", recipe: Name | None = None, tokens: int | None = None, seq_len: int | None = None,
    set: Iterable[str] = (), overwrite: bool = False,
) -> Path:  # fmt: skip
    """Set the weights that matter least to zero, by Wanda: without training, after a look at a little text.

    Args:
        folder: a converted or merged folder.
        out: folder to appear; its manifest tells what the loss of other text was before and after.
        sparsity: share of the weights, such as "0.5", or "2:4".
        recipe: name or file; None: `folder`/recipe.yaml.
        tokens: how much text to read; None: the recipe's `calibrate`.
        seq_len: tokens in a block; None: the recipe's.
        set: changes of the recipe.
        overwrite: replace a model folder in the place of `out`.

    Returns:
        `out`.

    Raises:
        InputError: an impossible sparsity, or bad input.

    Example:
        >>> linearize.prune("runs/demo/merged", "runs/demo/pruned", sparsity="2:4")
    """
    from linearize.recovery.prune import prune as run

    wanted = recipe_of_folder(folder, recipe, set, out)
    return run(folder, wanted, out, sparsity=sparsity, tokens=tokens, seq_len=seq_len, overwrite=overwrite)[0]


def select(
    folder: Name, out: Name | None = None, *,
    keep: int | None = None, per: str | None = None, by: str | None = None, plot: Name | None = None,
    recipe: Name | None = None, tokens: int | None = None, seq_len: int | None = None,
    set: Iterable[str] = (), overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Choose which replaced layers, or heads, become softmax again, and price every budget in loss and cache.

    Args:
        folder: a converted folder, calibrated or not.
        out: folder to appear; None: only measure.
        keep: how many stay softmax; None: as the recipe says, else 4.
        per: layers, or key/value heads; None: the recipe's, else layers.
        by: uniform, sensitivity, greedy or recall; None: the recipe's, else sensitivity.
        plot: also draw it: FILE.png, .svg or .pdf.
        recipe: name or file; None: `folder`/recipe.yaml.
        tokens: how much text to measure on; None: the recipe's.
        seq_len: tokens in a block; None: the recipe's.
        set: changes of the recipe.
        overwrite: replace a model folder in the place of `out`.

    Returns:
        JSON-safe: the choice, each part alone, and every budget; see `linearize.recovery.select.choose`.

    Raises:
        InputError: `keep` out of range, blocks too short, or bad input.

    Example:
        >>> linearize.select("runs/demo/0-converted", keep=4, by="recall")["layers"]
    """
    from linearize.recovery.select import select as run
    from linearize.reporting.plot import check_target, draw_selection

    if plot is not None:
        check_target(Path(plot))  # before the measurement, which takes minutes
    wanted = recipe_of_folder(folder, recipe, set, out)
    chosen = run(folder, wanted, out, keep=keep, by=by, per=per, tokens=tokens, seq_len=seq_len, overwrite=overwrite)
    if plot is not None:
        draw_selection(chosen, Path(plot))
    return chosen


def recipe_of_folder(folder: Name, recipe: Name | None, overrides: Iterable[str], out: Name | None) -> "Recipe":
    """The recipe for a stage of a folder: its own or a named one, whose file `out` may not replace."""
    from linearize.checkpoint.atomic import working_folder
    from linearize.checkpoint.replacing import check_apart
    from linearize.recipe.load import recipe_of

    if out is not None:  # a launched process is given the recipe in the working folder
        check_apart(Path(out), [file for file in files_of(recipe) if file.parent != working_folder(out)])
    return recipe_of(Path(folder), None if recipe is None else str(recipe), list(overrides))


def files_of(*names: Name | None) -> list[Path]:
    """Those of the names that are files: of a recipe, which nothing that is made by it may replace."""
    return [Path(name) for name in names if name is not None and os.path.isfile(name)]
