"""Arguments of the Python API, checked against the annotations of the function before it runs."""

import inspect
import numbers
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TextIO, Union, get_args, get_origin

from linearize.errors import InputError
from linearize.formats import quoted

WORDS = {
    str: "a text",
    Path: "a path",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    NoneType: "None",
}
FITS: dict[Any, Callable[[Any], bool]] = {
    bool: lambda value: type(value).__name__ in ("bool", "bool_") or isinstance(value, int) and value in (0, 1),
    int: lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool),
    float: lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool),
    dict: lambda value: isinstance(value, Mapping),
    TextIO: lambda value: hasattr(value, "write"),
}
"""What stands for a type of an annotation, where that is more or less than its instances."""
LISTS = (list, Sequence, Iterable, Collection)


class _Wrong(Exception):
    """A value that fits none of what an annotation allows."""


@cache
def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which names an argument of a wrong type in an `InputError` before it does anything.

    Numbers of numpy and paths of other libraries are taken for what they are; objects of torch and of models' libraries
    are left to the function, which knows more about them.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            options = _options(parameter.annotation)
            if value is parameter.default or not options:
                continue
            try:
                bound.arguments[name] = _fitted(value, options, optional=parameter.default == ())
            except _Wrong:
                words = list(dict.fromkeys(map(_words, options)))
                raise InputError(
                    f"{function.__name__}: {name}: found {quoted(value)}; expected {' or '.join(words)}"
                ) from None
        return function(*bound.args, **bound.kwargs)

    return call


def _options(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation; none where it says nothing."""
    if annotation in (Any, inspect.Parameter.empty) or isinstance(annotation, str):
        return ()
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _words(option: Any) -> str:
    origin = get_origin(option) or option
    if origin in LISTS:
        return f"a list, not empty, of {' or '.join(map(_words, _options(get_args(option)[0])))}"
    return "a function" if origin is Callable else WORDS.get(origin) or f"a {origin.__name__}"


def _fitted(value: Any, options: tuple[Any, ...], optional: bool = False) -> Any:
    """The value as one of the options has it; `optional`: a list may be empty."""
    for option in options:
        try:
            return _as(value, option, options, optional)
        except _Wrong:
            continue
    if type(value).__module__.split(".")[0] in ("torch", "transformers", "peft"):
        return value
    raise _Wrong


def _as(value: Any, option: Any, options: tuple[Any, ...], optional: bool) -> Any:
    origin = get_origin(option) or option
    if origin in LISTS:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise _Wrong
        fitted = [_fitted(each, _options(get_args(option)[0])) for each in value]
        if not fitted and not optional:
            raise _Wrong
        return fitted
    if origin in (str, Path):
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str) or Path in options and (not text or "\0" in text):
            raise _Wrong
        return value if isinstance(value, str) or Path in options else text
    fits = FITS.get(origin)
    if not (fits(value) if fits else isinstance(value, origin)):
        raise _Wrong
    return origin(value) if origin in (bool, int) else value
