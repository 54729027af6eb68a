"""Open what the stages wrote, and what others did: the only door from a folder or Hub id to a model that runs."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from linearize.checkpoint import adapters, config, links, text
from linearize.checkpoint import quantize as quantization
from linearize.checkpoint.atomic import put_back
from linearize.checkpoint.reading import read_json, reading, reason
from linearize.checkpoint.sources import fetch, locate, read_model
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.sizes import text_sizes

_ADAPTER = "adapter_config.json"


def load(
    name: str | Path,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    quantize: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model with its tokenizer, ready to run.

    Args:
        name: what ``linearize convert``, ``calibrate``, ``train`` or ``merge`` wrote, any other folder with a causal
            language model, or the Hub id of either. Adapters are put on the model that they belong to.
        dtype: of the weights: a torch dtype, its name, or ``auto``, as stored.
        device: see `pick_device`.
        quantize: hold the weights as ``int8``, ``int4`` or ``nf4`` (see `linearize.checkpoint.quantize`).

    Returns:
        The model, in evaluation mode and without peft's wrapper, and the tokenizer.

    Raises:
        InputError: there is no such folder or model, or a part of it is missing or damaged.

    Example:
        >>> model, tokenizer = linearize.load("runs/demo/merged")
    """
    # What is small comes first: its damage is named before gigabytes are read.
    quantization.check(quantize)
    target, _, tokenizer, folder = pick_device(device), open_config(name), open_tokenizer(name), _folder(name)
    model: Any = read_model(base_folder(folder) if is_adapter(folder) else folder, dtype)
    if is_adapter(folder):
        model = adapters.put_on(model, folder).get_base_model()
    return quantization.quantize_(model.to(target), quantize).eval(), tokenizer


def open_model(folder: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The linearized model in a folder, or the one that the adapters in it were trained on, on the CPU.

    Args:
        folder: the folder, or a Hub id.
        dtype: as for `load`.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: there is no model in it, or none that is linearized.
    """
    opened = _folder(folder)
    model = read_model(base_folder(opened) if is_adapter(opened) else opened, dtype)
    if not linearized_modules(model):
        raise InputError(
            f"{folder}: this is a plain {model.config.model_type} model; run `linearize convert` on it first"
        )
    return model


def open_config(name: str | Path) -> PreTrainedConfig:
    """The configuration of a folder or Hub id, plain or linearized; of adapters, that of the model they belong to.

    Raises:
        InputError: it is missing or cannot be read.
    """
    folder = _folder(name, weights=False)
    return config.read(base_folder(folder, weights=False) if is_adapter(folder) else folder)


def open_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id; it pads with a token that the model there can embed.

    Raises:
        InputError: it is missing or cannot be read.
    """
    folder = _folder(name, weights=False)
    links.check(folder)
    with reading(name, "has no usable tokenizer", "copy the source's tokenizer files into it"):
        opened = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = text.check_tokenizer(opened)
    text.fit_padding(tokenizer, text_sizes(open_config(name)).vocabulary)
    return tokenizer


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device to run on: the one that is named, else this machine's accelerator, else the CPU.

    Raises:
        InputError: there is no such device here.
    """
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # an assertion is what a build without CUDA raises
        raise InputError(
            f"device {device!s}: not on this machine ({reason(error)}); name another, such as cpu"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and not a model."""
    return (folder / _ADAPTER).is_file()


def bases(folder: Path) -> list[Path]:
    """The folder that the adapters in a folder belong to; none where it holds a model of its own."""
    return [base_folder(folder, weights=False)] if is_adapter(folder) else []


def needed(folder: Path) -> list[Path]:
    """What no output may replace that is made from a folder: it, what its adapters belong to, and a local source."""
    folders = [folder, *bases(folder)]
    file = folders[-1] / "config.json"
    block = read_json(file).get("linearize") if file.is_file() else None
    source = block.get("source") if isinstance(block, dict) else None
    named = [source.get(key) for key in ("path", "gguf")] if isinstance(source, dict) else []
    usable = named[:1] != [None] and all(isinstance(name, str | None) and "\0" not in (name or "") for name in named)
    return [*folders, Path(*filter(None, named))] if named and usable else folders


def base_folder(adapter: Path, weights: bool = True) -> Path:
    """The folder that adapters belong to: where their configuration says, of that name beside them, or from the Hub.

    Args:
        adapter: a folder with adapters.
        weights: of a base on the Hub bring the weights too, not its small files only.

    Raises:
        InputError: it is in none of these.
    """
    with reading(adapter / _ADAPTER, "does not name the model that the adapters belong to", "train them again"):
        named = read_json(adapter / _ADAPTER)["base_model_name_or_path"]
        if not isinstance(named, str) or not named:
            raise ValueError(f"base_model_name_or_path is {named!r}")
    for folder in (Path(named), adapter.resolve().parent / Path(named).name):
        if folder.is_dir():
            return folder
    try:
        return _folder(named, weights)
    except InputError as error:
        raise InputError(
            f"{adapter}: its adapters belong to the model in {named}, which is not there, nor beside them, nor on the "
            f"Hub ({error}); put it back or convert again"
        ) from error


def _folder(name: str | Path, weights: bool = True) -> Path:
    """A folder as it is; for a Hub id the folder in the local cache, downloaded as far as it is not there yet."""
    path = Path(name).expanduser()
    put_back(path)
    if path.is_dir():
        return path
    located = locate(str(name), recipes=False)
    if located.gguf is not None:
        raise InputError(f"{name}: is a GGUF file, which runs when it is converted: linearize convert --model {name}")
    return (fetch(located, allow_pickle=True) if weights else located).path
