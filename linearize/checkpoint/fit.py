"""Whether weights are those that a configuration asks for: every name and shape, by headers alone. One check for all
that reads or publishes a folder, so that none lets through what another would refuse.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from linearize.checkpoint import shards
from linearize.checkpoint.reading import AGAIN, reading
from linearize.checkpoint.shards import Tensor
from linearize.errors import InputError
from linearize.model.transformers_api import conversion_rules

# transformers leaves these out for all architectures: constants that earlier versions stored.
_IGNORED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
# Constants too, which transformers of today lists for some architectures and reports as unexpected for others.
_CONSTANTS = (r"\.masked_bias$", r"\.inv_freq$", r"(rotary_emb|rope)\.(cos|sin)_cached$", r"\.alibi$")


def empty(config: PreTrainedConfig, where: object) -> PreTrainedModel:
    """The causal language model of a configuration without values (meta device): its names and shapes.

    Raises:
        InputError: transformers has none of this type, or cannot make one of these sizes.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"{where}: transformers has no causal language model of type {config.model_type!r}; give a decoder-only "
            "text model"
        )
    problem = f"transformers can make no {config.model_type} of this configuration"
    with reading(where, problem, f"config.json is damaged: {AGAIN}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check(where: object, model: PreTrainedModel, tensors: Mapping[str, Tensor], strict: bool = True) -> list[Tensor]:
    """Check that tensors are those that a model asks for. No values are read.

    Args:
        where: the folder that they are in.
        model: from `empty`.
        tensors: headers of its weights.
        strict: whether tensors that nothing asks for are an error.

    Returns:
        Constants that are stored among the weights and that nothing asks for.

    Raises:
        InputError: names missing and unexpected tensors, and shapes that differ.
    """
    present, unexpected, mismatched = _compared(model, tensors)
    tied = model.all_tied_weights_keys
    present |= {name for pair in tied.items() if present.intersection(pair) for name in pair}
    missing = [name for name in model.state_dict() if name not in present]
    constants = [tensor for tensor in unexpected if _is_constant(tensor)]
    unexpected = [tensor for tensor in unexpected if tensor not in constants] if strict else []
    problems = [f"missing: {shards.names(missing)}"] if missing else []
    if unexpected:
        where_from = shards.names(f"{tensor.name} in {tensor.file.name}" for tensor in unexpected)
        problems.append(f"unexpected: {where_from}")
    if mismatched:
        problems.append(f"of another shape: {shards.names(mismatched)}")
    if problems:
        raise InputError(
            f"{where}: the weights do not fit config.json ({model.config.model_type}); {'; '.join(problems)}. "
            f"Configuration and weights must come from the same model: {AGAIN}, both of them"
        )
    return constants


def _compared(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> tuple[set[str], list[Tensor], list[str]]:
    """Names that are there, tensors that nothing asks for, and sentences about shapes that differ."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # transformers renames, joins and splits tensors of some architectures as it loads them: so do we with the names.
    linearized: Any = model
    rules = conversion_rules(type(model).__name__, linearized.source_class) if hasattr(model, "source_class") else None
    with rules or nullcontext():
        transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    ignored = (*_IGNORED, *(model._keys_to_ignore_on_load_unexpected or ()))
    present, unexpected, mismatched = set(), [], []
    for tensor in tensors.values():
        name, pattern = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, expected)
        present.add(name)
        if name not in expected:
            if not _any(ignored, tensor.name):
                unexpected.append(tensor)
        elif pattern is None and tensor.shape != expected[name]:
            mismatched.append(f"{name} is {list(tensor.shape)}, the configuration makes it {list(expected[name])}")
    return present, unexpected, mismatched


def _is_constant(tensor: Tensor) -> bool:
    """Whether it is a buffer that is the same in every model: a causal mask, angles of RoPE, slopes of ALiBi."""
    mask = len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.name.endswith((".bias", ".mask"))
    return mask or _any(_CONSTANTS, tensor.name)


def _any(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
