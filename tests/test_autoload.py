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


def python(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run code away from the checkout, so that what registers is the installed package."""
    environ = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"} | variables
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.slow
def test_a_folder_opens_in_every_order_of_imports(order: str, tmp_path: Path):
    linearize_(tiny_model(layers=2), {"name": "window", "window": 8, "sinks": 2}).save_pretrained(tmp_path / "tiny")
    code = f"{ORDERS[order]}\nprint(type(AutoModelForCausalLM.from_pretrained('tiny')).__name__)"
    done = python(code, tmp_path)
    assert done.stdout.strip() == "LinearizedForCausalLM", done.stderr
    assert "cannot be opened here" not in done.stderr


BROKEN = (
    "import sys\n"
    "class Broken:\n"
    "    def find_spec(self, name, *_):\n"
    "        if name == 'linearize.model.cache': raise {}\n"
    "sys.meta_path.insert(0, Broken())"
)
CLOSED = (
    "import sys\n"
    "class Closed(list):\n"
    "    def insert(self, *_): raise RuntimeError('nobody may come first')\n"
    "sys.meta_path = Closed(sys.meta_path)"
)
# What may happen while the package is imported in an environment that it was not made for.
FAULTS = {
    "missing": "import sys; sys.modules['linearize.model.modeling'] = None",
    "runtime error": BROKEN.format("RuntimeError('broken')"),
    "attribute error": BROKEN.format("AttributeError('broken')"),
    "os error": BROKEN.format("OSError('broken')"),
    "warning as error": BROKEN.format("RuntimeError('broken')") + "\nimport warnings; warnings.simplefilter('error')",
    "hook": CLOSED,
}


@pytest.mark.parametrize("order", ["without", "torch first", "config first"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_whatever_does_not_fit_costs_one_line_not_the_program(fault: str, order: str, tmp_path: Path):
    if fault == "hook" and order == "without":
        pytest.skip("transformers imports torch itself: there is nothing to wait for")
    code = f"{FAULTS[fault]}\n{ORDERS[order]}\nimport transformers; transformers.GPT2LMHeadModel; print('on')"
    done = python(code, tmp_path)
    assert done.stdout.strip() == "on", done.stderr
    lines = [line for line in done.stderr.splitlines() if "linearized models cannot be opened here" in line]
    assert len(lines) == 1 and "LINEARIZE_AUTOLOAD=0" in lines[0], done.stderr


@pytest.mark.slow
def test_a_variable_turns_it_off(tmp_path: Path):
    code = (
        "import torch, sys, linearize; from transformers import AutoModelForCausalLM, AutoConfig\n"
        "print('linearize.model.modeling' in sys.modules, any('linearize' in repr(f) for f in sys.meta_path))\n"
        "linearize.linearize_; from transformers import CONFIG_MAPPING; print('linearized' in CONFIG_MAPPING)"
    )
    assert python(code, tmp_path, LINEARIZE_AUTOLOAD="0").stdout.split() == ["False", "False", "True"]
    done = python(code, tmp_path)
    assert done.stdout.split() == ["True", "False", "True"], done.stderr


def test_the_hook_leaves_no_trace_in_the_import_system(tmp_path: Path):
    """What other programs look at: the module's loader, and every finder's turn."""
    code = (
        "import sys, importlib.machinery as m\n"
        "class Asked:\n"
        "    names = []\n"
        "    def find_spec(self, name, *_): self.names.append(name)\n"
        "sys.meta_path.insert(0, Asked())\n"
        "from transformers import AutoModelForCausalLM\n"
        "import transformers.models.auto.modeling_auto as auto\n"
        "assert auto.__name__ in Asked.names\n"
        "for loader in (auto.__loader__, auto.__spec__.loader): assert type(loader) is m.SourceFileLoader, loader\n"
        "import inspect; assert 'MODEL_FOR_CAUSAL_LM_MAPPING' in inspect.getsource(auto)\n"
        "import linearize.autoload as a\n"
        "assert not any(isinstance(f, a._Waiting) for f in sys.meta_path)\n"
        "print(type(auto).__name__, 'linearize.model.modeling' in sys.modules)"
    )
    done = python(code, tmp_path)
    assert done.stdout.split() == ["module", "True"], done.stderr


def test_a_module_that_nobody_finds_is_missing_as_ever(tmp_path: Path):
    """Where the awaited module is not installed, every other finder still has its turn."""
    code = (
        "import sys, linearize.autoload as a\n"
        "a.AWAITED = 'surely.missing'; import types; sys.modules['surely'] = types.ModuleType('surely')\n"
        "sys.modules['surely'].__path__ = []\n"
        "turns = []\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_): turns.append(name)\n"
        "first = next(i for i, f in enumerate(sys.meta_path) if isinstance(f, a._Waiting))\n"
        "sys.meta_path.insert(first + 1, Finder())\n"
        "try: import surely.missing\n"
        "except ImportError: print(turns.count('surely.missing') > 0)"
    )
    done = python(code, tmp_path)
    assert done.stdout.strip() == "True", done.stderr


def test_torch_alone_stays_alone(tmp_path: Path):
    done = python(
        "import torch, sys; print({'transformers', 'linearize.model.modeling'} & sys.modules.keys())", tmp_path
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_importing_linearize_imports_neither_torch_nor_transformers(tmp_path: Path):
    done = python("import linearize, sys; print({'torch', 'transformers'} & sys.modules.keys())", tmp_path)
    assert done.stdout.strip() == "set()", done.stderr
