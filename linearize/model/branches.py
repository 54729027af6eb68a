"""Other paths through the same weights: the source's attention, one branch alone, a shorter window."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from .attention import linearized_modules
from .mixers import Mixer

BRANCHES = ("all", "source", "window", "memory")


@contextmanager
def branches(model: nn.Module, branch: str, layers: Collection[int] | None = None) -> Iterator[None]:
    """Run another path through the same weights for a while.

    Args:
        model: a linearized model, wrapped or not.
        branch: `source`: the source's own softmax attention; `window`: without the memory; `memory`: without the
            window; `all`: as converted.
        layers: indices of the layers that take it, the others go on as before; None: all.

    Raises:
        ValueError: an unknown branch, or a model with no linearized layer.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch is {branch!r}; expected one of {', '.join(BRANCHES)}")
    modules = linearized_modules(model)
    if not modules:
        raise ValueError("this model has no linearized layer")
    modules = [m for m in modules if layers is None or m.layer_idx in layers]
    before = [m.branch for m in modules]
    try:
        for m in modules:
            m.branch = branch
        yield
    finally:
        for m, b in zip(modules, before, strict=True):
            m.branch = b


@contextmanager
def windows(model: nn.Module, window: int | None = None, sinks: int | None = None) -> Iterator[None]:
    """Cut the exact window and the sinks of all layers for a while: what leaves them earlier goes to the memory.

    A cache that is made meanwhile has the shorter window too, and ends with it.

    Args:
        model: a linearized model, wrapped or not.
        window: tokens of exact attention at most, at least 1; a layer with fewer keeps its own. None: as configured.
        sinks: first tokens that stay exact at most. None: as configured.

    Raises:
        ValueError: a window below 1, or sinks below 0.
    """
    if (window is not None and window < 1) or (sinks is not None and sinks < 0):
        raise ValueError(f"window is {window} and sinks are {sinks}; expected at least 1 and 0")
    mixers = [m for m in model.modules() if isinstance(m, Mixer)]
    before = [(m.window, m.sinks) for m in mixers]
    try:
        for m in mixers:
            m.window = m.window if window is None else min(m.window, window)
            m.sinks = m.sinks if sinks is None else min(m.sinks, sinks)
        yield
    finally:
        for m, old in zip(mixers, before, strict=True):
            m.window, m.sinks = old


def reaches(model: nn.Module) -> list[tuple[int, int]]:
    """(window, sinks), as configured, of each layer with both a window and a memory, which queries from position
    window + sinks on see."""
    configs = [m.mixer.config for m in linearized_modules(model) if m.mixer.recurrent and m.mixer.windowed]
    return [(c.window, c.sinks) for c in configs]
