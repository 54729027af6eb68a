"""Adapters on a converted model: put on, opened again, switched off for the source, folded in. All of peft is here."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import linearize
from linearize.archs import role_modules
from linearize.errors import InputError, suggest
from linearize.files import MANIFEST, output_folder, write_manifest
from linearize.modeling import branches, linearized_modules
from linearize.recipe import Peft

METHODS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}}
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
OWN = {"config.json", "adapter_config.json", MANIFEST, "README.md"}
"""Files that each stage writes anew, or that do not describe what it has made."""


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


def attach(model: PreTrainedModel, settings: Peft, trained: Path | None = None) -> peft.PeftModel:
    """Freeze a model and put trainable fp32 adapters on the modules that play the given roles.

    Args:
        model: a linearized model.
        settings: method, size and roles.
        trained: a folder with adapters of the same settings to go on with; None: new ones, which change nothing yet.

    Raises:
        InputError: unknown method or role, a role that no module plays, or adapters of other settings in ``trained``.
    """
    if settings.method not in METHODS:
        raise InputError(f"peft.method: unknown method {settings.method!r}. {suggest(settings.method, METHODS)}")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=role_modules(model, settings.roles),
        **METHODS[settings.method],
    )
    with _quiet():
        wrapped = peft.get_peft_model(model, config)
    if trained is not None:
        weights = peft.load_peft_weights(str(trained))
        found = json.loads((trained / "adapter_config.json").read_text())
        same = all(found[key] == getattr(config, key) for key in ("r", "lora_alpha", "use_rslora"))
        if not same or weights.keys() != peft.get_peft_model_state_dict(wrapped).keys():
            raise InputError(
                f"{trained}: its adapters have other settings than this stage's peft block; "
                "give the stage the settings of the one before, or merge first"
            )
        peft.set_peft_model_state_dict(wrapped, weights)
    return wrapped


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft 0.21 asks the model for a name that transformers 5.23 calls deprecated.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        # GPT-2 keeps its weights transposed; peft sees that, sets the flag itself, and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        yield


@contextmanager
def as_source(model: nn.Module) -> Iterator[None]:
    """Make a linearized model, with adapters or without, the source again: its attention, no adapters, no gradients."""
    adapters = model.disable_adapter() if isinstance(model, peft.PeftModel) else nullcontext()
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), adapters, branches(model, "source"):
            yield
    finally:
        model.train(training)


@contextmanager
def as_student(module: nn.Module) -> Iterator[None]:
    """Within `as_source`: one attention module is the student's again, with its mixer, its adapters and gradients."""
    attention: Any = module
    off = [m for m in module.modules() if isinstance(m, BaseTunerLayer) and m.disable_adapters]
    branch, training = attention.branch, module.training
    for layer in off:
        layer.enable_adapters(True)
    attention.branch = "all"
    module.train()
    try:
        with torch.enable_grad():
            yield
    finally:
        attention.branch = branch
        module.train(training)
        for layer in off:
            layer.enable_adapters(False)


def save(model: Any, folder: Path) -> None:
    """Write what was trained: the adapters, or the whole model if it has none."""
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # peft's form to fill in; `linearize push` writes a card with facts
    else:
        model.save_pretrained(folder)


def carry(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation settings, recipe and other small files from stage to stage; never weights."""
    for path in source.iterdir():
        if path.is_file() and path.name not in OWN and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, folder / path.name)


def merge(adapter: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    """Fold trained adapters into the weights they belong to: a plain linearized folder.

    Sums are formed in fp32 and rounded once, to the dtype of the weights.

    Args:
        adapter: folder that a training stage with adapters has written.
        out: folder to appear.
        overwrite: replace a model folder in its place.

    Returns:
        ``out``.

    Raises:
        InputError: ``adapter`` holds no adapters, their model is gone, or ``out`` exists.

    Example:
        >>> merge("runs/demo/1-distil", "runs/demo/merged")
    """
    adapter, out = Path(adapter), Path(out)
    if not is_adapter(adapter):
        raise InputError(
            f"{adapter}: there are no adapters here (no adapter_config.json); give the folder of a LoRA stage"
        )
    with output_folder(out, overwrite) as folder:
        with _quiet():
            wrapped = peft.PeftModel.from_pretrained(open_model(adapter), str(adapter))
        for module in wrapped.modules():
            if isinstance(module, BaseTunerLayer):
                base: Any = module.get_base_layer()
                dtype = base.weight.dtype
                base.float()
                module.merge()
                base.to(dtype)
        plain: Any = wrapped.base_model.unload()  # type: ignore[operator]
        plain.save_pretrained(folder)
        carry(adapter, folder)
        shutil.copytree(adapter / "tb", folder / "tb")
        made = json.loads((adapter / MANIFEST).read_text())
        write_manifest(folder, {key: made[key] for key in ("source", "training")} | {"versions": versions()}, {})
    return out


def versions() -> dict[str, str]:
    """What a result may depend on, for manifests."""
    return {
        "linearize": linearize.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
