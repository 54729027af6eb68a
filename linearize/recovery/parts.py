"""Parts of a model, layers or heads of them, that get their source's attention back: for a while, and in a folder."""

import copy
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from linearize.checkpoint import copying, remote_code, shards
from linearize.checkpoint.describe import is_new, layer_of
from linearize.checkpoint.open import open_config
from linearize.checkpoint.reading import read_json
from linearize.model import architectures
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches
from linearize.model.mixers import Context, Geometry
from linearize.model.sizes import state_bytes

CONTEXT = 32768
"""Tokens of context at which a choice is priced."""
Part = int | tuple[int, int]
"""A layer; or a layer and one of its key/value heads, with its query heads."""


class Partly(nn.Module):
    """In the stead of a mixer: some key/value heads have it, the others their source's attention.

    Args:
        mixer: of the whole layer.
        replaced: its heads.
    """

    keeps_source_cache = True

    def __init__(self, mixer: Any, replaced: list[int]):
        super().__init__()
        self.mixer, self.replaced = mixer, replaced

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """As of a mixer: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V] -> [B, H, T, V]."""
        y = context.attend(q, k, v).unflatten(1, (k.shape[1], -1)).clone()
        y[:, self.replaced] = self.mixer(q, k, v, context).unflatten(1, (k.shape[1], -1))[:, self.replaced]
        return y.flatten(1, 2)


@contextmanager
def only(model: PreTrainedModel, parts: Collection[Part]) -> Iterator[None]:
    """Within `branches(model, "source")`: some parts have their mixer for a while.

    Args:
        model: linearized.
        parts: which.
    """
    chosen = by_layer(parts)
    modules = {m.layer_idx: m for m in linearized_modules(model) if m.layer_idx in chosen}
    mixers = {i: m.mixer for i, m in modules.items()}
    try:
        for i, heads in chosen.items():
            if heads:
                modules[i].mixer = Partly(mixers[i], heads)
        with branches(model, "all", chosen):
            yield
    finally:
        for i, m in modules.items():
            m.mixer = mixers[i]


def by_layer(parts: Collection[Part]) -> dict[int, list[int]]:
    """Layer -> its heads, both ascending; no heads where the layer is meant as a whole."""
    layers: dict[int, list[int]] = {}
    for part in parts:
        layer, heads = (part, []) if isinstance(part, int) else (part[0], [part[1]])
        layers[layer] = sorted(layers.get(layer, []) + heads)
    return dict(sorted(layers.items()))


def caches(config: PreTrainedConfig, choices: Sequence[Collection[Part]]) -> list[int]:
    """The price of each choice.

    Args:
        config: of a linearized model.
        choices: for each, the parts that are softmax again.

    Returns:
        Bytes of cache of one row of `CONTEXT` tokens.
    """
    groups = architectures.geometry(config).kv_heads
    sizes = []
    for chosen in choices:
        changed = copy.copy(config)
        layers = config.linearize["layers"]  # type: ignore[attr-defined]
        changed.linearize = {**config.linearize, "layers": _without(layers, chosen, groups)}  # type: ignore[attr-defined]
        sizes.append(state_bytes(changed, CONTEXT)["linearized"])
    return sizes


def write_without(folder: Path, work: Path, chosen: Collection[Part]) -> dict[str, str | None]:
    """Copy configuration and weights of a folder without the mixers of some layers or heads; bytes stay as they are.

    Weights of a mixer have a row per query head or per key/value head; those of chosen heads are left out.

    Args:
        folder: a linearized model.
        work: folder to write into.
        chosen: the parts that become softmax again.

    Returns:
        File name -> sha256, as for `write_manifest`.
    """
    config = remote_code.without_foreign(read_json(folder / "config.json"))
    block, geometry = config["linearize"], architectures.geometry(open_config(folder))
    block["layers"] = _without(block["layers"], chosen, geometry.kv_heads)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors, heads = shards.read_folder(folder), by_layer(chosen)
    kept: dict[str, tuple[shards.Tensor, Callable[[BinaryIO], None]]] = {}
    for name, tensor in tensors.items():
        layer = layer_of(name)
        if not is_new(name) or layer not in heads:
            kept[name] = tensor, shards.cast_tensor(tensor, tensor, lambda count: None)
        elif str(layer) in block["layers"]:
            with safe_open(tensor.file, "pt") as file:
                kept[name] = _without_rows(tensor, file.get_tensor(name), heads[layer], geometry)
    hashes: dict[str, str | None] = {}
    for file in dict.fromkeys(tensor.file for tensor, _ in kept.values()):
        own = [pair for pair in kept.values() if pair[0].file == file]
        target = work / file.name
        if [tensor for tensor, _ in own] == [tensor for tensor in tensors.values() if tensor.file == file]:
            hashes[file.name] = copying.copy(file, target)
        else:
            shards.write_shard(target, own)
            hashes[file.name] = copying.sha256(target)
    if (folder / shards.INDEX).is_file():
        shards.write_index(work, {name: tensor for name, (tensor, _) in kept.items()})
    return hashes


def _without(layers: dict[str, Any], chosen: Collection[Part], groups: int) -> dict[str, Any]:
    """The layers of a configuration's `linearize` block when these parts, of so many heads each, are softmax again."""
    left = dict(layers)
    for i, heads in by_layer(chosen).items():
        values = left.pop(str(i))
        if heads and len(heads) < groups:
            left[str(i)] = {**values, "softmax_heads": heads}
    return {i: left[i] for i in layers if i in left}


def _without_rows(
    tensor: shards.Tensor, x: Tensor, heads: list[int], geometry: Geometry
) -> tuple[shards.Tensor, Callable[[BinaryIO], None]]:
    """A mixer's weight x without the rows of some key/value heads, and what writes it."""
    left = [i for i in range(geometry.kv_heads) if i not in heads]
    rows = x.unflatten(0, (geometry.kv_heads, -1))[left].flatten(0, 1)
    content = rows.contiguous().view(torch.uint8).numpy().tobytes()

    def write(file: BinaryIO) -> None:
        file.write(content)

    return replace(tensor, shape=tuple(rows.shape), size=len(content)), write
