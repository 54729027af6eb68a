"""Sizes of a model and bytes of its cache, by arithmetic from its configuration."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from ..errors import InputError
from . import architectures, softmax_heads
from .cache import ROLLBACK
from .mixers import MIXERS, Mixer, read_config


class TextSizes(NamedTuple):
    """Sizes of the text model; `context` is None where the architecture sets no limit."""

    layers: int
    vocabulary: int
    hidden: int
    context: int | None


def text_sizes(config: PreTrainedConfig) -> TextSizes:
    """The sizes of a model's text part, under whatever names its architecture has for them.

    Args:
        config: plain, composite (text beside images) or linearized.

    Returns:
        Number of layers, tokens of the vocabulary, width of the hidden states, longest context in tokens.

    Raises:
        InputError: the architecture has none of the usual names for one of them.
    """
    text = config.get_text_config()
    try:
        context = getattr(text, "max_position_embeddings", None)
        return TextSizes(text.num_hidden_layers, text.vocab_size, text.hidden_size, context)
    except AttributeError as error:
        raise InputError(
            f"{config.model_type}: its configuration states no {error.name}; only decoder-only text models have all of "
            "num_hidden_layers, vocab_size and hidden_size"
        ) from error


def state_bytes(config: PreTrainedConfig, context: int, batch: int = 1, dtype_bytes: int = 2) -> dict[str, Any]:
    """Bytes of cache after `context` tokens, by arithmetic from a linearized configuration; recurrent layers of the
    source itself are left out.

    Args:
        config: a configuration with a `linearize` block.
        context: tokens per row.
        batch: rows.
        dtype_bytes: bytes per cached key or value element (the state itself is fp32).

    Returns:
        source_kv: bytes of the source's key/value cache; linearized: bytes of this model's; per_layer: the latter by
            layer; rollback: bytes that come to it while past tokens are recorded, to be taken back (drafts).
    """
    per_layer = []
    total = rollback = 0
    g = architectures.geometry(config)
    for index in range(config.get_text_config().num_hidden_layers):
        reach = architectures.reach(config, index)
        kept = context if reach is None else min(context, reach)
        grown = batch * kept * g.kv_heads * (g.key_width + g.value_width) * dtype_bytes
        total += grown
        values = config.linearize["layers"].get(str(index))
        if values is None or MIXERS[values["name"]].keeps_source_cache:
            per_layer.append(grown)
            continue
        config_of_layer = read_config(values)
        with torch.device("meta"):
            rest = softmax_heads.others(g, config_of_layer.softmax_heads)
            mixer = MIXERS[values["name"]](config_of_layer, rest)
            own = mixer.state_bytes(batch, dtype_bytes)
        rollback += batch * rollback_bytes(mixer, dtype_bytes)
        per_layer.append(own + grown * len(config_of_layer.softmax_heads) // g.kv_heads)
    return {"source_kv": total, "linearized": sum(per_layer), "per_layer": per_layer, "rollback": rollback}


def rollback_bytes(mixer: Mixer, dtype_bytes: int) -> int:
    """Bytes of one row and layer that recording adds: the slots, a mark of each, and two counts; 0 where a layer cannot
    take tokens back.

    Args:
        mixer: of the layer.
        dtype_bytes: of an element of the slots.
    """
    heads, width = mixer.token_shape
    return ROLLBACK * (heads * width * dtype_bytes + 1) + 2 * torch.int64.itemsize if mixer.late else 0
