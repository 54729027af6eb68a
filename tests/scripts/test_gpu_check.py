"""The check of the kernels, with PyTorch in their place: its cells, what it notices, and what it says without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linearize.model.mixers import MIXERS

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = "--backend torch --device cpu --length 16 --parity-length 24 --repeats 1 --heads 2,1 --width 8 --batch 2"


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs the script in this process; returns its exit code and what it wrote."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_check

    out = tmp_path / "gpu-ops.json"

    def run(*options: str) -> tuple[int, dict]:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *TINY.split(), "--out", str(out), *options])
        return gpu_check.main(), json.loads(out.read_text()) if out.exists() else {}

    run.module = gpu_check
    return run


def test_every_family_and_mixer_is_compared_and_timed(check):
    code, found = check()
    assert code == 0 and found["holds"] and not found["left_out"]
    cells = {(c["part"], c["row"], c["dtype"], c.get("backend")): c for c in found["cells"]}
    recurrent = [name for name, cls in MIXERS.items() if cls.recurrent]
    for row in (*check.module.NAMES, *recurrent):
        for dtype in ("float32", "bfloat16"):
            cell = cells["parity", row, dtype, None]
            assert {"output", "gradient"} <= set(cell["error"]) == set(cell["limit"])
            # fp32 chunks against the naive form in fp64: the limits are for kernels, and far above this.
            assert dtype != "float32" or max(cell["error"].values()) < 1e-4, row
    for row in ("window", *recurrent):
        assert cells["train", row, "bfloat16", "torch"]["seconds"] > 0
        assert cells["decode", row, "bfloat16", None]["seconds"] > 0
    assert {part for part, row, *_ in cells if row == "softmax"} == {"train", "decode"}
    assert cells["parity", "delta channel", "float32", None]["kernels"]
    assert not cells["parity", "diagonal", "float32", None]["kernels"]


def test_a_wrong_recurrence_and_one_that_raises_are_noticed(check, monkeypatch):
    forms = check.module.forms
    wrong = {"additive": lambda **x: [1.01 * y for y in forms("additive")[1](**x)], "delta": lambda **x: 1 / 0}
    monkeypatch.setattr(check.module, "forms", lambda family: (wrong[family], forms(family)[1]))
    monkeypatch.setattr(check.module, "NAMES", ("additive channel", "delta none"))
    monkeypatch.setattr(check.module, "MIXERS", {})
    code, found = check()
    assert code == 1 and not found["holds"]
    first, second, *_ = found["cells"]
    assert first["row"] == "additive channel" and first["error"]["output"] > first["limit"]["output"]
    raised = next(cell for cell in found["cells"] if cell["row"] == "delta none")
    assert raised["raised"].startswith("ZeroDivisionError")
    assert second["dtype"] == "bfloat16"


def test_what_time_did_not_allow_is_listed(check):
    code, found = check("--minutes", "-1")
    assert code == 1 and found["cells"] == [] and "family additive none" in found["left_out"]


def test_without_a_gpu_it_says_so_in_one_sentence(check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, found = check("--backend", "fla")
    assert code == 2 and found == {}
    assert capsys.readouterr().err == "There is no CUDA device here, so the kernels cannot be checked.\n"


def test_the_script_asks_for_a_gpu_before_it_installs_anything(tmp_path):
    silent = tmp_path / "nvidia-smi"
    silent.write_text("#!/bin/sh\nexit 9\n")
    silent.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SCRIPTS / "gpu_check.sh")], env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "There is no NVIDIA GPU here" in done.stderr
