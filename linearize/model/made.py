"""Classes made on demand that behave like written ones: they can be pickled, and inspected as the source's own."""

import copyreg
import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any


class Made(type):
    """The type of a class that is made on demand: pickle writes how it was made, since no module holds it.

    Attributes:
        made_by: a function that a module holds, and its arguments.
    """

    made_by: tuple[Any, ...]


copyreg.pickle(Made, lambda cls: (cls.made_by[0], cls.made_by[1:]))  # type: ignore[arg-type]


def as_inspected(mixed_in: type, source: type) -> dict[str, Callable[..., Any]]:
    """The methods of a mixed-in class that override a source's, with the source's signatures.

    transformers, peft and accelerate look at signatures to learn what a model takes.

    Args:
        mixed_in: the class whose methods take any arguments and pass them on.
        source: the class that they override methods of.

    Returns:
        Name -> the method, to stand in the class that inherits from both.
    """
    methods = {name: value for name, value in vars(mixed_in).items() if inspect.isfunction(value)}
    return {name: _like(value, getattr(source, name)) for name, value in methods.items() if hasattr(source, name)}


def _like(method: Any, overridden: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a method that `inspect.signature` takes for the overridden one."""
    copy = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    copy.__kwdefaults__ = method.__kwdefaults__
    return functools.update_wrapper(copy, overridden)
