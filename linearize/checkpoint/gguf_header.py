"""The header of a GGUF file, checked against the file: damage is found before transformers fills gaps with defaults."""

import math
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from linearize.checkpoint.reading import AGAIN, reading

_SCALARS = "BbHhIif?"  # by the format's code of a type; 8 is text, 9 an array, then come three of 64 bits
_WIDE = {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_LONGEST = 4096  # elements of an array that is read and not skipped: one per layer, not one per token


class Header(NamedTuple):
    """What a header says.

    Attributes:
        values: its settings; None for long arrays.
        shapes: tensor -> shape, innermost dimension first, as the format has it.
    """

    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def read(path: Path) -> Header:
    """Read the header of a GGUF file; vocabulary and weights are skipped.

    Raises:
        InputError: it is no GGUF file, is cut short, or lacks what every model has.
    """
    with reading(path, "is not a whole GGUF file", AGAIN), path.open("rb") as file:
        values, tensors = _settings(file)
        size = path.stat().st_size
        if not tensors or 24 * tensors > size:
            raise ValueError(f"{tensors} tensors in {size} bytes")
        shapes, end = _tensors(file, tensors)
        if file.tell() + -file.tell() % values.get("general.alignment", 32) + end > size:
            raise ValueError(f"cut short: {size} bytes, its tensors need more")
        name = str(values.get("general.architecture"))
        lacking = [key for key in ("block_count", "embedding_length") if f"{name}.{key}" not in values]
        if lacking:
            raise ValueError(f"its header lacks {', '.join(lacking)}")
        _check_sizes(values, name, shapes)
        return Header(values, shapes)


def _check_sizes(values: dict[str, Any], name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the settings that transformers builds a model by with the tensors."""
    blocks = {int(match[1]) for match in (re.match(r"blk\.(\d+)\.", tensor) for tensor in shapes) if match}
    width, rows = shapes.get("token_embd.weight", (None, None))
    stated = {key: values.get(f"{name}.{key}") for key in ("block_count", "embedding_length", "vocab_size")}
    held = {"block_count": max(blocks) + 1 if blocks else None, "embedding_length": width, "vocab_size": rows}
    for key, number in stated.items():
        if number is not None and held[key] not in (None, number):
            raise ValueError(f"{name}.{key} is {number}, and its tensors have {held[key]}")


def settings(path: Path) -> dict[str, Any]:
    """The settings of a GGUF file alone, as in `Header`.

    Raises:
        InputError: it is no GGUF file, or cut short.
    """
    with reading(path, "is not a whole GGUF file", AGAIN), path.open("rb") as file:
        return _settings(file)[0]


def _settings(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The settings, and how many tensors follow them."""
    size = os.fstat(file.fileno()).st_size
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, count = _numbers(file, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 can be read")
    if 12 * count > size:
        raise ValueError(f"{count} settings in {size} bytes")
    values = {}
    for _ in range(count):
        name = _text(file)
        values[name] = _value(file, _number(file, "I"), size)
    return values, tensors


def _tensors(file: BinaryIO, count: int) -> tuple[dict[str, tuple[int, ...]], int]:
    """The shapes of all tensors, and where the last one ends, in bytes behind the header."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    shapes, end = {}, 0
    for _ in range(count):
        name, dimensions = _text(file), _number(file, "I")
        if dimensions > 8:
            raise ValueError(f"tensor {name} of {dimensions} dimensions")
        shape = _numbers(file, "Q" * dimensions)
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(_number(file, "I"))]
        shapes[name] = shape
        end = max(end, _number(file, "Q") + math.prod(shape) // block * size)
    return shapes, end


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return _number(file, _code(kind))
    kind, length = _numbers(file, "IQ")
    if length > size:
        raise ValueError(f"an array of {length} elements in {size} bytes")
    if kind in (_TEXT, _ARRAY):
        for _ in range(length):
            _value(file, kind, size) if kind == _ARRAY else file.seek(_number(file, "Q"), 1)
        return None
    if length <= _LONGEST:
        return list(_numbers(file, _code(kind) * length))
    file.seek(length * struct.calcsize(f"<{_code(kind)}"), 1)
    return None


def _code(kind: int) -> str:
    return _SCALARS[kind] if kind < len(_SCALARS) else _WIDE[kind]


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    content = file.read(min(length, 1 << 26))
    if len(content) != length:
        raise ValueError("cut short")
    return content.decode("utf-8", errors="replace")


def _number(file: BinaryIO, code: str) -> Any:
    return _numbers(file, code)[0]


def _numbers(file: BinaryIO, codes: str) -> tuple[Any, ...]:
    layout = f"<{codes}"
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
