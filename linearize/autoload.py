"""Registers the linearized classes as soon as transformers is there, in whichever order things are imported.

`import linearize` must not cost the seconds that importing torch and transformers takes, and programs that never import
linearize should open linearized folders too: `lm_eval --model hf --model_args pretrained=DIR`, pipelines, trainers.
Neither transformers nor lm-eval has a hook for new architectures. torch has one: it calls the entry points of group
`torch.backends` when it is imported. Ours imports nothing, it only waits for transformers.

No program may fail because of this: whatever goes wrong is logged, once. LINEARIZE_AUTOLOAD=0 turns it off, for
`import linearize` too; linearize's own functions then register the classes when they are used.
"""

import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

AWAITED = "transformers.models.auto.modeling_auto"


def install() -> None:
    """Register now if transformers' table of causal language models is loaded, else as soon as it is."""
    if os.environ.get("LINEARIZE_AUTOLOAD") == "0":
        return
    with _harmless():
        module = sys.modules.get(AWAITED)
        if module is None:
            if not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
                sys.meta_path.insert(0, _Waiting())
        elif not _running(module):
            _register()
        elif not isinstance(module.__spec__ and module.__spec__.loader, _ThenRegister):
            # Torch called from inside the awaited module, whose import is what imports torch: too late to wait for it.
            module.__class__ = _Unregistered


@contextmanager
def _harmless() -> Iterator[None]:
    """A program that only shares the environment goes on, whatever does not fit."""
    try:
        yield
    except Exception:
        _log_once()


@cache
def _log_once() -> None:
    error = sys.exception()
    logging.getLogger("linearize").warning(
        "linearized models cannot be opened here (%s: %s); LINEARIZE_AUTOLOAD=0 stops trying",
        type(error).__name__,
        error,
    )


def _running(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


def _register() -> None:
    with _harmless():
        importlib.import_module("linearize.model.modeling")


class _Unregistered(ModuleType):
    """The awaited module, met while it was running: registers when somebody looks into it after that."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and not _running(self):
            self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
            _register()
        return ModuleType.__getattribute__(self, name)


class _Waiting(importlib.abc.MetaPathFinder):
    """Lets the other finders find the awaited module, and registers when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AWAITED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            sys.meta_path[:] = others
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """The awaited module's own loader, and what comes after it."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = self.loader
        if module.__spec__:
            module.__spec__.loader = self.loader
        _register()
