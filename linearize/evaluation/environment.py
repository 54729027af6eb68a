"""Where and with what a comparison ran."""

import contextlib
import datetime
import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from linearize.recipe.resources import package_folder

PACKAGES = ("linearize", "torch", "transformers", "tokenizers", "peft", "lm_eval", "datasets", "numpy")
PACKAGES += ("flash-linear-attention",)


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
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "-uno"])
    try:
        head, state = (subprocess.check_output(command, cwd=root, stderr=subprocess.DEVNULL) for command in commands)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.decode().strip() + ("+changes" if state.strip() else "")


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions | {"torch": str(torch.__version__)}  # with the build, which its metadata leaves out


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
