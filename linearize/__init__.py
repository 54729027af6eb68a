"""Turn a pretrained Hugging Face LLM into a gated linear-recurrent one.

Importing the package registers the model type `linearized` with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` opens a linearized folder. The names below load torch and transformers on first
use.
"""

from importlib import import_module
from typing import Any

from linearize import autoload

__version__ = "0.1.0"

_HOME = {
    "LinearizedConfig": "model.modeling",
    "LinearizedForCausalLM": "model.modeling",
    "branches": "model.branches",
    "linearize_": "model.modeling",
    "MIXERS": "model.mixers",
    "build_config": "model.mixers",
    "InputError": "errors",
}

__all__ = [
    "InputError",
    "LinearizedConfig",
    "LinearizedForCausalLM",
    "MIXERS",
    "branches",
    "build_config",
    "linearize_",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"linearize.{_HOME[name]}"), name)
    raise AttributeError(f"module 'linearize' has no attribute {name!r}")


autoload.install()
