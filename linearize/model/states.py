"""What a cache holds, taken out as tensors and facts and put back: to copy it, to save it, to join texts in a batch.

Layers of all kinds that a linearized model's dynamic cache has: linearized ones and, in hybrids, transformers' own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from ..errors import InputError
from .attention import linearized_modules
from .cache import LinearizedCacheLayer
from .transformers_api import DYNAMIC_LAYERS

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (LinearizedCacheLayer, *DYNAMIC_LAYERS)}
_MADE_AGAIN = {"dtype", "device", "beside", "stack", "waiting", "_sliding_window_tensor"}
"""Attributes of a layer that follow from its others."""
_POSITIONS = {"_length", "cumulative_length"}
"""Positions that a layer has seen: in a batch those of the longest row."""


@dataclass
class Packed:
    """A cache taken apart.

    Attributes:
        layers: of each layer its kind, and what it holds beside tensors; JSON-safe.
        tensors: by index of the layer and name, such as `0.tensors.tokens` and `1.keys`; [B, ...] each.
    """

    layers: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def pack(cache: Cache) -> Packed:
    """Take a cache apart; the tensors are those of the cache, not copies.

    Raises:
        InputError: it has a layer of a kind that cannot be copied, such as a static one.
    """
    packed = Packed([], {})
    for index, layer in enumerate(cache.layers):
        kind = type(layer).__name__
        if _KINDS.get(kind) is not type(layer) or getattr(layer, "static", False):
            raise InputError(
                f"layer {index} of this cache is a {'static one' if kind in _KINDS else kind}, which has no state that "
                "can be kept; decode with a dynamic cache (transformers' default)"
            )
        facts: dict[str, Any] = {"kind": kind}
        for name, value in vars(layer).items():
            if name in _MADE_AGAIN:
                continue
            if isinstance(value, dict):
                packed.tensors |= {f"{index}.{name}.{k}": x for k, x in value.items() if isinstance(x, Tensor)}
                facts[name] = {str(k): None if isinstance(x, Tensor) else x for k, x in value.items()}
            elif isinstance(value, Tensor):
                packed.tensors[f"{index}.{name}"] = value
            else:
                facts[name] = value
        packed.layers.append(facts)
    return packed


def unpack(packed: Packed, device: Callable[[int], torch.device] | None = None) -> DynamicCache:
    """A cache of what `pack` took out of one.

    Args:
        packed: its tensors are taken as they are.
        device: of each layer; None leaves the tensors where they are.

    Raises:
        ValueError: it holds something that no layer has.
    """
    cache = DynamicCache()
    for index, facts in enumerate(packed.layers):
        layer = _empty(facts)
        prefix = f"{index}."
        own = {name.removeprefix(prefix): x for name, x in packed.tensors.items() if name.startswith(prefix)}
        if device is not None:
            own = {name: x.to(device(index)) for name, x in own.items()}
        for name, value in facts.items():
            if name == "kind":
                continue
            if name not in vars(layer) and name != "state_names":
                raise ValueError(f"layer {index} has no {name}")
            if isinstance(value, dict):
                value = {int(k) if k.isdigit() else k: own.get(f"{name}.{k}", each) for k, each in value.items()}
            setattr(layer, name, value)
        for name, x in own.items():
            if "." not in name:
                setattr(layer, name, x)
        reference = next((x for x in own.values() if x.is_floating_point()), None)
        if reference is not None:
            layer.dtype, layer.device = reference.dtype, reference.device
        cache.layers.append(layer)
    # attention.py refuses to go on from such a cache without a mask and positions.
    cache.uneven = any(  # pyright: ignore[reportAttributeAccessIssue]
        bool((layer.tensors["count"] != layer.get_seq_length()).any()) for layer in _linearized(cache)
    )
    return cache


def _empty(facts: dict[str, Any]) -> Any:
    kind = _KINDS[facts["kind"]]
    if kind is LinearizedCacheLayer:
        return kind(facts["window"], facts["sinks"], late=facts["late"])
    taken = {"sliding_window": "sliding_window", "number_of_states": "number_of_states"}
    return kind(**{name: facts[key] for name, key in taken.items() if key in facts})


def _linearized(cache: Cache) -> list[LinearizedCacheLayer]:
    return [layer for layer in cache.layers if isinstance(layer, LinearizedCacheLayer) and layer.is_initialized]


def copied(cache: Cache) -> DynamicCache:
    """A cache of the same content that shares no memory with this one."""
    packed = pack(cache)
    return unpack(Packed(packed.layers, {name: x.clone() for name, x in packed.tensors.items()}))


def held_bytes(cache: Cache) -> int:
    """Bytes of all tensors of a cache."""
    return sum(x.nbytes for x in pack(cache).tensors.values())


def check(cache: Cache, model: nn.Module) -> None:
    """Check that a cache of one row without padding is one that this model has filled.

    Args:
        cache: of any kind.
        model: linearized.

    Raises:
        ValueError: says what does not fit.
    """
    most = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    if len(cache.layers) > most:
        raise ValueError(f"it has {len(cache.layers)} layers, the model {most}")
    for module in linearized_modules(model):
        mixer, index = module.mixer, module.layer_idx
        if mixer.keeps_source_cache:
            continue
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if not isinstance(layer, LinearizedCacheLayer) or not layer.is_initialized:
            raise ValueError(f"layer {index} is none of a linearized layer")
        if (layer.window, layer.sinks, layer.late) != (mixer.window, mixer.sinks, mixer.late):
            raise ValueError(f"layer {index} has window {layer.window} and {layer.sinks} sinks")
        heads, width = mixer.token_shape
        states = mixer.stored_state(1, torch.device("meta"))
        wanted = {"tokens": (1, heads, layer.slots, width), "count": (1,)}
        wanted |= {f"state_{number}": tuple(x.shape) for number, x in enumerate(states)}
        wanted |= dict.fromkeys(("settled", "certain"), (1,)) if layer.rollback else {}
        wanted |= {"recent": (1, layer.rollback)} if layer.rollback else {}
        if {name: tuple(x.shape) for name, x in layer.tensors.items()} != wanted:
            raise ValueError(f"layer {index} has tensors of other shapes")
        if any(layer.tensors[f"state_{number}"].dtype != x.dtype for number, x in enumerate(states)):
            raise ValueError(f"layer {index} keeps its state in another dtype than {mixer.config.state_dtype}")
        if layer.state_names != [name for name in wanted if name.startswith("state_")]:
            raise ValueError(f"layer {index} names other states")
        count, grown = int(layer.tensors["count"]), layer.grown
        if count != layer.get_seq_length() or not 0 <= layer.pending() <= layer.rollback:
            raise ValueError(f"layer {index} has {count} tokens in {layer.get_seq_length()} positions")
        if bool(module.softmax_heads) != (grown is not None) or grown is not None and grown.shape[2] < count:
            raise ValueError(f"layer {index} lacks tokens of heads that stay softmax")
    length = int(cache.get_seq_length())
    for index, layer in enumerate(cache.layers):
        keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
        if isinstance(layer, LinearizedCacheLayer) or not getattr(layer, "is_initialized", False):
            continue
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"layer {index} lacks keys and values of one shape")
        most = getattr(layer, "sliding_window", length + 1) - 1
        if layer.get_seq_length() != length or keys.shape[0] != 1 or keys.shape[2] < min(length, most):
            raise ValueError(f"layer {index} has keys of {keys.shape[2]} tokens, of {length}")


def stack_states(caches: Sequence[Cache]) -> DynamicCache:
    """Join caches of different texts into one batch; they stay as they are.

    In the batch each text is as if it were padded in front to the length of the longest, so the next tokens need an
    `attention_mask` with 0 there, and `position_ids` that count each row's own tokens; `generate` makes these from the
    mask. Layers and heads that stay softmax are joined too: with padding, as long as the longest.

    Args:
        caches: of one model, one row or several each.

    Raises:
        InputError: there are none, they are of different models, or of a kind that cannot be copied.

    Example:
        >>> model, _ = linearize.load("runs/demo/merged")
        >>> caches = [model(torch.tensor([[*range(3, last)]])).past_key_values for last in (9, 30)]
        >>> first, second = linearize.split_states(linearize.stack_states(caches))
    """
    if not caches:
        raise InputError("stack_states: there are no caches; give at least one")
    own = [copied(cache) for cache in caches]
    if any(getattr(layer, "record_past", False) for cache in own for layer in cache.layers):
        for cache in own:
            cache.activate_past_recording()
            cache.crop(0)
    packed = [pack(cache) for cache in own]
    layers, names = packed[0].layers, packed[0].tensors.keys()
    positions = {(index, name) for index, facts in enumerate(layers) for name in facts if name in _POSITIONS}
    apart = [[{k: v for k, v in facts.items() if k not in _POSITIONS} for facts in each.layers] for each in packed]
    longest = [dict(facts) for facts in layers]
    tensors = {}
    try:
        if any(facts != apart[0] for facts in apart) or any(each.tensors.keys() != names for each in packed):
            raise ValueError("their layers differ")
        for index, name in positions:
            longest[index][name] = max(each.layers[index][name] for each in packed)
        for name in names:
            tensors[name] = _joined(name.rpartition(".")[2], [each.tensors[name] for each in packed])
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"stack_states: these caches are not of one model ({error}); stack those that one model has filled"
        ) from error
    return unpack(Packed(longest, tensors))


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """Tensors [B, ...] along the batch; of those that grow, the shorter are padded where no token of theirs lies."""
    if name in ("keys", "values", "grown"):
        most = max(x.shape[2] for x in parts)
        room = [(most - x.shape[2], 0) if name != "grown" else (0, most - x.shape[2]) for x in parts]
        parts = [F.pad(x, (0, 0, *each)) for x, each in zip(parts, room, strict=True)]
    if len({x.dtype for x in parts}) > 1:
        raise ValueError("their dtypes differ")
    return torch.cat(parts)


def split_states(cache: Cache, lengths: Sequence[int] | None = None) -> list[DynamicCache]:
    """Take a batch apart: a cache per row, without padding; the batch stays as it is.

    Args:
        cache: of a batch whose padding, if any, stands in front of each row's text, as `generate` and `stack_states`
            have it.
        lengths: tokens of each row; None: as the linearized layers count them.

    Raises:
        InputError: nothing counts the tokens of a row, or it is of a kind that cannot be copied.
    """
    packed, counting = pack(cache), _linearized(cache)
    if counting:
        counted = counting[0].tensors["count"].tolist()
        if lengths is not None and list(lengths) != counted:
            raise InputError(f"split_states: lengths are {list(lengths)}; the cache has counted {counted}")
        lengths = counted
    if lengths is None:
        raise InputError(
            "split_states: no layer of this cache counts the tokens of a row; pass lengths, one number per row"
        )
    rows = []
    for row, length in enumerate(lengths):
        tensors = {}
        for name, x in packed.tensors.items():
            x, kind = x[row : row + 1], name.rpartition(".")[2]
            if kind in ("keys", "values"):
                x = x[:, :, max(x.shape[2] - length, 0) :]
            tensors[name] = (x[:, :, :length] if kind == "grown" else x).clone()
        layers = [facts | dict.fromkeys(_POSITIONS & facts.keys(), length) for facts in packed.layers]
        rows.append(unpack(Packed(layers, tensors)))
    return rows
