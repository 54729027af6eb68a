"""What a model folder is made of, read from its configuration and the headers of its weights."""

import copy
import math
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from linearize.checkpoint import fit, shards
from linearize.checkpoint.reading import AGAIN, read_json
from linearize.checkpoint.sources import Located, fetch, locate, read_config
from linearize.errors import InputError
from linearize.model.sizes import state_bytes, text_sizes

CONTEXTS = (1024, 4096, 8192, 32768, 131072)


def learned_positions(model: PreTrainedModel) -> int | None:
    """Tokens that fit a model whose positions are a learned table; None where they are computed."""
    limit = text_sizes(model.config).context
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    # OPT's table has two rows more than it has positions.
    learned = limit is not None and any(limit <= table.num_embeddings <= limit + 2 for table in tables)
    return limit if learned else None


def check_positions(model: PreTrainedModel, seq_len: int, where: str) -> None:
    """Refuse blocks that are longer than a learned table of positions.

    Args:
        model: with or without values.
        seq_len: tokens in a block.
        where: of the recipe, for the error.

    Raises:
        InputError: says which length fits.
    """
    limit = learned_positions(model)
    if limit is not None and seq_len > limit:
        raise InputError(
            f"{where}.seq_len: found {seq_len}; this model has learned positions for {limit} tokens and none beyond "
            f"them; pass --set {where}.seq_len={limit}"
        )


def cache_sizes(config: PreTrainedConfig, dtype_bytes: int = 2) -> dict[str, Any]:
    """Bytes of cache of one row, of the source and of the linearized model.

    Args:
        config: linearized or plain; a plain one gives the same numbers twice.
        dtype_bytes: bytes of one cached key or value element; 2 is what models are served in.

    Returns:
        ``dtype_bytes``; ``rollback``: bytes that recording for drafts adds; ``bytes_per_token``: growth per token
        beyond the window; ``contexts``: one row per context length; each with ``source_kv`` and ``linearized``.
    """
    config = _with_block(config)
    columns = ("source_kv", "linearized")
    sizes = {
        context: state_bytes(config, context, dtype_bytes=dtype_bytes) for context in (*CONTEXTS, CONTEXTS[-1] + 1)
    }
    last, next_one = sizes[CONTEXTS[-1]], sizes[CONTEXTS[-1] + 1]
    return {
        "dtype_bytes": dtype_bytes,
        "rollback": last["rollback"],
        "bytes_per_token": {column: next_one[column] - last[column] for column in columns},
        "contexts": [{"context": n, **{column: sizes[n][column] for column in columns}} for n in CONTEXTS],
    }


def _with_block(config: PreTrainedConfig) -> PreTrainedConfig:
    if not hasattr(config, "linearize"):
        config = copy.copy(config)
        config.linearize = {"layers": {}}  # nothing replaced
    return config


def mixers_of(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """What each layer of a linearized model attends with: layer, mixer and the mixer's settings."""
    rows = []
    for layer in range(text_sizes(config).layers):
        mixer = dict(config.linearize["layers"].get(str(layer), {"name": "softmax"}))
        rows.append({"layer": layer, "mixer": mixer.pop("name"), **mixer})
    return rows


def inspect(model: str | Path | Located) -> dict[str, Any]:
    """Describe a model from headers alone.

    Args:
        model: a converted folder, a folder of an adapter on one, or a source: folder, GGUF file or Hub id.

    Returns:
        JSON-safe: path, model_type, source (None for a plain model), parameters, new_parameters, bytes, dtypes,
        shards, layers (one entry per layer: mixer and its settings, parameters, new_parameters, bytes, cache_32k: bytes
        of its cache for one row of 32K tokens), cache (see `cache_sizes`), and for an adapter folder `adapter`.

    Raises:
        InputError: nothing is there, or it is damaged.

    Example:
        >>> inspect("runs/demo/merged")["layers"][0]["mixer"]
        'gla'
    """
    adapter = Path(model) / "adapter_config.json" if isinstance(model, str | Path) else None
    if adapter is not None and adapter.is_file():
        return _inspect_adapter(adapter)
    located = model if isinstance(model, Located) else locate(str(model))
    config = read_config(located, linearized=True)
    if located.gguf:
        tensors: dict[str, shards.Tensor] = {}
        sizes = {
            "parameters": None,
            "bytes": (located.path / located.gguf).stat().st_size,
            "dtypes": [],
            "shards": [located.gguf],
        }
    else:
        located = fetch(located)
        tensors = shards.read_folder(located.path)
        fit.check(located.path, fit.empty(config, located.path), tensors, strict=hasattr(config, "linearize"))
        sizes = shards.describe(tensors)
    block = getattr(config, "linearize", None)
    new = [tensor for tensor in tensors.values() if is_new(tensor.name)]
    return {
        "path": str(located.path),
        "model_type": config.model_type,
        "source": block["source"] if block else None,
        **sizes,
        "new_parameters": _count(new),
        "layers": _layers(_with_block(config), tensors),
        "cache": cache_sizes(config),
    }


def _inspect_adapter(file: Path) -> dict[str, Any]:
    from linearize.checkpoint.open import base_folder

    settings = read_json(file)
    name = "adapter_model.safetensors"
    if not (file.parent / name).is_file():
        raise InputError(f"{file.parent}: has adapter_config.json but no {name}; {AGAIN}")
    tensors = shards.read_header(file.parent / name)
    adapter = {key: settings.get(key) for key in ("peft_type", "r", "lora_alpha", "target_modules")}
    base = inspect(base_folder(file.parent))
    return {**base, "adapter": {**adapter, "path": str(file.parent), **shards.describe(tensors)}}


def _layers(config: PreTrainedConfig, tensors: dict[str, shards.Tensor]) -> list[dict[str, Any]]:
    cache = state_bytes(config, 32768)["per_layer"]
    by_layer: dict[int, list[shards.Tensor]] = {}
    for tensor in tensors.values():
        layer = layer_of(tensor.name)
        if layer is not None:
            by_layer.setdefault(layer, []).append(tensor)
    rows = []
    for row in mixers_of(config):
        own = by_layer.get(row["layer"], [])
        new = [tensor for tensor in own if is_new(tensor.name)]
        rows.append(
            {
                **row,
                "parameters": _count(own),
                "new_parameters": _count(new),
                "bytes": sum(tensor.size for tensor in own),
                "cache_32k": cache[row["layer"]],
            }
        )
    return rows


def layer_of(name: str) -> int | None:
    """The layer of the text model that a tensor belongs to by its name, if it belongs to one."""
    match = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}")
    # The layers of a tower beside the text model are numbered too.
    return int(match[1]) if match and not re.search("vision|visual|audio", name) else None


def is_new(name: str) -> bool:
    """Whether a tensor is one that a mixer added to the source's, by its name."""
    return ".mixer." in name


def _count(tensors: list[shards.Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)
