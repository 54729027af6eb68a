"""What is trained of a model: put on, opened again, switched off for the source, folded in. All of peft is here.

Adapters stand beside the source's weights. The mixers' own weights are what peft calls modules_to_save: their trained
copies lie in the adapters' file, so that plain peft puts them back, and the base keeps those it was converted with.
"""

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
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import linearize
from linearize.archs import role_modules
from linearize.errors import InputError
from linearize.files import MANIFEST, output_folder, write_manifest
from linearize.modeling import LinearizedAttention, branches, linearized_modules
from linearize.schema import Peft

SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")
"""What a stage that goes on with adapters must share with the one that made them."""
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
OWN = {"config.json", "adapter_config.json", MANIFEST, "README.md", "results.json", "report.html"}
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


def keeps_source(settings: Peft | None) -> bool:
    """Whether the source's weights stay as they are, so that the model with adapters off is the source."""
    return settings is not None and settings.method != "full"


def attach(model: PreTrainedModel, settings: Peft, trained: Path | None = None) -> Any:
    """Freeze a model but for what the settings name, which is fp32: adapters, or weights, and the mixers' own weights.

    Args:
        model: a linearized model.
        settings: method, size, roles, and whether the mixers are trained.
        trained: a folder with adapters of the same settings to go on with, on the same roles or fewer; None: new ones,
            which change nothing yet.

    Returns:
        The model in peft's wrapper; with the method `full`, the same object.

    Raises:
        InputError: a role that no module plays or that the method cannot adapt, nothing to train, or adapters of other
            settings in ``trained``.
    """
    targets = role_modules(model, settings.roles)
    mixers = _mixers(model) if settings.mixer else []
    if not targets and not mixers:
        raise InputError(
            "peft.roles: found none, and the mixers of this model have no weights of their own, so nothing is trained; "
            "name a role, or give the mixers a gate first: linearize calibrate"
        )
    if settings.method == "full":
        model.requires_grad_(False)
        for name in targets + mixers:
            model.get_submodule(name).float().requires_grad_(True)
        return model
    config = _config(settings, targets, mixers)
    try:
        with _quiet():
            wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"peft.method {settings.method!r}: {' '.join(str(error).split())}") from error
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if trained is not None:
        weights = peft.load_peft_weights(str(trained), device="cpu")
        found = json.loads((trained / "adapter_config.json").read_text())
        new = peft.get_peft_model_state_dict(wrapped)
        alone = found["target_modules"] == DUMMY_TARGET_MODULES  # adapters on nothing have no settings
        same = alone or all(found.get(key) == getattr(config, key, None) for key in SETTINGS)
        if not same or not weights.keys() <= new.keys():
            raise InputError(
                f"{trained}: its adapters have other settings than this stage's peft block; "
                "give the stage the settings of the one before, or merge first"
            )
        peft.set_peft_model_state_dict(wrapped, new | weights)
    return wrapped


def put_on(model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """A model with the adapters in a folder; without peft's wrapper it is `get_base_model()` of the result.

    The `load_adapter` of transformers 5.23 does not find DoRA's magnitudes, and goes on with new ones.
    """
    with _quiet():
        return peft.PeftModel.from_pretrained(model, str(folder))


def _mixers(model: nn.Module) -> list[str]:
    """Full names of the mixers that have weights of their own."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LinearizedAttention)}
    return [f"{name}.mixer" for name, module in modules.items() if next(module.mixer.parameters(), None) is not None]


def _config(settings: Peft, targets: list[str], mixers: list[str]) -> peft.PeftConfig:
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": settings.r,
        "target_modules": targets or DUMMY_TARGET_MODULES,
        "modules_to_save": mixers or None,
    }
    if settings.method == "miss":
        return peft.MissConfig(miss_dropout=settings.dropout, **shared)
    return peft.LoraConfig(
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.method == "rslora",
        use_dora=settings.method == "dora",
        **shared,
    )


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
    off = [m for m in module.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper) and m.disable_adapters]
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


def save(model: Any, weights: dict[str, Tensor], base: Path, folder: Path) -> None:
    """Write what was trained: the adapters, or the whole model if it has none.

    Args:
        model: what was trained.
        weights: its trained weights, whole, by their names in it.
        base: the folder it was opened from; what was not trained is written as it is there.
        folder: to write into.
    """
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink()  # peft's form to fill in; `linearize push` writes a card with facts
    else:
        plain = open_model(base)
        plain.load_state_dict(weights, strict=False)
        plain.save_pretrained(folder)


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
        wrapped = put_on(open_model(adapter), adapter)
        for module in wrapped.modules():
            if isinstance(module, BaseTunerLayer):
                base: Any = module.get_base_layer()
                dtype = base.weight.dtype
                base.float()
                module.merge()
                base.to(dtype)
        for module in linearized_modules(wrapped):
            if isinstance(module.mixer, ModulesToSaveWrapper):
                before = next(module.mixer.original_module.parameters())
                module.mixer = module.mixer.modules_to_save["default"].to(before.dtype)
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
