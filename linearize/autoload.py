"""Registers the linearized classes as soon as transformers is there, in whichever order things are imported.

`import linearize` must not cost the seconds that importing torch and transformers takes, and programs that never import
linearize should open linearized folders too: `lm_eval --model hf --model_args pretrained=DIR`, pipelines, trainers.
Neither transformers nor lm-eval has a hook for new architectures. torch has one: it calls the entry points of group
`torch.backends` when it is imported (TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns that off). Ours imports nothing, it only
waits for transformers.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

AWAITED = "transformers.models.auto.modeling_auto"


def install() -> None:
    """Register now if transformers' table of causal language models is loaded, else as soon as it is."""
    module = sys.modules.get(AWAITED)
    if module is None:
        if not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting())
    elif not _running(module):
        _register()
    elif not isinstance(module.__spec__ and module.__spec__.loader, _ThenRegister):
        # Torch called from inside the awaited module, whose import is what imports torch: too late to wait for it.
        module.__class__ = _Unregistered


def _running(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


def _register() -> None:
    try:
        importlib.import_module("linearize.model.modeling")
    except ImportError as error:
        # A program that only shares the environment must not break because this package does not fit.
        warnings.warn(f"linearized models cannot be opened here: {error}", RuntimeWarning, stacklevel=2)


class _Unregistered(ModuleType):
    """The awaited module, found while it was running: registers when somebody looks into it after that."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and not _running(self):
            self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
            _register()
        return ModuleType.__getattribute__(self, name)


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the other finders find the awaited module, and registers when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = self.loader
        _register()
