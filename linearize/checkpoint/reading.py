"""What every reader of files shares: one paragraph for whatever goes wrong."""

import contextlib
import json
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from yaml import YAMLError

from linearize.errors import InputError

# What json, safetensors, tokenizers, transformers and huggingface_hub raise for files that are missing or damaged.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, ImportError)
_UNREADABLE += (zlib.error, UnpicklingError, SafetensorError, StrictDataclassError, YAMLError)


def reason(error: BaseException) -> str:
    """What an exception says, on one line of bearable length; its name too where the text says nothing alone."""
    text = textwrap.shorten(" ".join(str(error).split()), 400, placeholder=" ...")
    return f"{type(error).__name__} {text}".rstrip() if isinstance(error, LookupError) or not text else text


@contextlib.contextmanager
def reading(where: object, problem: str, advice: str) -> Iterator[None]:
    """Turn what a block raises while it reads files into one InputError: ``where: problem (reason); advice``.

    Args:
        where: the file, folder or Hub id.
        problem: what it is then, for example "has no usable tokenizer".
        advice: what to do.

    Raises:
        InputError: the block raised what readers raise for missing or damaged files; an InputError passes unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{where}: {problem} ({reason(error)}); {advice}") from error


def read_json(path: Path, advice: str = "write the folder again") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        advice: what to do where it cannot be read.

    Raises:
        InputError: it is missing, no JSON, or holds something else than an object.
    """
    with reading(path, "is missing or holds no JSON object", advice):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"found a {type(content).__name__}")
        return content
