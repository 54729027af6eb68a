"""fla's naive PyTorch references, loaded by file: importing the package fla needs triton."""

import functools
import importlib.util
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType


@functools.cache
def fla_naive(name: str, file: str = "naive") -> ModuleType:
    """fla/ops/NAME/FILE.py as a module of its own."""
    path = Path(str(distribution("fla-core").locate_file("fla"))) / "ops" / name / f"{file}.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{name.replace('/', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
