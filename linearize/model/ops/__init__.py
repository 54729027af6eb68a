"""Recurrences, one family per file, and the choice of what runs them: PyTorch, or Triton kernels of
flash-linear-attention.

Mixers call `run_additive`, `run_delta`, or `run` of a family's own file. The kernels run on CUDA tensors where fla and
triton can be imported; everything else runs as the chunked form in PyTorch. The environment variable LINEARIZE_BACKEND,
or the keyword `backend`, forces one of the two.
"""

import functools
import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ...errors import InputError, suggest
from . import additive, delta, fla_backend

BACKENDS = ("torch", "fla")

_asked: ContextVar[list[str | None] | None] = ContextVar("asked", default=None)


def on_gpu(x: Tensor) -> bool:
    """Whether x lies where the kernels run."""
    return x.is_cuda


def has_kernels(call: Callable[[], Any]) -> bool:
    """Whether there are kernels for a recurrence that `call` runs, wherever they can run."""
    asked: list[str | None] = []
    token = _asked.set(asked)
    try:
        call()
    finally:
        _asked.reset(token)
    return bool(asked)


def chooses_fla(x: Tensor, restriction: str | None, backend: str | None = None) -> bool:
    """Whether a call runs on fla's kernels.

    Args:
        x: one of the call's tensors.
        restriction: what about this call the kernels cannot do, or None.
        backend: torch | fla, or None for LINEARIZE_BACKEND and, without it, whatever is faster and there.

    Raises:
        InputError: the backend is unknown, or fla is forced where it cannot run.
    """
    asked = _asked.get()
    if asked is not None:
        asked.append(restriction)
    wanted = backend or os.environ.get("LINEARIZE_BACKEND") or None
    if wanted not in (None, *BACKENDS):
        raise InputError(f"LINEARIZE_BACKEND: unknown backend {wanted!r}. {suggest(wanted, BACKENDS)}")
    if wanted == "torch" or (wanted is None and not on_gpu(x)):
        return False
    missing = None if on_gpu(x) else f"the tensors are on {x.device}, and the kernels need a CUDA device"
    missing = missing or fla_backend.missing()
    if wanted == "fla" and (missing or restriction):
        raise InputError(
            f"LINEARIZE_BACKEND: found 'fla', but {missing or restriction}; allowed here: torch; unset the variable "
            "(or the keyword `backend`) to have the kernels where they can run and PyTorch elsewhere"
        )
    if missing is None and restriction is not None:
        _warn(restriction)
    return missing is None and restriction is None


@functools.cache
def _warn(restriction: str) -> None:
    """Once per restriction, not once per layer and step."""
    warnings.warn(f"fla's kernels are not used: {restriction}. PyTorch runs this recurrence instead", stacklevel=4)


def run_additive(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`additive.chunked`, with its arguments and result, by whatever runs it here: see `chooses_fla`."""
    if chooses_fla(q, fla_backend.restriction(q, v), backend):
        return fla_backend.additive(q, k, v, log_decay, state)
    return additive.chunked(q, k, v, log_decay, state)


def run_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`delta.chunked`, with its arguments and result, by whatever runs it here: see `chooses_fla`."""
    if chooses_fla(q, fla_backend.restriction(q, v, "delta"), backend):
        return fla_backend.delta(q, k, v, beta, log_decay, state)
    return delta.chunked(q, k, v, beta, log_decay, state)
