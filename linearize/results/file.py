"""results.json, read, checked and written: what a comparison leaves behind; table.py lays it out."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from linearize.checkpoint.atomic import write_text
from linearize.errors import InputError
from linearize.results.schema import SCHEMA, Results


def read(path: str | Path) -> dict[str, Any]:
    """Read and check a results file.

    Raises:
        InputError: it is missing, no JSON, of a newer schema, or does not follow the schema.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; write it with `linearize eval DIR --out {path}`") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no readable JSON ({error}); run `linearize eval` again") from error
    validate(content, str(path))
    return content


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


def validate(results: Any, where: str = "results") -> None:
    """Check results against the schema.

    Raises:
        InputError: one paragraph that names every problem.
    """
    if not isinstance(results, dict) or "schema" not in results:
        raise InputError(f"{where}: is no results file (no `schema`); write one with `linearize eval`")
    if results["schema"] != SCHEMA:
        raise InputError(
            f"{where}: schema is {results['schema']!r}; this version reads {SCHEMA}; install the linearize that wrote "
            "it"
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
    return f"{key}: found {repr(problem['input'])[:60]}; {message[0].lower()}{message[1:]}"
