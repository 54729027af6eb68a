"""results.json, read, checked and written: what a comparison leaves behind; table.py lays it out."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from linearize.checkpoint.atomic import write_text
from linearize.checkpoint.reading import reading, reason
from linearize.checkpoint.replacing import LARGEST, check_file_output
from linearize.errors import InputError
from linearize.formats import quoted
from linearize.results.schema import SCHEMA, Results

MOST = 1e100
"""Of every number."""


def read(path: str | Path) -> dict[str, Any]:
    """Read and check a results file.

    Raises:
        InputError: it is missing, no JSON, of a newer schema, or does not follow the schema.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; write it with `linearize eval DIR --out {path}`")
    with reading(path, "is no readable JSON", "run `linearize eval` again"):
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes; results have some millions")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_number)
    validate(content, str(path))
    return content


def _number(text: str) -> int | float:
    """A number of JSON that can be computed with: finite, and no longer than any measurement is."""
    value = float(text)
    if not abs(value) < MOST:  # NaN too
        raise ValueError(f"found {text[:40]}; expected finite numbers, below {MOST:g}")
    return int(text) if text.lstrip("-").isdigit() else value


@contextlib.contextmanager
def presenting(results: list[dict[str, Any]]) -> Iterator[None]:
    """Lay out results that follow the schema and may still hold anything else.

    Raises:
        InputError: the block met numbers or values that cannot be shown together.
    """
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        names = ", ".join(quoted(each.get("model")) for each in results)
        raise InputError(
            f"{names}: these results hold values that do not go together ({reason(error)}); run `linearize eval` again"
        ) from error


def write(results: dict[str, Any], path: str | Path) -> Path:
    """Check results and write them so that the file appears, complete, by one rename.

    Raises:
        InputError: they do not follow the schema, or the file cannot be written.
    """
    path = Path(path)
    validate(results, str(path))
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    # Lists of numbers, one per item, take one line each. No JSON string holds a raw line break: only lists match.
    text = re.sub(r"\[\n[-\d.eE+,\s]+\]", lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text)
    return write_text(path, text + "\n")


def check_target(path: Path) -> None:
    """Refuse a file for results that holds anything but results, before the work.

    Raises:
        InputError: see `check_file_output`.
    """

    def ours(content: bytes) -> bool:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            return {"schema", "settings", "columns"} <= set(json.loads(content))
        return False

    check_file_output(path, "results of `linearize eval` or `bench`", ours)


def validate(results: Any, where: str = "results") -> None:
    """Check results against the schema.

    Raises:
        InputError: one paragraph that names every problem.
    """
    if not isinstance(results, dict) or "schema" not in results:
        raise InputError(f"{where}: is no results file (no `schema`); write one with `linearize eval`")
    if results["schema"] != SCHEMA:
        raise InputError(
            f"{where}: schema is {quoted(results['schema'])}; this version reads {SCHEMA}; install the linearize that "
            "wrote it"
        )
    try:
        _adapter().validate_python(results)
        problems = _strangers(results)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors(include_url=False)]
    if problems:
        raise InputError(f"{where}: does not follow schema {SCHEMA}: {'; '.join(problems)}")


@cache
def _adapter() -> TypeAdapter[Results]:
    return TypeAdapter(Results)


def _strangers(results: dict[str, Any]) -> list[str]:
    """Columns that the summary names and that are not there."""
    summary = results.get("summary", {})
    return [
        f"summary.{part}.{name}: there is no such column; columns: {', '.join(results['columns'])}"
        for part in ("average", "recovery", "paired")
        for name in summary.get(part, {})
        if name not in results["columns"]
    ]


def _explain(problem: Any) -> str:
    *at, last = (str(part) for part in problem["loc"])
    key, message = ".".join([*at, last] if last != "[key]" else at), problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: {message}"
    return f"{key}: found {quoted(problem['input'])}; {message[0].lower()}{message[1:]}"
