"""What tests of several files share about training."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from linearize import cli
from linearize.recipe import load as recipes
from linearize.recovery.monitor import read_log

T = 32


def recipe_for(text: Path, steps: int = 4, **changes) -> recipes.Recipe:
    stage = {
        "name": "distil",
        "tokens": steps * 4 * T,
        "seq_len": T,
        "batch": 4,
        "micro_batch": 2,
        "lr": 2e-3,
        "save_every": 2,
        "peft": {"r": 4, "alpha": 8, "roles": ["q", "k", "v", "o"]},
    }
    return recipes.from_dict({"source": {"id": "tiny"}, "data": [{"path": str(text)}], "train": [{**stage, **changes}]})


def without_times(log: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in read_log(log)]


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([[line["lm"], line["kl"]] for line in read_log(folder / "train_log.jsonl")])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def start(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """``python -m linearize.train``, alone or under a launcher, in a process of its own."""
    command = [sys.executable, *launcher, "-m", "linearize.train", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def command_line(monkeypatch, *words) -> int:
    """Exit code of `linearize WORDS`."""
    monkeypatch.setattr("sys.argv", ["linearize", *map(str, words)])
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code or 0
    return 0
