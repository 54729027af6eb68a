"""Open the folders that the stages wrote."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearize.errors import InputError
from linearize.model.attention import linearized_modules


def open_model(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The converted model in a folder, or the one that the adapters in it were trained on.

    Raises:
        InputError: there is no model in it, or none that is linearized.
    """
    folder = base_folder(folder) if is_adapter(folder) else folder
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: no model can be read there: {str(error).strip().splitlines()[0]}") from error
    if not linearized_modules(model):
        raise InputError(
            f"{folder}: this is a plain {model.config.model_type} model; run `linearize convert` on it first"
        )
    return model


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def base_folder(adapter: Path) -> Path:
    """The folder that adapters belong to: where their configuration says, or of that name beside them.

    Raises:
        InputError: it is in neither place.
    """
    named = Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    for place in (named, adapter.resolve().parent / named.name):
        if place.is_dir():
            return place
    raise InputError(
        f"{adapter}: its adapters belong to the model in {named}, which is not there; put it back or convert again"
    )
