"""Weights in 8 or 4 bits, while a model is in memory: torchao's int8 and int4, bitsandbytes' nf4.

A loaded model is changed in place, so that folders, GGUF files and adapters on a model are quantised alike: a source
must lose what its student loses. Embeddings, the output layer and the mixers' own weights stay as they are, as in
transformers' own configurations of both packages; so does the cache.
"""

import math
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from linearize.errors import InputError, suggest

PACKAGES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
"""Name -> who does it: int8 per output channel; int4 in groups of `GROUP` inputs, or as
many as divide them; nf4 in blocks of 64 (QLoRA, arXiv
2305.14314)."""
GROUP, BLOCK = 32, 64


def check(name: str | None, where: str = "--quantize") -> None:
    """Refuse a name that is unknown, or whose package is not installed.

    Args:
        name: of `PACKAGES`; None asks for nothing.
        where: at the start of the error.

    Raises:
        InputError: it is neither.
    """
    if name is None:
        return
    if name not in PACKAGES:
        raise InputError(f"{where}: found {name!r}. {suggest(str(name), PACKAGES)}")
    if find_spec(PACKAGES[name]) is None:
        raise InputError(
            f"{where} {name}: needs {PACKAGES[name]}, which is not installed: pip install 'linearize[quantize]'"
        )


def quantize_(model: Any, name: str | None) -> Any:
    """Quantise the weights of a model in place.

    Args:
        model: plain or linearized, also with adapters on it, which stay as they are.
        name: int8, int4 or nf4; None changes nothing.

    Returns:
        The same object.

    Raises:
        InputError: as `check`; or no weight is left that could be quantised.
    """
    check(name)
    if name is None:
        return model
    layers = linear_layers(model)
    if not layers:
        raise InputError(f"--quantize {name}: this model keeps no weights in linear layers, which alone are quantised")
    if name == "nf4":
        if odd := [path for path, layer in layers.items() if layer.in_features % BLOCK]:
            # On a CPU bitsandbytes packs such layers wrongly, and says nothing.
            raise InputError(
                f"--quantize nf4: {odd[0]} has {layers[odd[0]].in_features} inputs, no multiple of {BLOCK}; take int8"
            )
        for path, layer in layers.items():
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, _nf4(layer))
        return model
    torchao: Any = import_module("torchao.quantization")  # both packages are optional
    config: Any = torchao.Int8WeightOnlyConfig()
    if name == "int4":
        group = math.gcd(GROUP, *(layer.in_features for layer in layers.values()))
        if group < 8:
            raise InputError(
                f"--quantize int4: layers of this model have inputs in no groups of {GROUP}; take int8 or nf4"
            )
        int4 = getattr(torch, "int4")  # noqa: B009  (torch does not declare it)
        config = torchao.IntxWeightOnlyConfig(weight_dtype=int4, granularity=torchao.PerGroup(group))
    chosen = {id(layer) for layer in layers.values()}
    torchao.quantize_(model, config, filter_fn=lambda module, _: id(module) in chosen)
    return model


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of a model by their paths, without its output layer, its mixers and adapters on it."""
    output = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not output and not {"mixer", "lora_A", "lora_B"} & {*path.split(".")}
    }


def _nf4(layer: nn.Linear) -> Any:
    packed: Any = import_module("bitsandbytes.nn")
    made = packed.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    made.weight = packed.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.bias = layer.bias
    return made.to(layer.weight.device)  # which packs them


def held_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are held, each once; of packed ones with their scales."""
    seen: dict[int, int] = {}
    for weight in [*model.parameters(), *model.buffers()]:
        parts = [weight.data]
        if hasattr(weight, "__tensor_flatten__") and type(weight) not in (nn.Parameter, torch.Tensor):
            parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        if (state := getattr(weight, "quant_state", None)) is not None:
            parts += [state.absmax, state.code]
        seen |= {part.data_ptr(): part.nbytes for part in parts}
    return sum(seen.values())
