"""The models behind the columns: one copy of the source's weights for three, one of the student's, one of another's."""

import contextlib
import copy
import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearize.checkpoint import adapters, copying, sources
from linearize.checkpoint.open import base_folder, is_adapter
from linearize.errors import InputError
from linearize.model.branches import branches
from linearize.model.mixers import MIXERS
from linearize.model.modeling import linearize_

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
        found = "cannot be opened as a model" if Path(folder).exists() else "is no folder, nor found on the Hub"
        raise InputError(f"{folder}: {found} ({reason}); give a folder written by linearize") from error
    if config.model_type != "linearized":
        raise InputError(
            f"{folder}: is a plain {config.model_type}, not a linearized model; convert it first with `linearize "
            "convert`"
        )
    return config


def _tokenizer(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: has no usable tokenizer ({' '.join(str(error).split())}); copy the source's tokenizer files "
            "into it"
        ) from error


def _base(folder: str | Path) -> str | Path:
    return base_folder(Path(folder)) if is_adapter(Path(folder)) else folder


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
    return hashlib.sha256("".join(copying.sha256(path, advance) for path in paths).encode()).hexdigest()


def weight_files(folder: str | Path) -> list[Path]:
    folder = Path(folder)
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]) if folder.is_dir() else []


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same parameters, not copies of them; it can be given other attention."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Models:
    """Opens the model of one column after the other, and keeps the weights while the next column can use them.

    Args:
        folder: the student: folder or Hub id.
        config: its configuration, see `read_config`.
        located: its source.
        against: another student, of the column `other`; folder or Hub id.
        dtype: torch dtype or its name, for both; `auto` is the student's own.
        device: None for the GPU if there is one.
        seed: of new weights that an untrained conversion may have.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Any,
        located: Any,
        dtype: str,
        device: str | None,
        seed: int,
        against: str | None = None,
    ):
        self.folder, self.config, self.located, self.seed, self.against = str(folder), config, located, seed, against
        self.dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype, None)
        if not isinstance(self.dtype, torch.dtype):
            raise InputError(f"dtype: {dtype!r} is none; expected auto, float32, bfloat16 or float16")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = _tokenizer(self.folder)
        if against is not None:
            advice = "--against takes a model of the same source"
            self._check_same_text(against, read_config(against), _tokenizer(against), advice)
        self._family: str | None = None
        self._model: PreTrainedModel | None = None

    @contextlib.contextmanager
    def column(self, name: str) -> Iterator[PreTrainedModel]:
        """The model of a column, in evaluation mode. They come in the order of `results_schema.COLUMNS`."""
        family = "student" if name in BRANCHES else "other" if name == "other" else "source"
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

    def close(self) -> None:
        """Let go of the weights."""
        self._model = self._family = None
        gc.collect()

    @contextlib.contextmanager
    def together(self, names: list[str]) -> Iterator[dict[str, PreTrainedModel]]:
        """Source, window control and student, as far as named, at once: for what is measured in turns.

        Two sets of weights are held for the three; what `column` had opened is not kept beside them.
        """
        student = self._model if self._family == "student" else None
        self.close()
        found: dict[str, PreTrainedModel] = {}
        if {"source", "window"} & set(names):
            found["source"] = self._load("source")
        if "window" in names:
            found["window"] = sharing_copy(found["source"])
            for mixer, layers in self._mixers(control=True):
                linearize_(found["window"], mixer, layers)
        if "student" in names:
            found["student"] = student or self._load("student")
        yield {name: found[name] for name in names}

    def _load(self, family: str) -> PreTrainedModel:
        if family == "source":
            model, tokenizer = sources.load_source(self.located, dtype=self.dtype)
            advice = "name the model that was converted by --source"
            self._check_same_text(self.located.id, model.config, tokenizer, advice)
        else:
            folder = self.folder if family == "student" else self.against
            assert folder is not None
            try:
                model: Any = AutoModelForCausalLM.from_pretrained(_base(folder), dtype=self.dtype)
                if is_adapter(Path(folder)):
                    model = adapters.put_on(model, Path(folder)).get_base_model()
            except (OSError, ValueError) as error:
                raise InputError(f"{folder}: cannot be opened as a model ({' '.join(str(error).split())})") from error
        return model.to(self.device).eval()  # pyright: ignore[reportArgumentType] (typed too narrowly in transformers)

    def _check_same_text(self, name: str, config: Any, tokenizer: Any, advice: str) -> None:
        """Refuse a model that would read other tokens than the student."""
        ours, theirs = self.config.vocab_size, config.vocab_size
        if ours != theirs:
            raise InputError(
                f"{name}: this model has {theirs} tokens and the student {ours}: their scores cannot be compared; "
                f"{advice}"
            )
        vocabularies = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        if vocabularies[0] != vocabularies[1]:
            differing = sorted(set(vocabularies[0].items()) ^ set(vocabularies[1].items()))[:3]
            raise InputError(
                f"{name}: this model and the student have tokenizers that differ (for instance in {differing}), so "
                f"they would read different prompts; {advice}"
            )

    def _mixers(self, control: bool) -> list[tuple[dict[str, Any], list[int]]]:
        """The student's mixers, or window controls in their place, each with its layers."""
        grouped: dict[str, list[int]] = {}
        for index, values in self.config.linearize["layers"].items():
            if control and values["name"] != "softmax":
                same = ("window", "sinks", "softmax_heads")
                values = {"name": "window", **{key: values[key] for key in same if key in values}}
            grouped.setdefault(json.dumps(values, sort_keys=True), []).append(int(index))
        return [(json.loads(mixer), layers) for mixer, layers in grouped.items()]
