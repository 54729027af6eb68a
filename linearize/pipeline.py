"""A whole recipe as one resumable chain of folders, and one training stage with or without a launcher.

    OUT/0-converted [-> OUT/0-calibrated] [-> OUT/0-selected] -> OUT/1-<stage> -> OUT/2-<stage> ... -> OUT/merged
    -> OUT/results.json

A folder appears by one rename when it is complete and holds the recipe that made it; so a stage is finished when its
folder is there and the parts of the recipe it depends on are unchanged.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from linearize.checkpoint import atomic
from linearize.errors import InputError
from linearize.launch import launch
from linearize.recipe import load as recipes
from linearize.recipe.schema import Recipe

BEFORE = {"calibrate": "0-calibrated", "select": "0-selected"}
"""Blocks of a recipe that are a stage before training where they are there, in this order, and the stage's folder."""


def run(
    wanted: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    flags: Sequence[str] = (),
    note: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Convert, calibrate and select if the recipe says so, train, merge and evaluate.

    Args:
        wanted: the resolved recipe.
        out: folder for all stages.
        overwrite: redo stages that were made with another recipe, and the comparison; without it they are an error.
        flags: of ``accelerate launch``, for the training stages.
        note: called with one line per stage.

    Returns:
        The results, as in :mod:`linearize.results.schema`.

    Raises:
        InputError: bad input to a stage, or a stage was made with another recipe and `overwrite` is off.

    Example:
        >>> run(recipe.load("smollm2-135m"), "runs/demo")["summary"]["recovery"]["student"]
    """
    from linearize.checkpoint.sources import locate
    from linearize.conversion.convert import convert
    from linearize.conversion.plan import plan
    from linearize.evaluation.evaluate import evaluate
    from linearize.recovery.calibrate import calibrate
    from linearize.recovery.merge import merge
    from linearize.recovery.select import select

    out = Path(out)
    converted, merged = out / "0-converted", out / "merged"
    before = {out / folder: block for block, folder in BEFORE.items() if getattr(wanted, block) is not None}
    trained = [out / f"{number}-{stage.name}" for number, stage in enumerate(wanted.train, 1)]
    # All of them before any work, so that a changed recipe is not found out after an hour of training.
    stages: dict[Path, str | int | None] = {converted: None, **before}
    stages |= {**{folder: number for number, folder in enumerate(trained, 1)}, merged: len(trained)}
    finished = {folder for folder, after in stages.items() if _finished(folder, wanted, after, overwrite)}
    for folder in stages:
        if folder in finished:
            note(f"{folder}: finished earlier, kept")

    if converted not in finished:
        located = locate(wanted.source.id, wanted.source.revision, package=wanted.source.package)
        note(plan(located, wanted).text())
        convert(located, wanted, converted, overwrite=overwrite)
    folder = converted
    for after, block in before.items():
        if after not in finished:
            {"calibrate": calibrate, "select": select}[block](folder, wanted, after, overwrite=overwrite)
        folder = after
    for stage, after in zip(wanted.train, trained, strict=True):
        if after not in finished:
            train_stage(folder, wanted, stage.name, after, resume=True, overwrite=overwrite, flags=flags)
        folder = after
    if (folder / "adapter_config.json").is_file():
        if merged not in finished:
            merge(folder, merged, overwrite=overwrite)
        folder = merged
    return evaluate(
        folder, suite=wanted.eval.suite, out=out / "results.json", resume=folder in finished and not overwrite
    )


def train_stage(
    folder: Path,
    wanted: Recipe,
    stage: str | None,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    flags: Sequence[str] = (),
) -> Path:
    """Run one training stage: in this process, or under ``accelerate launch`` when it gets flags.

    One process needs no launcher; without one, errors stay one paragraph and nothing depends on the machine's default
    accelerate configuration. Whoever wants several processes says so by flags.

    Raises:
        InputError: bad input, or the launched processes failed (they have said why).
    """
    name = wanted.stage(stage).name
    if not flags:
        from linearize.recovery.train import train

        return train(folder, wanted, name, out, resume=resume, overwrite=overwrite)
    atomic.check_output(out, overwrite)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "recipe.yaml"
        file.write_text(recipes.to_yaml(wanted), encoding="utf-8")
        arguments = ["--model", str(folder), "--recipe", str(file), "--stage", name, "--out", str(out)]
        arguments += ["--resume"] * resume + ["--overwrite"] * overwrite
        launch(
            "train", flags, "linearize.recovery.train", arguments, stdout=2
        )  # into stderr: stdout is kept for the result
    return out


def _finished(folder: Path, wanted: Recipe, after: str | int | None, overwrite: bool) -> bool:
    """Whether a folder is there, made by the same recipe as far as it depends on it.

    Raises:
        InputError: it was made with another recipe, and may not be replaced.
    """
    if not (folder / "recipe.yaml").is_file():
        return False
    made = recipes.load(folder / "recipe.yaml")
    different = sorted(_decides(made, after).items() ^ _decides(wanted, after).items())
    if different and not overwrite:
        keys = dict.fromkeys(key for key, _ in different)
        raise InputError(
            f"{folder}: was made with another recipe, which differs in {', '.join(keys)}; pass --overwrite to redo "
            "this stage and those after it, or choose another --out"
        )
    return not different


def _decides(made: Recipe, after: str | int | None) -> dict[str, str]:
    """The parts of a recipe that decide the folder after a stage: dotted keys and their values.

    The stage is None for the conversion, the name of a block of `BEFORE`, or how many training stages there were.
    """
    values = recipes.to_dict(made)
    parts = {"source": values["source"], "convert": values["convert"]}
    if after is not None:
        blocks = [*BEFORE]
        known = blocks[: blocks.index(after) + 1] if isinstance(after, str) else blocks
        parts |= {key: values[key] for key in ("data", *known)}
        parts["train"] = values["train"][:after] if isinstance(after, int) else []
    return dict(_leaves(parts))


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict | list):
        yield key, repr(value)
        return
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(item, f"{key}.{name}" if key else str(name))
