"""An interrupted training run: where its checkpoints are, and whether it may go on with the settings of now."""

import json
from pathlib import Path
from typing import Any

from linearize.checkpoint.manifest import MANIFEST
from linearize.errors import InputError

FREE = {"save_every", "micro_batch", "gradient_checkpointing"}
"""Settings of a stage that decide no result, so an interrupted run may go on with other ones."""


def interrupted(work: Path, made: dict[str, Any], resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if there is an interrupted run in ``work`` and it shall go on."""
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


def checkpoints(work: Path) -> list[Path]:
    """Of an unfinished run, oldest first."""
    return sorted((work / "checkpoints").glob("step-*"))


def made_with(manifest: Path) -> dict[str, Any] | None:
    """What a folder, finished or not, was trained with."""
    return json.loads(manifest.read_text()).get("training") if manifest.is_file() else None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of settings that differ between two runs and matter for the result."""
    now = json.loads(json.dumps(now))
    stages = before["stage"], now["stage"]
    # A draw belongs to a micro batch.
    free = FREE - {"micro_batch"} if now["stage"]["window_dropout"] else FREE
    keys = sorted(key for key in {*stages[0], *stages[1]} - free if stages[0].get(key) != stages[1].get(key))
    return [key for key in ("model", "data") if before[key] != now[key]] + keys
