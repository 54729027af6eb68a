"""YAML of strangers: the one reader of recipes and suites, which knows how a file of a few bytes becomes a huge one."""

import os
from collections.abc import Hashable
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from linearize.errors import InputError
from linearize.formats import quoted

LARGEST = 1_000_000
"""Bytes of a file. The longest recipe has some thousands."""
MOST = 20_000
"""Values of a file, with what its aliases stand for written out; a long text counts as several."""


def read_yaml(path: Path, where: object = None) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        where: named at the start of every error; None: the path.

    Raises:
        InputError: it is missing, no file, too large, no valid YAML, or holds something else than a mapping.
    """
    where = where or path
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{where}: is a folder or no plain file; name a YAML file")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read as YAML ({error}); name an existing file") from error
    values = parse_yaml(content, where)
    if not isinstance(values, dict):
        held = "nothing" if values is None else f"{type(values).__name__}"
        raise InputError(f"{where}: holds no mapping; found {held}; expected keys, each with a value")
    return values


def parse_yaml(text: str | bytes, where: object, advice: str = "a value with special characters needs quotes") -> Any:
    """What YAML text stands for.

    Args:
        text: a whole file or one value.
        where: it was given, for errors.
        advice: what to do where it is no YAML.

    Raises:
        InputError: it is no valid YAML, too large, or grows too large with its aliases written out; a key is given
            twice.
    """
    if len(text) > LARGEST:
        raise InputError(f"{where}: has more than {LARGEST:,} bytes; a recipe or suite has some thousands at most")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        _size(node, where, {})
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        reason = shorten(" ".join(str(error).split("; use sys.")[0].split()), 200, placeholder=" ...")
        raise InputError(f"{where}: cannot be read as YAML (not valid YAML: {reason}); {advice}") from error
    except RecursionError as error:
        raise InputError(
            f"{where}: cannot be read as YAML (nested too deep); a recipe or suite has five levels"
        ) from error


def _size(node: yaml.Node, where: object, known: dict[int, int]) -> int:
    """Number of values of a node, aliases written out; refuses what no file needs and one key given twice."""
    if id(node) in known:
        if not known[id(node)]:
            raise InputError(f"{where}: an alias stands for something that holds it; write the value out")
        return known[id(node)]
    known[id(node)] = 0  # while it is counted
    total = 1 + (len(node.value.encode()) // 50 if isinstance(node, yaml.ScalarNode) else 0)  # half a pair: ValueError
    if isinstance(node, yaml.MappingNode):
        keys: set[Hashable] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in keys:
                    line = key.start_mark.line + 1
                    raise InputError(f"{where}: line {line}: key {quoted(key.value)} is given twice; keep one of them")
                keys.add(key.value)
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        for each in part if isinstance(part, tuple) else (part,):
            total += _size(each, where, known)
            if total > MOST:
                raise InputError(
                    f"{where}: stands for more than {MOST:,} values once its aliases are written out; write a list "
                    "out, or leave it away"
                )
    known[id(node)] = total
    return total
