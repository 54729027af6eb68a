"""Numbers and tables written for people. Standard library only."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from html import escape
from reprlib import Repr
from typing import Any


def aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs joined: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def format_bytes(count: float) -> str:
    """Write a number of bytes for people: ``1.50 GiB``; below 1 KiB ``512 bytes``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def recording(cache: dict[str, Any]) -> str:
    """What is to be said behind the size of a cache: see `linearize.checkpoint.describe.cache_sizes`."""
    return f"; {format_bytes(cache['rollback'])} more while drafts are checked" if cache.get("rollback") else ""


_UNITS = {unit: 1024**power for power, unit in enumerate(("", "k", "m", "g", "t"))}


def parse_bytes(text: str | int) -> int:
    """Read a number of bytes that a person wrote: 8MiB, 7.2 MiB, 512K, 1000000; all units are powers of 1024.

    Raises:
        ValueError: it is none, or below 1.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)i?b?\s*", str(text).lower().removesuffix("bytes"))
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if isinstance(text, bool) or count < 1:
        raise ValueError("allowed: a number of bytes above 0, such as 8MiB, 512KiB or 1000000")
    return count


_JOINERS = "\u200c\u200d"  # of scripts and emoji: harmless, and a name without them is another one


def plain(text: object, lines: bool = False) -> str:
    """Text of a stranger as a terminal, page or table can show it.

    Args:
        text: may hold what steers a terminal, turns the direction of writing, breaks a row, or is no character.
        lines: it is a text of several lines; without, a line break is written as its escape too.

    Returns:
        The text with such characters written as their escapes: ``\\x1b``, ``\\u202e``.
    """
    kept = _JOINERS + "\n\t" * lines
    return "".join(
        char.encode("unicode_escape").decode()
        if char not in kept and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char
        for char in str(text)
    )


def markdown(text: object) -> str:
    """Text of a stranger as Markdown that shows it, also in a cell of a table: `plain`, with what is syntax escaped."""
    return re.sub(r"[\\`*\[\]|~$!#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", escape(plain(text), quote=False))


_REPR = Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 120, 120, 60


def quoted(value: object) -> str:
    """A value of a stranger for an error, however large or deep it is: its repr, cut to some 200 characters."""
    try:
        text = plain(_REPR.repr(value))
    except ValueError:  # a whole number with more digits than Python writes
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:196]} ..."


def each_string(value: Any, change: Callable[[str], str]) -> Any:
    """The same nested lists and mappings with every string in them, keys too, changed by a function."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {each_string(key, change): each_string(item, change) for key, item in value.items()}
    return [each_string(item, change) for item in value] if isinstance(value, list) else value


def code(text: object) -> str:
    """Text of strangers as code within a line of Markdown."""
    return f"`{plain(str(text)).replace('`', chr(39))}`"
