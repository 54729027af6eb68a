"""What is trained of a model: put on, opened again, switched off for the source, folded in. All of peft is here.

Adapters stand beside the source's weights. The mixers' own weights are what peft calls modules_to_save: their trained
copies lie in the adapters' file, so that plain peft puts them back, and the base keeps those it was converted with.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.checkpoint import links, shards
from linearize.checkpoint.reading import AGAIN, read_json, reading
from linearize.checkpoint.shards import names
from linearize.checkpoint.sources import read_model
from linearize.errors import InputError
from linearize.model.architectures import role_modules
from linearize.model.attention import LinearizedAttention, linearized_modules
from linearize.model.branches import branches
from linearize.model.sizes import text_sizes
from linearize.recipe.schema import Peft

SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")
"""What a stage that goes on with adapters must share with the one that made them."""


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
            "peft.roles: there is none, and the mixers of this model have no weights of their own, so nothing is "
            "trained; name a role, or give the mixers a gate first: linearize calibrate"
        )
    if settings.method != "miss" and settings.r > (width := text_sizes(model.config).hidden):  # peft says it of MiSS
        raise InputError(f"peft.r: found {settings.r:,}; adapters wider than the model, {width:,}, add nothing to it")
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
        _go_on(wrapped, config, trained)
    return wrapped


def _go_on(wrapped: peft.PeftModel, config: peft.PeftConfig, trained: Path) -> None:
    """Put the weights of trained adapters into new ones of the same settings, on the same roles or more."""
    weights = check(trained)
    settings = read_json(trained / "adapter_config.json")
    targets = settings.get("target_modules") or []
    alone = targets == DUMMY_TARGET_MODULES  # adapters on nothing have no settings
    if not alone and any(settings.get(key) != getattr(config, key, None) for key in SETTINGS):
        raise InputError(
            f"{trained}: its adapters have other settings than this stage's peft block; "
            "give the stage the settings of the one before, or merge first"
        )
    new = _weights_of(wrapped)
    modules = [*([] if alone else targets), *(settings.get("modules_to_save") or ())]
    expected = {name for name in new if any(f".{module}." in name for module in modules)}
    same_names(trained, weights.keys(), expected, "give the stage the roles of the one before, or merge first")
    peft.set_peft_model_state_dict(wrapped, new | weights)


def _weights_of(wrapped: peft.PeftModel) -> dict[str, Tensor]:
    """What peft saves of a model with adapters: their weights and the trained copies, by their names in the file."""
    return peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)


def same_names(where: object, given: Iterable[str], expected: Iterable[str], advice: str) -> None:
    """Refuse weights under names that nothing has, and weights that are wanted and not there.

    Raises:
        InputError: names them.
    """
    unknown, absent = sorted(set(given) - set(expected)), sorted(set(expected) - set(given))
    problems = [f"{what}: {names(some)}" for what, some in (("unknown", unknown), ("missing", absent)) if some]
    if problems:
        raise InputError(
            f"{where}: the names of the trained weights do not match the model; {'; '.join(problems)}; {advice}"
        )


def check(folder: Path) -> dict[str, Tensor]:
    """The weights of the adapters in a folder, once nothing about them speaks against it.

    Raises:
        InputError: they are missing or damaged, hold values that are not finite, or settings that ask for more than
            they hold, or for a module to be imported.
    """
    settings = read_json(folder / "adapter_config.json", AGAIN)
    links.check(folder)
    if settings.get("megatron_config"):
        raise InputError(
            f"{folder}/adapter_config.json: megatron_config makes peft import {settings.get('megatron_core')!r}, which "
            "is not done for a file's sake; remove the key"
        )
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        held = [max(tensor.shape, default=0) for tensor in shards.read_header(file).values()]
        _check_ranks(folder, settings, max(held, default=0))
    elif not (folder / "adapter_model.bin").is_file():
        raise InputError(f"{folder}: has adapter_config.json but no {file.name}; {AGAIN}")
    with reading(folder, "its adapters cannot be read", AGAIN):
        weights = peft.load_peft_weights(str(folder), device="cpu")
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("it holds other things than tensors by name")
    bad = [name for name, weight in weights.items() if weight.is_floating_point() and not weight.isfinite().all()]
    if bad:
        raise InputError(f"{folder}: its adapters hold values that are not finite, in {shards.names(bad)}; {AGAIN}")
    return weights


def _check_ranks(folder: Path, settings: dict[str, Any], longest: int) -> None:
    """Refuse settings that make peft allocate more than the adapters hold, whose longest dimension is given."""
    pattern = settings.get("rank_pattern")
    ranks = [settings.get(key) for key in ("r", "init_r", "target_r", "num_virtual_tokens", "encoder_hidden_size")]
    ranks += list(pattern.values()) if isinstance(pattern, dict) else []
    most = max((rank for rank in ranks if isinstance(rank, int | float)), default=0)
    if most > max(longest, 1024):
        raise InputError(
            f"{folder}/adapter_config.json: asks for a rank of {most:,}, and no dimension of the adapters is longer "
            f"than {longest}; {AGAIN}"
        )


def put_on(model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """A model with the adapters in a folder; without peft's wrapper it is `get_base_model()` of the result.

    The `load_adapter` of transformers 5.23 does not find DoRA's magnitudes, and goes on with new ones.

    Args:
        model: the one that they were trained on.
        folder: holds the adapters.

    Returns:
        The model in peft's wrapper, in evaluation mode.

    Raises:
        InputError: the adapters cannot be read, or do not fit the model: names the weights.
    """
    advice = "put the adapters on the model that they were trained on"
    written = check(folder)
    with _quiet(), reading(folder, "its adapters cannot be put on the model", advice):
        wrapped = peft.PeftModel.from_pretrained(model, str(folder))
    same_names(folder, written, _weights_of(wrapped), advice)
    return wrapped


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
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # an error of ours, see put_on
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


class Switch:
    """Turns one set of weights into the student or into its source, many times a second.

    Args:
        model: linearized, with adapters in it or without.

    Attributes:
        student: which of the two it is now.
    """

    def __init__(self, model: nn.Module):
        self.student = True
        self._attentions = linearized_modules(model)
        self._adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def __call__(self, student: bool) -> None:
        """Make it the student, or its source."""
        if student != self.student:
            for attention in self._attentions:
                attention.branch = "all" if student else "source"
            for layer in self._adapters:
                layer.enable_adapters(student)
            self.student = student


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

    Raises:
        InputError: a weight that was trained is not among them, or one that was not is.
    """
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    advice = "nothing was written, and the checkpoints are as they were; train with the versions they were made with"
    same_names(folder, weights, trained, advice)
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink()  # peft's form to fill in; `linearize push` writes a card with facts
    else:
        plain = read_model(base)
        same_names(base, trained - plain.state_dict().keys(), (), advice)
        plain.load_state_dict(weights, strict=False)
        plain.save_pretrained(folder)
