"""An interrupted training run: its checkpoints, and whether it may go on with the settings of now."""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from linearize.checkpoint.adapters import same_names
from linearize.checkpoint.atomic import sync
from linearize.checkpoint.identity import identity
from linearize.checkpoint.manifest import MANIFEST
from linearize.checkpoint.open import bases
from linearize.checkpoint.reading import read_json, reading
from linearize.errors import InputError
from linearize.recipe.schema import Recipe
from linearize.recovery.data import contents

if TYPE_CHECKING:
    from linearize.recovery.loop import Loop

FREE = {"save_every", "micro_batch", "gradient_checkpointing"}
"""Settings of a stage that decide no result, so an interrupted run may go on with other ones."""
KEPT = 2  # checkpoints: the last one, and the one before in case the disk fails
TRAINED = "trained.safetensors"
SHARDED = "pytorch_model_fsdp_0"  # accelerate's name for the folder of weights that FSDP divides


def read_into(weights: Mapping[str, Tensor], file: Path) -> None:
    """Copy weights from a file into those of the same names and shapes, which must be all of both.

    Args:
        weights: of a model, by name.
        file: safetensors.

    Raises:
        InputError: names or shapes differ; then nothing is copied.
    """
    stored = load_file(file)
    given, expected = ([f"{name} {[*x.shape]}" for name, x in some.items()] for some in (stored, weights))
    same_names(file, given, expected, "pass --overwrite to start anew")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(stored[name])


class Checkpoints:
    """The checkpoints of a run, each of which is complete or not there; the last `KEPT` stay.

    Args:
        loop: whose model, optimiser, schedule and random numbers are kept.
        work: folder of the unfinished run.
    """

    def __init__(self, loop: "Loop", work: Path):
        self.loop, self.work = loop, work
        if not loop.divided:  # else accelerate writes and reads all weights, the frozen ones too
            loop.accelerator.register_save_state_pre_hook(self._save_trained)
            loop.accelerator.register_load_state_pre_hook(self._load_trained)

    def save(self, step: int) -> Path:
        """Write the checkpoint after a step, and forget the oldest."""
        accelerator = self.loop.accelerator
        checkpoint = self.work / "checkpoints" / f"step-{step:08d}"
        unfinished = checkpoint.with_name("unfinished")
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for file in [*unfinished.rglob("*"), unfinished]:
                sync(file)
            unfinished.rename(checkpoint)
            sync(checkpoint.parent)
            for old in checkpoints(self.work)[:-KEPT]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return checkpoint

    def load(self, checkpoint: Path) -> int:
        """Go back to a checkpoint; returns its step.

        Raises:
            InputError: it holds other weights than the model.
        """
        if (sharded := checkpoint / SHARDED).is_dir():  # torch passes over weights that the model does not have
            stored = FileSystemReader(sharded).read_metadata().state_dict_metadata
            expected = [f"model.{name}" for name in self.loop.plain.state_dict()]
            same_names(sharded, stored, expected, "pass --overwrite to start anew")
        advice = "remove this folder, and --resume goes on from the checkpoint before it"
        with reading(checkpoint, "is damaged", advice):
            self.loop.accelerator.load_state(str(checkpoint))
        return int(checkpoint.name.removeprefix("step-"))

    def bytes(self) -> int:
        """Disk space that they take, see `disk_bytes`."""
        return disk_bytes(self.loop.size, self.loop.total, self.loop.divided)

    def _save_trained(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # the frozen weights are in the model's folder already
        if self.loop.accelerator.is_main_process:
            save_file({n: w.detach().contiguous() for n, w in self.loop.trained.items()}, f"{folder}/{TRAINED}")

    def _load_trained(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        read_into(self.loop.trained, Path(folder) / TRAINED)


def disk_bytes(trained: int, total: int, divided: bool = False) -> int:
    """Disk space for checkpoints (fp32 weights and two moments), one more while it is written, best and result.

    Args:
        trained: numbers that are trained.
        total: numbers of the model.
        divided: whether weights are divided over processes, which write the frozen ones too.
    """
    frozen = (KEPT + 1) * 4 * (total - trained) if divided else 0
    return (3 * (KEPT + 1) + 2) * 4 * trained + frozen


def checkpoints(work: Path) -> list[Path]:
    """The checkpoints of an unfinished run, oldest first."""
    return sorted((work / "checkpoints").glob("step-*"))


def interrupted(work: Path, made: dict[str, Any], resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if there is an interrupted run and it shall go on.

    Args:
        work: folder of unfinished runs with this output.
        made: the settings of now, as `train` records them.
        resume: go on with an interrupted run.
        overwrite: rather start anew than fail.

    Raises:
        InputError: there is an interrupted run that may neither go on nor be thrown away.
    """
    there = checkpoints(work)
    before = made_with(work / MANIFEST)
    if not there or before is None:
        return None
    different = differences(before, made)
    if resume and not different:
        return there[-1]
    if overwrite:
        return None
    what = f"with other settings ({', '.join(different)})" if different else "that --resume goes on with"
    raise InputError(f"{work}: holds an interrupted run {what}; pass --overwrite to start anew")


def made_with(manifest: Path) -> dict[str, Any] | None:
    """What a folder, finished or not, was trained with; None if it says nothing."""
    return read_json(manifest).get("training") if manifest.is_file() else None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare two runs.

    Args:
        before: what `made_with` returned.
        now: the settings of now, as `train` records them.

    Returns:
        Names of settings that differ and matter for the result.
    """
    now = json.loads(json.dumps(now))
    stages = before["stage"], now["stage"]
    # A draw belongs to a micro batch.
    free = FREE - {"micro_batch"} if now["stage"]["window_dropout"] else FREE
    keys = sorted(key for key in {*stages[0], *stages[1]} - free if stages[0].get(key) != stages[1].get(key))
    old, new = before.get("content", {}), now.get("content", {})  # runs of earlier versions do not say
    changed = [name for name in old.keys() & new.keys() if _changed(old[name], new[name])]
    names = [key for key in ("model", "data") if before[key] != now[key]]
    return names + [f"the content of {name}" for name in sorted(changed)] + keys


def content(model_dir: Path, wanted: Recipe) -> dict[str, Any]:
    """What changes when the files do that a run reads: of its model, with the one that adapters belong to, and data."""
    with suppress(InputError):
        folders = [model_dir, *bases(model_dir)]
        known = [identity(folder) for folder in folders]
        named = {"model": "weights", "other_weights": "other_weights", "tokenizer": "tokenizer"}
        return {name: [each[kind] for each in known] for name, kind in named.items()} | {"data": contents(wanted.data)}
    return {}


def _changed(before: list[Any], now: list[Any]) -> bool:
    """Whether two lists of hashes differ; None means that one is not known."""
    return len(before) != len(now) or any(
        None not in pair and pair[0] != pair[1] for pair in zip(before, now, strict=True)
    )
