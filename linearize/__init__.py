"""Turn a pretrained Hugging Face LLM into one whose cache is constant, recover it, and measure what was lost.

Every verb of the command line is a function here, with the same names, options and defaults. Importing the package
registers the model type `linearized` with transformers' Auto classes, so that `AutoModelForCausalLM.from_pretrained`
opens a linearized folder. torch and transformers are imported at the first use.

Example:
    >>> linearize.convert("smollm2-135m", "runs/demo/0-converted")
    >>> model, tokenizer = linearize.load("runs/demo/0-converted")
"""

from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

from linearize import autoload
from linearize.version import __version__

if TYPE_CHECKING:
    from linearize.verbs import (
        MIXERS,
        InputError,
        LinearizedConfig,
        LinearizedForCausalLM,
        StateStore,
        allocate,
        bench,
        branches,
        build_config,
        calibrate,
        check,
        convert,
        doctor,
        evaluate,
        export,
        generate,
        inspect,
        linearize_,
        load,
        load_state,
        merge,
        plan,
        prune,
        push,
        report,
        run,
        save_state,
        select,
        split_states,
        stack_states,
        train,
    )

__all__ = [
    "__version__",
    "InputError",
    "LinearizedConfig",
    "LinearizedForCausalLM",
    "MIXERS",
    "StateStore",
    "allocate",
    "bench",
    "branches",
    "build_config",
    "calibrate",
    "check",
    "convert",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "linearize_",
    "load",
    "load_state",
    "merge",
    "plan",
    "prune",
    "push",
    "report",
    "run",
    "save_state",
    "select",
    "split_states",
    "stack_states",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'linearize' has no attribute {name!r}")
    value = getattr(import_module("linearize.verbs"), name)
    return import_module("linearize.arguments").checked(value) if isinstance(value, FunctionType) else value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


autoload.install()
