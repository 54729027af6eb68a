"""A whole recipe as one resumable chain of folders, and one training stage with or without a launcher.

    OUT/0-converted [-> OUT/0-allocated] [-> OUT/0-calibrated] [-> OUT/0-selected] -> OUT/1-<stage> -> OUT/2-<stage>
    ... -> OUT/merged -> OUT/results.json

A folder appears by one rename when it is complete and holds the recipe that made it; so a stage is finished when its
folder is there and the parts of the recipe it depends on are unchanged.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint import atomic
from linearize.checkpoint.manifest import MANIFEST
from linearize.checkpoint.reading import read_json
from linearize.errors import InputError
from linearize.launch import check_flags, launch
from linearize.recipe import load as recipes
from linearize.recipe.schema import Recipe

if TYPE_CHECKING:
    from linearize.recovery.budget import Budget

BEFORE = {"allocate": "0-allocated", "calibrate": "0-calibrated", "select": "0-selected"}
"""Blocks of a recipe that are a stage before training where they are there, in this order, and the stage's folder."""


def run(
    wanted: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    flags: Sequence[str] = (),
    note: Callable[[str], None] = print,
    reads: Sequence[Path] = (),
) -> dict[str, Any]:
    """Convert, allocate, calibrate and select if the recipe says so, train, merge and evaluate.

    Args:
        wanted: the resolved recipe.
        out: folder for all stages.
        overwrite: redo stages that were made with another recipe, and the comparison; without it they are an error.
        flags: of ``accelerate launch``, for the training stages.
        note: called with one line per stage.
        reads: the file of the recipe, if it is one: no stage may replace it.

    Returns:
        The results, as in :mod:`linearize.results.schema`.

    Raises:
        InputError: bad input to a stage, or a stage was made with another recipe and `overwrite` is off.

    Example:
        >>> run(recipe.load("smollm2-135m"), "runs/demo")["summary"]["recovery"]["student"]
    """
    from linearize.evaluation.evaluate import evaluate
    from linearize.evaluation.run import check_target

    check_flags("run", flags)
    check_target(Path(out) / "results.json")
    with atomic.held(Path(out)):
        folder, resume = _folder(wanted, Path(out), overwrite, flags, note, reads)
        results = Path(out) / "results.json"
        return evaluate(folder, suite=wanted.eval.suite, out=results, resume=resume)


def _folder(
    wanted: Recipe, out: Path, overwrite: bool, flags: Sequence[str], note: Callable[[str], None],
    reads: Sequence[Path],
) -> tuple[Path, bool]:  # fmt: skip
    """Make all stages of a recipe, or keep them; returns the folder to evaluate, and whether it was there before."""
    from linearize.checkpoint.replacing import check_apart
    from linearize.recovery.documents import local_files
    from linearize.recovery.merge import merge

    stages, read = _stages(wanted, out), _inputs(wanted)
    # All of them before any work, so that a changed recipe is not found out after an hour of training.
    finished = {folder for folder, after in stages.items() if _finished(folder, wanted, after, read, overwrite)}
    if len(finished) < len(stages) and (wrong := problems(wanted, whole=True)):
        raise InputError("\n".join(wrong))
    reads = [*reads, Path(wanted.source.id).expanduser(), *local_files(wanted.data)]
    for folder in stages:
        if folder not in finished:
            check_apart(folder, reads)
        else:
            note(f"{folder}: finished earlier, kept")
    *before, merged = stages
    folder = out
    for target in before:
        if target not in finished:
            _make(stages[target], wanted, folder, target, overwrite, flags, note)
            _record(target, stages[target], read)
        folder = target
    if (folder / "adapter_config.json").is_file():
        if merged not in finished:
            merge(folder, merged, overwrite=overwrite)
            _record(merged, stages[merged], read)
        folder = merged
    return folder, folder in finished and not overwrite


def _inputs(wanted: Recipe) -> dict[str, Any]:
    """What changes when the local files do that a recipe reads; null where there are none, or not any more."""
    from linearize.checkpoint.identity import identity
    from linearize.recovery.data import contents

    source = identity(wanted.source.id)
    return {"source": source.pop("weights"), **source, "data": contents(wanted.data)}


def _record(folder: Path, after: str | int | None, read: dict[str, Any]) -> None:
    """Keep in the manifest of a stage what the files were that it was made from."""
    read = {name: value for name, value in read.items() if name != "data" or after is not None}
    facts = read_json(folder / MANIFEST) | {"inputs": read}
    atomic.write_text(folder / MANIFEST, json.dumps(facts, indent=2) + "\n")


def problems(wanted: Recipe, whole: bool = False) -> list[str]:
    """What the stages of a recipe would refuse, as far as it can be known before any work.

    Args:
        wanted: the resolved recipe.
        whole: look at everything: the source on the Hub, data sets, tasks of lm-eval. Without, only at what lies here.

    Returns:
        One line per problem.
    """
    from linearize.checkpoint.describe import check_positions, text_sizes
    from linearize.checkpoint.sources import locate
    from linearize.conversion.plan import build
    from linearize.evaluation import suite as suites
    from linearize.evaluation import tasks, work
    from linearize.recovery import documents, teacher

    lines: list[str] = []

    def attempt(check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except InputError as error:
            lines.append(str(error))

    name, source, model = wanted.eval.suite, wanted.source, None
    if whole or Path(source.id).expanduser().exists():
        model = attempt(lambda: build(locate(source.id, source.revision, package=source.package), wanted))
    if model is not None:
        blocks = {block: getattr(wanted, block) for block in BEFORE}
        blocks |= {f"train.{stage.name}": stage for stage in wanted.train}
        for where, block in blocks.items():
            if block is not None:
                attempt(check_positions, model, block.seq_len, where)
        for stage in wanted.train:
            attempt(teacher.check_top_k, stage, model.config)
    suite = attempt(suites.load, name)
    if suite is not None and model is not None:
        context = text_sizes(model.config).context
        suite = work.fitted(suite, context)[0] if name in suites.names() else suite
        attempt(work.check, suite, context)
    for spec in suite.perplexity if suite is not None else ():
        attempt(suites.read_text, spec.text)
    if suite is not None and whole:
        attempt(tasks.check, suite.tasks)
    for part in wanted.data if wanted.train or any(getattr(wanted, block) for block in BEFORE) else ():
        attempt(documents.check, part, whole)
    return lines


def plan(
    model: str | Path, *,
    recipe: str | Path | None = None, gpu: str = "h100", gpus: int = 1, set: Iterable[str] = (),
) -> "Budget":  # fmt: skip
    """Tell what a recipe takes before anything runs: peak memory of a device, time and disk, stage by stage.

    Memory is found by running a training step without values, on a few of the layers: nothing is loaded.

    Args:
        model: recipe name, recipe file, Hub id, model folder or GGUF file; only its configuration is read.
        recipe: recipe to use with another `model`.
        gpu: h100, h200, a100, a100-40, l40s, l4, rtx4090, rtx3090, or cpu: this machine.
        gpus: how many; with several also what each holds where FSDP2 divides the weights.
        set: changes of the recipe.

    Returns:
        The stages with all numbers, `to_dict()` and `text()`.

    Raises:
        InputError: an unknown device, a batch that so many cannot share, or as `convert`.

    Example:
        >>> linearize.plan("smollm2-135m", gpu="l4").rows[1].peak < 24e9
        True
    """
    from linearize.checkpoint.sources import locate
    from linearize.conversion.plan import build
    from linearize.recovery.budget import budget

    wanted = recipes.with_flags(str(model), None if recipe is None else str(recipe), None, {}, set)
    located = locate(wanted.source.id, wanted.source.revision, package=wanted.source.package)
    return budget(lambda: build(located, wanted), wanted, gpu, gpus, located.id)


def _stages(wanted: Recipe, out: Path) -> dict[Path, str | int | None]:
    """The folders of a recipe in their order, the merged one last, and after which stage each stands.

    The stage is None for the conversion, the name of a block of `BEFORE`, or how many training stages there were.
    """
    stages: dict[Path, str | int | None] = {out / "0-converted": None}
    stages |= {out / folder: block for block, folder in BEFORE.items() if getattr(wanted, block) is not None}
    stages |= {out / f"{number}-{stage.name}": number for number, stage in enumerate(wanted.train, 1)}
    return stages | {out / "merged": len(wanted.train)}


def _make(
    after: str | int | None, wanted: Recipe, folder: Path, target: Path, overwrite: bool, flags: Sequence[str],
    note: Callable[[str], None],
) -> None:  # fmt: skip
    """Make the folder `target` of one stage, see `_stages`, from the folder of the stage before."""
    if isinstance(after, int):
        train_stage(folder, wanted, wanted.train[after - 1].name, target, resume=True, overwrite=overwrite, flags=flags)
        return
    if after is None:
        from linearize.checkpoint.sources import locate
        from linearize.conversion.convert import convert
        from linearize.conversion.plan import plan

        located = locate(wanted.source.id, wanted.source.revision, package=wanted.source.package)
        note(plan(located, wanted).text())
        convert(located, wanted, target, overwrite=overwrite)
        return
    from linearize.recovery.allocate import allocate
    from linearize.recovery.calibrate import calibrate
    from linearize.recovery.select import select

    {"allocate": allocate, "calibrate": calibrate, "select": select}[after](folder, wanted, target, overwrite=overwrite)


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

    Args:
        folder: the model to train.
        wanted: the resolved recipe.
        stage: name of its stage; None: the first.
        out: folder to appear.
        resume: go on from the last checkpoint of an interrupted run.
        overwrite: replace `out`, or an interrupted run with other settings.
        flags: of ``accelerate launch``.

    Returns:
        `out`.

    Raises:
        InputError: bad input, or the launched processes failed (they have said why).
    """
    name = wanted.stage(stage).name
    if not flags:
        from linearize.recovery.train import train

        return train(folder, wanted, name, out, resume=resume, overwrite=overwrite)
    from linearize.checkpoint.open import needed
    from linearize.recovery.documents import local_files

    atomic.check_output(out, overwrite, [*needed(folder), *local_files(wanted.data)])
    file = atomic.working_folder(out) / f"recipe-{os.getpid()}.yaml"  # another process may be about to begin, too
    atomic.write_text(file, recipes.to_yaml(wanted))
    arguments = [str(folder), "--out", str(out), "--recipe", str(file), "--stage", name]
    arguments += ["--resume"] * resume + ["--overwrite"] * overwrite
    try:
        launch("train", flags, "linearize.cli", ["train", *arguments], stdout=subprocess.DEVNULL)
    finally:
        with suppress(OSError):  # the folder stays where it holds checkpoints
            file.unlink()
            file.parent.rmdir()
    return out


def _finished(folder: Path, wanted: Recipe, after: str | int | None, read: dict[str, Any], overwrite: bool) -> bool:
    """Whether a folder is there, made by the same recipe, from files as they are now, as far as it depends on them.

    Raises:
        InputError: it was made with another recipe or from other files, and may not be replaced.
    """
    atomic.put_back(folder)
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
    facts = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    changed = [name for name, before in facts.get("inputs", {}).items() if _changed(before, read.get(name))]
    if changed and not overwrite:
        raise InputError(
            f"{folder}: was made from other files: the content of {' and '.join(changed)} has changed since; pass "
            "--overwrite to redo this stage and those after it, or choose another --out"
        )
    return not different and not changed


def _changed(before: Any, now: Any) -> bool:
    """Whether hashes differ, or some in lists of the same length; None means that one is not known."""
    if isinstance(before, list) and isinstance(now, list):
        return any(map(_changed, before, now))
    return None not in (before, now) and before != now


def _decides(made: Recipe, after: str | int | None) -> dict[str, str]:
    """The parts of a recipe that decide the folder after a stage, see `_stages`: dotted keys and their values."""
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
