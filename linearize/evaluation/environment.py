"""Where and with what a comparison ran."""

import datetime
import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import linearize
from linearize.recipe.resources import package_folder

PACKAGES = (
    "linearize",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "lm_eval",
    "datasets",
    "numpy",
    "flash-linear-attention",
)


def environment(device: torch.device, seed: int, data: dict[str, str]) -> dict[str, Any]:
    """The `environment` of results.json.

    Args:
        device: that the models ran on.
        seed: of the run.
        data: name -> sha256 of what was read.
    """
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": data,
    }


def embedded_sha256(names: list[str]) -> dict[str, str]:
    """Hashes of embedded item files (eval/data/NAME.jsonl.gz)."""
    paths = [package_folder("eval") / "data" / f"{name}.jsonl.gz" for name in names]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def commit() -> str | None:
    """Commit of this package's checkout, with `+changes` if files differ from it; None when installed from a wheel."""
    root = Path(linearize.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        state = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if state.stdout.strip() else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
