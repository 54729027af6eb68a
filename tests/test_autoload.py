"""The model type is registered in whichever order a program imports things, also where it never imports linearize."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import tiny_model

from linearize.model.modeling import linearize_

ORDERS = {
    "before": "import linearize; from transformers import AutoModelForCausalLM",
    "after": "from transformers import AutoModelForCausalLM; import linearize",
    "without": "from transformers import AutoModelForCausalLM",
    "torch first": "import torch; from transformers import AutoModelForCausalLM",
    "config first": "from transformers import AutoConfig; from transformers import AutoModelForCausalLM",
    "peft first": "import peft; from transformers import AutoModelForCausalLM",
}


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code away from the checkout, so that what registers is the installed package."""
    environ = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_folder_opens_in_every_order_of_imports(order: str, tmp_path: Path):
    linearize_(tiny_model(layers=2), {"name": "window", "window": 8, "sinks": 2}).save_pretrained(tmp_path / "tiny")
    code = f"{ORDERS[order]}\nprint(type(AutoModelForCausalLM.from_pretrained('tiny')).__name__)"
    done = python(code, tmp_path)
    assert done.stdout.strip() == "LinearizedForCausalLM", done.stderr
    assert "cannot be opened here" not in done.stderr


def test_an_environment_that_does_not_fit_costs_a_warning_not_the_program(tmp_path: Path):
    code = f"import sys; sys.modules['linearize.model.modeling'] = None\n{ORDERS['without']}; print('on')"
    done = python(code, tmp_path)
    assert done.stdout.strip() == "on", done.stderr
    assert "RuntimeWarning: linearized models cannot be opened here" in done.stderr


def test_torch_alone_stays_alone(tmp_path: Path):
    done = python(
        "import torch, sys; print({'transformers', 'linearize.model.modeling'} & sys.modules.keys())", tmp_path
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_importing_linearize_imports_neither_torch_nor_transformers(tmp_path: Path):
    done = python("import linearize, sys; print({'torch', 'transformers'} & sys.modules.keys())", tmp_path)
    assert done.stdout.strip() == "set()", done.stderr
