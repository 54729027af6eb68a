"""What every reader of a folder shares: one paragraph for whatever goes wrong, and models with all their weights.

Importing this module imports neither torch nor transformers.
"""

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from linearize.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What json, safetensors, tokenizers, transformers and huggingface_hub raise for files that are missing or damaged.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, ImportError)
_UNREADABLE += (UnpicklingError, SafetensorError, StrictDataclassError)


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


def read_model(folder: Path, dtype: Any = "auto", **options: Any) -> "PreTrainedModel":
    """A causal language model from a folder, on the CPU; every weight that it needs must be there.

    Args:
        folder: with config.json and weights, or with the GGUF file that the options name.
        dtype: torch dtype or its name; ``auto`` is what the folder holds.
        options: of transformers' `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: a shard is missing or damaged, or configuration and weights do not fit each other; says which.
    """
    from transformers import AutoModelForCausalLM

    from linearize.checkpoint import shards

    if "gguf_file" not in options and (any(folder.glob("*.safetensors")) or not shards.pickles(folder)):
        shards.read_folder(folder)  # names the shard or tensor that is damaged, before anything is loaded
    with reading(folder, "cannot be opened as a language model", "give a folder that linearize or transformers wrote"):
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    model, report = opened
    absent = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if absent:
        raise InputError(
            f"{folder}: its weights lack {shards.names(absent)}, or hold them in another shape than config.json asks "
            "for; write or download the folder again"
        )
    return model.eval()
