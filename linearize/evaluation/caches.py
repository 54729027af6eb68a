"""Caches of any model: their bytes, and how a softmax cache is made longer without reading a text."""

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from linearize.model.cache import LinearizedCacheLayer


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys, values and states that a cache holds."""

    def held(layer: Any) -> list[Tensor | None]:
        states = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
        return [getattr(layer, "keys", None), getattr(layer, "values", None), *(x for s in states for x in s.values())]

    return sum(
        layer.nbytes()
        if isinstance(layer, LinearizedCacheLayer)
        else sum(x.nbytes for x in held(layer) if x is not None)
        for layer in cache.layers
    )


def stretch(cache: Cache, context: int) -> Cache:
    """Repeat the keys and values that a softmax cache holds, until it is as long as if it had read `context` tokens.

    Args:
        cache: changed in place.
        context: in tokens.
    """
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            continue
        held = min(context, layer.sliding_window - 1) if layer.is_sliding else context  # pyright: ignore[reportAttributeAccessIssue]
        times = -(-held // layer.keys.shape[2])
        layer.keys, layer.values = (x.repeat(1, 1, times, 1)[:, :, :held] for x in (layer.keys, layer.values))
        if layer.is_sliding:
            layer.cumulative_length = context  # pyright: ignore[reportAttributeAccessIssue]
    return cache
