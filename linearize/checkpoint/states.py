"""Saved states: what a model has read, in one file of constant size, from which it goes on as if it had never stopped.

A safetensors file: the tensors of the cache, the tokens of the text, and in the header which model they belong to.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import Cache, PreTrainedModel

from linearize.checkpoint.atomic import locked, write_bytes
from linearize.checkpoint.reading import reading
from linearize.checkpoint.shards import read_header
from linearize.errors import InputError
from linearize.model import states
from linearize.model.architectures import attention_layers
from linearize.model.attention import linearized_modules
from linearize.model.states import copied as copied
from linearize.model.states import held_bytes as held_bytes

FORMAT = 1
SAMPLE = 256
"""Elements of each tensor of weights that a fingerprint looks at."""
_HEADER, _TOKENS = "linearize_state", "tokens"
_ANEW = "read the text again with this model, and save anew"
# What a configuration says of files, tokens and the like, and not of what a layer computes.
_NOT_COMPUTED = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
_NOT_COMPUTED |= {"bos_token_id", "eos_token_id", "pad_token_id", "linearize", "id2label", "label2id", "auto_map"}


@dataclass(frozen=True)
class Fingerprint:
    """What a state depends on.

    Attributes:
        dtype: of the model.
        layers: of each linearized layer its mixer with all settings, window and sinks in force among them; of the
            others nothing.
        configuration: sha256 of what else config.json says that is computed with.
        weights: sha256 of names, shapes and dtypes of all parameters and buffers, adapters among them and which are on,
            and of `SAMPLE` elements of each, evenly spread. Training and merging change nearly all elements; a change
            of a few elements by hand, or of one row of a large embedding, can pass unseen.
    """

    dtype: str
    layers: dict[str, dict[str, Any]]
    configuration: str
    weights: str

    @property
    def digest(self) -> str:
        """All of it in 16 characters."""
        return _digest({"format": FORMAT, **vars(self)})[:16]


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """What tells a model from others whose states it must not go on from.

    Args:
        model: linearized.

    Raises:
        InputError: it is not linearized.
    """
    modules = linearized_modules(model)
    if not modules:
        raise InputError(
            f"states: {model.config.model_type} is no linearized model; run `linearize convert` on it first"
        )
    layers = {
        str(m.layer_idx): m.mixer.config.to_dict()
        | {"window": m.mixer.window, "sinks": m.mixer.sinks, "branch": m.branch}
        for m in modules
    }
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_COMPUTED}
    return Fingerprint(str(model.dtype), json.loads(json.dumps(layers)), _digest(config), _weights(model))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _weights(model: PreTrainedModel) -> str:
    hashed = hashlib.sha256()
    named = [*model.named_parameters(), *model.named_buffers()]
    samples: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for name, x in sorted(named, key=lambda pair: pair[0]):
        hashed.update(f"{name} {list(x.shape)} {x.dtype}".encode())
        if x.numel() and not x.is_meta:
            flat = x.detach().reshape(-1)
            samples.setdefault((x.dtype, x.device), []).append(flat[:: max(x.numel() // SAMPLE, 1)][:SAMPLE])
    for parts in samples.values():
        hashed.update(_bytes(torch.cat(parts)))
    for name, module in model.named_modules():  # of peft
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):
            state = [getattr(module, key, None) for key in ("active_adapters", "disable_adapters", "scaling")]
            hashed.update(f"{name} {state}".encode())
    return hashed.hexdigest()


def _bytes(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensors: dict[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(f"{name} {list(tensors[name].shape)} {tensors[name].dtype}".encode())
        if tensors[name].numel():
            hashed.update(_bytes(tensors[name]))
    return hashed.hexdigest()


def check_cache(cache: Cache, tokens: Tensor, model: PreTrainedModel) -> Tensor:
    """The tokens of a text, int64 [tokens], of which a cache holds all, or all but the last.

    Args:
        cache: of one row.
        tokens: [tokens] or [1, tokens].
        model: that has filled the cache.

    Raises:
        InputError: they do not belong together.
    """
    ids = tokens.detach().to("cpu", torch.int64)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise InputError(
            f"state: tokens are {list(tokens.shape)}; one text at a time is kept: split_states takes a batch apart"
        )
    try:
        states.check(cache, model)
    except (ValueError, IndexError) as error:
        raise InputError(
            f"state: this cache is not what the model makes of one text without padding ({error}); of a batch, take "
            "the rows that split_states gives"
        ) from error
    length = int(cache.get_seq_length())
    if not 0 < length <= len(ids) <= length + 1:
        raise InputError(
            f"state: the cache holds {length} tokens, but {len(ids)} were given; give the tokens that it has read, at "
            "most with the last one written, which is read next"
        )
    return ids


def check_target(file: str | Path, model: PreTrainedModel) -> None:
    """Refuse, before there is anything to lose, a file that `save_state` could not write.

    Raises:
        InputError: it is a folder, lies where nothing can be written, or the model is not linearized.
    """
    fingerprint(model)
    with locked(_target(file)):
        pass


def _target(file: str | Path) -> Path:
    """Where a state is written, behind links; an InputError where something else would be lost."""
    path = Path(os.path.realpath(file))
    if path.is_dir() or path.exists() and not path.is_file():
        raise InputError(f"{file}: is {'a folder' if path.is_dir() else 'a device'}; name a file for the state")
    if path.is_file() and path.stat().st_size and _said(path) is None:
        raise InputError(f"{file}: is there and is no saved state, so it is not replaced; name another file")
    return path


def _said(path: Path) -> str | None:
    """What the header of a file says as a saved state; None where it is none."""
    try:
        with safe_open(path, "pt") as opened:
            return (opened.metadata() or {}).get(_HEADER)
    except (OSError, SafetensorError):
        return None


def save_state(
    cache: Cache, tokens: Tensor, model: PreTrainedModel, file: str | Path, notes: dict[str, Any] | None = None
) -> Path:
    """Save what a model has read, to go on from it later, in another process or on another machine.

    Args:
        cache: of one text, as `generate` returns it (`past_key_values`).
        tokens: int64 [tokens] of the text that the cache holds; one more where the last was written and not read yet.
        model: linearized, that has filled it.
        file: to be written; a saved state that is there is replaced when the new one is complete.
        notes: JSON-safe, kept beside it.

    Returns:
        The file.

    Raises:
        InputError: cache, tokens and model do not belong together, or the file cannot be written.

    Example:
        >>> model, tokenizer = linearize.load("runs/demo/merged")
        >>> tokens = tokenizer("The river rose", return_tensors="pt").input_ids
        >>> file = linearize.save_state(model(tokens).past_key_values, tokens, model, "talk.safetensors")
        >>> cache, tokens = linearize.load_state(file, model)
    """
    ids, packed = check_cache(cache, tokens, model), states.pack(cache)
    tensors = {name: x.detach().cpu().contiguous() for name, x in packed.tensors.items()} | {_TOKENS: ids.contiguous()}
    # One file holds no memory twice; layers of a stack share theirs.
    tensors = {name: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x for name, x in tensors.items()}
    said = {"format": FORMAT, **vars(fingerprint(model)), "cache": packed.layers, "notes": notes or {}}
    header = {"format": "pt", _HEADER: json.dumps(said | {"sha256": _checksum(tensors)})}
    write_bytes(_target(file), save(tensors, header))
    return Path(file)


def load_state(file: str | Path, model: PreTrainedModel) -> tuple[Cache, Tensor]:
    """Open what `save_state` has saved.

    Args:
        file: of `save_state`.
        model: the one that was saved with: of the same weights, adapters, mixers, windows and dtype.

    Returns:
        The cache, for `past_key_values`, and the tokens of the text, int64 [tokens], of which it holds all, or all but
        the last.

    Raises:
        InputError: the file is no state, is damaged, is of a newer version, or does not fit the model.
    """
    return read_state(file, model)[:2]


def read_state(file: str | Path, model: PreTrainedModel) -> tuple[Cache, Tensor, dict[str, Any]]:
    """As `load_state`, with the notes."""
    path = Path(file)
    if not path.is_file():
        raise InputError(
            f"{path}: there is no such file; save a state first by `linearize generate DIR --save-state {path}`"
        )
    read_header(path)
    problem, advice = "holds no state that can be read", f"save it anew by `linearize generate DIR --save-state {path}`"
    header = _said(path)
    if header is None:
        raise InputError(f"{path}: is a safetensors file, but no saved state; give one of save_state or --save-state")
    with reading(path, problem, advice):
        said = json.loads(header)
        if said["format"] > FORMAT:
            raise InputError(
                f"{path}: is of format {said['format']}; this version reads up to {FORMAT}; upgrade linearize"
            )
        _check_model(path, said, fingerprint(model))
        tensors = load_file(path)
        if _checksum(tensors) != said["sha256"]:
            raise ValueError("its tensors are not those that were saved: sha256 differs")
        ids, notes = tensors.pop(_TOKENS), dict(said["notes"])
        paths = attention_layers(model)
        devices = {i: next(model.get_submodule(paths[i]).parameters()).device for i in paths}
        cache = states.unpack(states.Packed(said["cache"], tensors), lambda i: devices.get(i, model.device))
        check_cache(cache, ids, model)
    return cache, ids, notes


def _check_model(path: Path, said: dict[str, Any], own: Fingerprint) -> None:
    """Refuse the state of another model, naming the first difference."""
    where = f"{path}: does not fit this model:"
    if said["dtype"] != own.dtype:
        raise InputError(
            f"{where} it was saved in {said['dtype']}, and the model is in {own.dtype}; {_ANEW}, or load the model in "
            "that dtype"
        )
    if said["layers"].keys() != own.layers.keys():
        raise InputError(
            f"{where} its linearized layers are {', '.join(said['layers'])}, those of the model "
            f"{', '.join(own.layers)}; {_ANEW}"
        )
    for index, mixer in own.layers.items():
        theirs = said["layers"][index]
        for key in {**theirs, **mixer}:
            if theirs.get(key) != mixer.get(key):
                raise InputError(
                    f"{where} layer {index} had {key} {theirs.get(key)}, and has {mixer.get(key)}; {_ANEW}"
                )
    if said["configuration"] != own.configuration:
        raise InputError(f"{where} its configuration is another (config.json); {_ANEW}")
    if said["weights"] != own.weights:
        raise InputError(f"{where} its weights or adapters are others; {_ANEW}")
