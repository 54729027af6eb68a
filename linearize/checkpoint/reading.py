"""What every reader of files shares: one paragraph for whatever goes wrong."""

import contextlib
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linearize.errors import InputError

AGAIN = "get it anew from where it came from"
"""Advice for a damaged file; whether that was the Hub, a disk or a colleague is not known here."""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables in which launchers tell a process which of them it is ..."""
LAUNCHERS = ("ACCELERATE_", "FSDP_", "OMPI_COMM_", "PMI_", "MV2_COMM_")
"""... and how the names of accelerate's own and of MPI's begin."""
LARGEST_JSON = 256 << 20  # bytes; the largest tokenizers have a tenth of it

# What libraries advise and no verb here can do -> what it is about.
_ADVICE = {
    "ignore_mismatched_sizes": "tensors have other shapes than the configuration asks for",
    "weights_only": "it is damaged, or holds other things than tensors, and a pickle can run code",
    "trust_remote_code": "it needs code of its own, which is never run here",
}


def reason(error: BaseException) -> str:
    """What an exception says, on one line of bearable length; its name too where the text says nothing alone."""
    text = textwrap.shorten(" ".join(str(error).split()), 400, placeholder=" ...")
    text = next((meaning for advice, meaning in _ADVICE.items() if advice in str(error)), text)
    bare = isinstance(error, LookupError | ArithmeticError | AssertionError) or not text
    return f"{type(error).__name__} {text}".rstrip() if bare else text


@contextlib.contextmanager
def reading(where: object, problem: str, advice: str) -> Iterator[None]:
    """Turn what a block raises while it reads files into one InputError: ``where: problem (reason); advice``.

    Args:
        where: the file, folder or Hub id.
        problem: what it is then, for example "has no usable tokenizer".
        advice: what to do.

    Raises:
        InputError: the block raised anything else: there is no end to what readers raise for files that are missing or
            damaged (tokenizers a bare Exception, its Rust a panic that is none). An InputError passes unchanged.
    """
    try:
        yield
    except (InputError, NameError):  # the latter is a fault of ours
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{where}: {problem} ({reason(error)}); {advice}") from error


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """What sets up a process as its environment asks.

    Raises:
        InputError: it fails; names the variables that are set.
    """
    # Before: accelerate sets more of them.
    there = sorted(name for name in os.environ if name in LAUNCHED or name.startswith(LAUNCHERS))
    try:
        yield
    except (InputError, NameError):  # the latter is a fault of ours
        raise
    except Exception as error:
        if not there:
            raise
        raise InputError(
            f"{', '.join(there)}: the environment asks for processes that cannot be set up "
            f"({reason(error)}); unset what an earlier launch has left there, or let a launcher "
            "set all of it: `-- FLAGS` behind the command starts the processes"
        ) from error


def read_json(
    path: Path, advice: str = "write the folder again", problem: str = "is missing or holds no JSON object"
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        advice: what to do where it cannot be read.
        problem: what it is then.

    Raises:
        InputError: it is missing, no JSON, or holds something else than an object.
    """
    with reading(path, problem, advice):
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"its {path.stat().st_size} bytes are no such file")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"found a {type(content).__name__}")
        return content
