"""The models behind the columns: one copy of the source's weights for three, one of the student's for the rest."""

import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearize import adapters, files, sources
from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.modeling import branches, linearize_

BRANCHES = {"student": "all", "student/window": "window", "student/memory": "memory"}


def read_config(folder: str | Path) -> Any:
    """Configuration of a linearized folder or Hub id; for an adapter, that of the model it belongs to.

    Raises:
        InputError: it cannot be read, or it is not linearized.
    """
    try:
        config = AutoConfig.from_pretrained(_base(folder))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder}: cannot be opened as a model ({reason}); give a folder written by linearize"
        ) from error
    if config.model_type != "linearized":
        raise InputError(
            f"{folder}: is a plain {config.model_type}, not a linearized model; convert it first with `linearize "
            "convert`"
        )
    return config


def _base(folder: str | Path) -> str | Path:
    return adapters.base_folder(Path(folder)) if adapters.is_adapter(Path(folder)) else folder


def window_of(config: Any) -> tuple[int, int] | None:
    """Largest window of exact attention and its sinks; None if no layer has one."""
    pairs = [
        (values["window"], values["sinks"])
        for values in config.linearize["layers"].values()
        if values["name"] != "softmax" and (values["combine"] != "none" or not MIXERS[values["name"]].recurrent)
    ]
    return max(pairs, default=None)


def without_branches(config: Any) -> str | None:
    """Why the columns with one branch off make no sense for a model, if they do not."""
    mixers = [values for values in config.linearize["layers"].values() if values["name"] != "softmax"]
    if not any(MIXERS[values["name"]].recurrent for values in mixers):
        return "the model has no memory"
    if any(values["combine"] == "none" for values in mixers):
        return "the model has layers with one branch only"
    return None


def fingerprint(folder: str | Path, advance: Callable[[int], None]) -> str:
    """One sha256 over the configuration and weights of a local folder; the name itself for a model on the Hub."""
    paths = weight_files(folder)
    if not paths:
        return str(folder)
    return hashlib.sha256("".join(files.sha256(path, advance) for path in paths).encode()).hexdigest()


def weight_files(folder: str | Path) -> list[Path]:
    folder = Path(folder)
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]) if folder.is_dir() else []


class Models:
    """Opens the model of one column after the other, and keeps the weights while the next column can use them.

    Args:
        folder: the student: folder or Hub id.
        config: its configuration, see `read_config`.
        located: its source.
        dtype: torch dtype or its name, for both; `auto` is the student's own.
        device: None for the GPU if there is one.
        seed: of new weights that an untrained conversion may have.
    """

    def __init__(self, folder: str | Path, config: Any, located: Any, dtype: str, device: str | None, seed: int):
        self.folder, self.config, self.located, self.seed = str(folder), config, located, seed
        self.dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype, None)
        if not isinstance(self.dtype, torch.dtype):
            raise InputError(f"dtype: {dtype!r} is none; expected auto, float32, bfloat16 or float16")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = self._tokenizer()
        self._family: str | None = None
        self._model: PreTrainedModel | None = None

    @contextlib.contextmanager
    def column(self, name: str) -> Iterator[PreTrainedModel]:
        """The model of a column, in evaluation mode. Columns come in the order of `linearize.results.COLUMNS`."""
        family = "student" if name in BRANCHES else "source"
        if self._family != family:
            self._model = None
            gc.collect()  # modules hold each other in cycles: free the last family before the next one is loaded
            self._model, self._family = self._load(family), family
        model = self._model
        assert model is not None
        if name in ("window", "converted"):
            torch.manual_seed(self.seed)
            for mixer, layers in self._mixers(control=name == "window"):
                linearize_(model, mixer, layers)
        if family == "student":
            with branches(model, BRANCHES[name]):
                yield model
        else:
            yield model

    def _tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.folder}: has no usable tokenizer ({' '.join(str(error).split())}); copy the source's tokenizer "
                "files into it"
            ) from error

    def _load(self, family: str) -> PreTrainedModel:
        if family == "source":
            model, tokenizer = sources.load_source(self.located, dtype=self.dtype)
            self._check_source(model.config, tokenizer)
        else:
            try:
                model = AutoModelForCausalLM.from_pretrained(_base(self.folder), dtype=self.dtype)
                if adapters.is_adapter(Path(self.folder)):
                    model: Any = adapters.put_on(model, Path(self.folder)).get_base_model()
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{self.folder}: cannot be opened as a model ({' '.join(str(error).split())})"
                ) from error
        return model.to(self.device).eval()  # pyright: ignore[reportArgumentType] (typed too narrowly in transformers)

    def _check_source(self, config: Any, tokenizer: Any) -> None:
        ours, theirs = self.config.vocab_size, config.vocab_size
        if ours != theirs:
            raise InputError(
                f"{self.located.id}: this source has {theirs} tokens and the student {ours}: their scores cannot be "
                "compared; name the model that was converted by --source"
            )
        vocabularies = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        if vocabularies[0] != vocabularies[1]:
            differing = sorted(set(vocabularies[0].items()) ^ set(vocabularies[1].items()))[:3]
            raise InputError(
                f"{self.located.id}: source and student have tokenizers that differ (for instance in {differing}), so "
                "they would read different prompts; name the model that was converted by --source"
            )

    def _mixers(self, control: bool) -> list[tuple[dict[str, Any], list[int]]]:
        """The student's mixers, or window controls in their place, each with its layers."""
        grouped: dict[str, list[int]] = {}
        for index, values in self.config.linearize["layers"].items():
            if control and values["name"] != "softmax":
                values = {"name": "window", "window": values["window"], "sinks": values["sinks"]}
            grouped.setdefault(json.dumps(values, sort_keys=True), []).append(int(index))
        return [(json.loads(mixer), layers) for mixer, layers in grouped.items()]
