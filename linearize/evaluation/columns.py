"""The models behind the columns: one copy of the source's weights for three, one of the student's, one of another's."""

import contextlib
import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from linearize.checkpoint import quantize as quantization
from linearize.checkpoint import sources
from linearize.checkpoint.open import load, open_config, open_tokenizer, pick_device
from linearize.errors import InputError
from linearize.model.branches import branches
from linearize.model.mixers import MIXERS
from linearize.model.modeling import linearize_
from linearize.model.sizes import text_sizes

BRANCHES = {"student": "all", "student/window": "window", "student/memory": "memory"}


def read_config(folder: str | Path) -> Any:
    """Configuration of a linearized folder or Hub id; for an adapter, that of the model it belongs to.

    Raises:
        InputError: it cannot be read, or it is not linearized.
    """
    config = open_config(folder)
    if config.model_type != "linearized":
        raise InputError(
            f"{folder}: is a plain {config.model_type}, not a linearized model; convert it first with `linearize "
            "convert`"
        )
    return config


def window_of(config: Any) -> tuple[int, int] | None:
    """Largest window of exact attention and its sinks; None if no layer has one."""
    pairs = [
        (values["window"], values["sinks"])
        for values in config.linearize["layers"].values()
        if not MIXERS[values["name"]].keeps_source_cache
        and (values["combine"] != "none" or not MIXERS[values["name"]].recurrent)
    ]
    return max(pairs, default=None)


def without_branches(config: Any) -> str | None:
    """Why the columns with one branch off make no sense for a model, if they do not."""
    layers = config.linearize["layers"].values()
    mixers = [values for values in layers if not MIXERS[values["name"]].keeps_source_cache]
    if not any(MIXERS[values["name"]].recurrent for values in mixers):
        return "the model has no memory"
    if any(values["combine"] == "none" for values in mixers):
        return "the model has layers with one branch only"
    return None


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same parameters, not copies of them; it can be given other attention."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Models:
    """Opens the model of one column after the other, and keeps the weights while the next column can use them.

    Args:
        folder: the student: folder or Hub id.
        config: its configuration, see `read_config`.
        located: its source.
        dtype: torch dtype or its name, for all models; `auto` is the student's own.
        device: see `linearize.checkpoint.open.pick_device`.
        seed: of new weights that an untrained conversion may have.
        against: another student, of the column `other`; folder or Hub id.
        quantize: of the weights of all models, see `linearize.checkpoint.quantize`; None: as they are.

    Raises:
        InputError: an unknown dtype or device, no usable tokenizer, or another student that reads other tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Any,
        located: sources.Located,
        dtype: str,
        device: str | None,
        seed: int,
        against: str | None = None,
        quantize: str | None = None,
    ):
        quantization.check(quantize)
        self.quantize = quantize
        self.folder, self.config, self.located, self.seed, self.against = str(folder), config, located, seed, against
        weights = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype, None)
        if not isinstance(weights, torch.dtype):
            raise InputError(f"dtype: {dtype!r} is none; expected auto, float32, bfloat16 or float16")
        self.dtype = weights
        self.device = pick_device(device)
        self.tokenizer: Any = open_tokenizer(self.folder)
        if against is not None:
            advice = "--against takes a model of the same source"
            self._check_same_text(against, read_config(against), open_tokenizer(against), advice)
        self._opened: dict[str, PreTrainedModel] = {}  # none, or the weights of one family

    @contextlib.contextmanager
    def column(self, name: str) -> Iterator[PreTrainedModel]:
        """The model of a column, in evaluation mode. In the order of `COLUMNS` each set of weights is read once.

        Raises:
            InputError: a folder cannot be opened, or the source reads other tokens than the student.
        """
        family = "student" if name in BRANCHES else "other" if name == "other" else "source"
        if family not in self._opened:
            self.close()  # before the next weights are read
            self._opened[family] = self._load(family)
        model = self._opened[family]
        if name in ("window", "converted"):
            model = self._linearized(model, control=name == "window")
        with branches(model, BRANCHES[name]) if family == "student" else contextlib.nullcontext():
            yield model

    def close(self) -> None:
        """Let go of the weights."""
        self._opened.clear()
        gc.collect()  # modules hold each other in cycles

    @contextlib.contextmanager
    def together(self, names: list[str]) -> Iterator[dict[str, PreTrainedModel]]:
        """Source, window control and student, as far as named, at once: for interleaved measurements.

        Two sets of weights are held for the three; what `column` had opened is not kept beside them.

        Args:
            names: columns, of `linearize.evaluation.speed.COLUMNS`.
        """
        student = self._opened.get("student")
        self.close()
        opened: dict[str, PreTrainedModel] = {}
        if {"source", "window"} & set(names):
            opened["source"] = self._load("source")
        if "window" in names:
            opened["window"] = self._linearized(opened["source"], control=True)
        if "student" in names:
            opened["student"] = student or self._load("student")
        yield {name: opened[name] for name in names}

    def _load(self, family: str) -> PreTrainedModel:
        if family == "source":
            model, tokenizer = sources.load_source(self.located, dtype=self.dtype)
            advice = "name the model that was converted by --source"
            self._check_same_text(self.located.id, model.config, tokenizer, advice)
            model: Any = model.to(self.device).eval()  # pyright: ignore[reportArgumentType] (typed too narrowly)
            return quantization.quantize_(model, self.quantize)
        folder = self.folder if family == "student" else self.against
        if folder is None:
            raise InputError("columns: other: there is no other student; name one by --against")
        return load(folder, self.dtype, self.device, self.quantize)[0]

    def _linearized(self, source: PreTrainedModel, control: bool) -> PreTrainedModel:
        """A model with the source's weights and the student's mixers, or window controls in their place, untrained."""
        torch.manual_seed(self.seed)
        model = sharing_copy(source)
        for mixer, layers in self._mixers(control):
            linearize_(model, mixer, layers)
        return model

    def _check_same_text(self, name: str, config: Any, tokenizer: Any, advice: str) -> None:
        """Refuse a model that would read other tokens than the student."""
        ours, theirs = text_sizes(self.config).vocabulary, text_sizes(config).vocabulary
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
            if control and not MIXERS[values["name"]].keeps_source_cache:
                same = ("window", "sinks", "softmax_heads")
                values = {"name": "window", **{key: values[key] for key in same if key in values}}
            grouped.setdefault(json.dumps(values, sort_keys=True), []).append(int(index))
        return [(json.loads(mixer), layers) for mixer, layers in grouped.items()]
