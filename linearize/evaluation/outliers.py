"""Outliers: what quantisation loses most by, layer by layer, beside the source's attention in the same weights.

activation: the largest value of a layer's input, over its root mean square (a tensor with one scale has that much less
resolution for the rest). state: the same of the memory after the text (Mamba-PTQ, arXiv 2407.12397). Super weights
(arXiv 2411.07191): a single weight w[row, column] of the last matrix of a feed-forward block that makes one channel
huge; seen where a block's input and output both peak at least SUPER times above their root mean square.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from linearize.checkpoint.open import load
from linearize.errors import InputError
from linearize.evaluation.perplexity import cut
from linearize.evaluation.suite import read_text
from linearize.formats import aligned
from linearize.model import architectures
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches
from linearize.model.cache import LinearizedCacheLayer
from linearize.model.transformers_api import CACHE

SUPER = 50.0
TEXT, TOKENS = "wikitext2_valid", 1024
DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2")
"""Names of the last matrix of a feed-forward block."""


def outliers(folder: str | Path) -> list[dict[str, Any]]:
    """Look for outliers while a model reads an embedded text.

    Args:
        folder: linearized folder, adapter folder or Hub id.

    Returns:
        JSON-safe, for each layer: ``layer``, ``activation``, ``state`` (None without a memory), ``super_weights`` (row,
        column and by how much the output peaks), and ``source`` with the same of the source's attention.

    Raises:
        InputError: the folder cannot be opened, or is not linearized.
    """
    model, tokenizer = load(folder)
    if not linearized_modules(model):
        raise InputError(f"{folder}: is a plain {model.config.model_type}; outliers are compared in linearized models")
    ids = cut(read_text(TEXT)[0], tokenizer, TOKENS, 1).to(model.device)
    own = _measured(model, ids)
    with branches(model, "source"):
        source = _measured(model, ids)
    return [{"layer": i, **own[i], "source": {k: v for k, v in source[i].items() if k != "state"}} for i in sorted(own)]


@torch.no_grad()
def _measured(model: Any, ids: Tensor) -> dict[int, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    hooks = []
    for index, path in architectures.attention_layers(model).items():
        block = path.rpartition(".")[0]
        rows[index] = {"activation": 0.0, "state": None, "super_weights": []}
        hooks.append(model.get_submodule(block).register_forward_pre_hook(_input(rows[index]), with_kwargs=True))
        for name, module in model.get_submodule(block).named_modules():
            if (
                isinstance(module, nn.Linear)
                and name.rpartition(".")[2] in DOWN
                and not f"{block}.{name}".startswith(path)
            ):
                hooks.append(module.register_forward_hook(_down(rows[index])))
    try:
        cache = DynamicCache(config=model.config)
        model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearizedCacheLayer) and layer.state:
            mixer = next(m.mixer for m in linearized_modules(model) if m.layer_idx == index)
            rows[index]["state"] = peak(mixer.content(layer.state))
    return rows


def peak(x: Tensor) -> float:
    """The largest magnitude over the root mean square."""
    x = x.float()
    return float(x.abs().max() / x.square().mean().sqrt().clamp(min=1e-30))


def _input(row: dict[str, Any]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        row["activation"] = peak(args[0] if args else kwargs["hidden_states"])

    return hook


def _down(row: dict[str, Any]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = args[0].flatten(0, -2), output.flatten(0, -2)
        if min(peak(x), peak(y)) >= SUPER:
            column, line = int(x.abs().amax(0).argmax()), int(y.abs().amax(0).argmax())
            row["super_weights"].append({"row": line, "column": column, "peak": peak(y)})

    return hook


def text(rows: list[dict[str, Any]]) -> str:
    """What `outliers` returned, for a terminal."""
    table: list[tuple[str, ...]] = [
        ("layer", "activation", "source's", "state", "super weights (row, column)", "source's")
    ]
    for row in rows:
        weights = (
            ", ".join(f"({w['row']}, {w['column']})" for w in each["super_weights"]) or "-"
            for each in (row, row["source"])
        )
        state = "-" if row["state"] is None else f"{row['state']:.1f}"
        shown = f"{row['activation']:.1f}", f"{row['source']['activation']:.1f}", state
        table.append((str(row["layer"]), *shown, *weights))
    return "\n".join(["largest value over root mean square", *aligned(table)])
