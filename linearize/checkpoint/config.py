"""The one reader of configurations, config.json or the header of a GGUF file, with sizes that the weights bear out.

transformers makes what a configuration asks for, module by module: a billion layers would be made without end. So the
sizes are compared with the headers of the weights, where there are any, before anything is made of them.
"""

import copy
import math
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, __version__

from linearize.checkpoint import gguf_header, links, remote_code, shards
from linearize.checkpoint.reading import read_json, reading
from linearize.errors import InputError
from linearize.formats import quoted

# Sizes that count modules, by their names in any architecture, and other sizes.
_LAYERS = re.compile(r"(^|_)layers?$|(^|_)(blocks?|depths?|stages?)$|block_count$")
_PARTS = re.compile(r"experts?$|heads?$|expert_count$|head_count(_kv)?$|heads_kv$|groups?$")
_SIZES = re.compile(r"(size|dim|dims|width|embd|inner|hidden|model|positions?|rank|channels|embeddings|length|ctx)$")
MOST_LAYERS, MOST_PARTS, MOST = 1024, 1 << 16, 1 << 24
"""Where there are no weights to compare with: more than any model has."""
_PROBLEM = f"transformers {__version__} cannot read this configuration"
_ADVICE = "repair the file, or install a version of transformers that knows the architecture"
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def read(folder: Path, gguf: str | None = None) -> PreTrainedConfig:
    """The configuration of a folder, or of a GGUF file in it; no weights are read but their headers.

    Args:
        folder: holds it.
        gguf: name of the GGUF file; None for config.json.

    Returns:
        A configuration of the caller's own. An ``auto_map`` that names others' code is left out.

    Raises:
        InputError: it is missing, unreadable, of an architecture that transformers does not know, or asks for more
            than the weights beside it hold.
    """
    file = folder / (gguf or "config.json")
    if gguf is None:
        links.check(folder)
    if not file.is_file():
        absent = "does not exist, so it has no configuration that transformers can read; give a folder with a model"
        raise InputError(shards.adapters_alone(folder) or f"{file}: {absent}")
    with reading(file, _PROBLEM, _ADVICE):
        # A GGUF header holds the whole vocabulary and takes seconds to parse: once per file is enough.
        stamp = os.stat(file)
        return copy.deepcopy(_read(folder, gguf, (stamp.st_mtime_ns, stamp.st_size, stamp.st_ino, _shapes_key(folder))))


@lru_cache(maxsize=4)
def _read(folder: Path, gguf: str | None, stamp: tuple[Any, ...]) -> PreTrainedConfig:
    file = folder / (gguf or "config.json")
    if gguf:
        values, shapes = gguf_header.read(file)
        values = {key: value for key, value in values.items() if not key.startswith(("tokenizer.", "general."))}
        _check_sizes(file, values, list(shapes.values()))
        options: dict[str, Any] = {"gguf_file": gguf}
    else:
        values = read_json(file, _ADVICE, _PROBLEM)
        if values.get("model_type") is None:
            raise InputError(
                f"{file}: names no model_type, so the architecture is unknown; add it from the model's page"
            )
        _check_sizes(file, values, _shapes(folder))
        kernels = [key for key in _ATTENTION if "/" in str(values.get(key))]
        if kernels:
            raise InputError(
                f"{file}: {kernels[0]} is {quoted(values[kernels[0]])}, code on the Hub, which is never run here; take "
                "the key out"
            )
        options = {}
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    if getattr(config, "auto_map", None) not in (None, remote_code.AUTO_MAP):
        del config.__dict__["auto_map"]
    if config.model_type == "linearized":
        _check_block(file, config.linearize, config.get_text_config().num_hidden_layers)
    return config


def _weights(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("adapter_")]


def _shapes_key(folder: Path) -> tuple[Any, ...]:
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _weights(folder))


def _shapes(folder: Path) -> list[tuple[int, ...]]:
    """Of all tensors in a folder; none where a file of it is damaged or missing, which is told where it is read."""
    try:
        return [tensor.shape for file in _weights(folder) for tensor in shards.read_header(file).values()]
    except (InputError, OSError):
        return []


def _check_sizes(file: Path, values: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    """Refuse a configuration that asks for more layers, experts, heads or rows than its weights can have.

    The floors are for parts that a folder need not have, such as a tower for images.
    """
    longest = max((max(shape, default=1) for shape in shapes), default=0)
    for key, value in _numbers(values):
        if _LAYERS.search(key):
            most = min(MOST_LAYERS, max(len(shapes), 128)) if shapes else MOST_LAYERS
        elif _PARTS.search(key):
            most = min(MOST_PARTS, max(longest, 1024)) if shapes else MOST_PARTS
        elif _SIZES.search(key):
            most = MOST
        else:
            continue
        least = 1 if key in _DEPTH else 0 if _LAYERS.search(key) else -math.inf
        if not least <= value <= most:
            held = f", and its weights are {len(shapes)} tensors, none longer than {longest:,}" if shapes else ""
            raise InputError(
                f"{file}: {key} is {value:,}{held}; possible are at most {most:,}, and at least one layer; "
                "configuration and weights must come from the same model"
            )


def _check_block(file: Path, block: Any, layers: int) -> None:
    """Refuse a `linearize` block that is not made as `linearize_` makes it; mixers are checked where they are made."""
    source, chosen = block["source"], block["layers"]
    texts = [source["model_type"], *(source.get(key) for key in ("path", "gguf", "revision", "package"))]
    texts.append(source["id"])
    numbers = [int(layer) for layer in chosen] if all(str(layer).isdecimal() for layer in chosen) else [-1]
    if not all(text is None or isinstance(text, str) for text in texts) or not set(numbers) <= set(range(layers)):
        raise InputError(
            f"{file}: its `linearize` block is damaged: source must be texts, layers numbers from 0 to {layers - 1}; "
            "convert the source again"
        )


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers in nested values, with the nearest key above each; not those of the `linearize` block."""
    if isinstance(values, dict):
        pairs: Iterable[tuple[str, Any]] = ((str(k), v) for k, v in values.items() if k != "linearize")
    elif isinstance(values, list):
        pairs = ((key, value) for value in values)
    else:
        if isinstance(values, int | float) and not isinstance(values, bool):
            yield key, values
        return
    for name, value in pairs:
        yield from _numbers(value, name)
