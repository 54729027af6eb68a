"""The source that a student learns from; and its likeliest tokens, computed once and kept on disk.

There is one file per block of text, in a folder that is named by all that decides its content: the source's weights and
settings, k, the temperature, and the precision it runs in. So a second pass over the data, a resumed run, another
student of the same source and another order of the data read what is there, and the source runs for the rest only.
It reads one block at a time: what is kept does not depend on how a step is divided.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, distributed

from linearize.checkpoint import adapters, shards
from linearize.checkpoint.atomic import sweep, whole_file
from linearize.checkpoint.copying import CHUNK
from linearize.checkpoint.describe import is_new
from linearize.checkpoint.open import base_folder, is_adapter, open_model
from linearize.checkpoint.room import cache_folder, check_space
from linearize.errors import InputError
from linearize.progress import byte_progress
from linearize.recipe.schema import Stage
from linearize.recovery.data import in_cache
from linearize.recovery.head import Deferred, logits_of
from linearize.recovery.losses import Likeliest, likeliest

OTHER = {"linearize", "_name_or_path", "transformers_version", "auto_map", "architectures", "dtype", "model_type"}
"""Keys of a configuration that do not change what the source computes."""


def check_top_k(stage: Stage, config: Any) -> None:
    """Refuse to keep more tokens of a distribution than it has.

    Raises:
        InputError: says how many there are.
    """
    if stage.top_k and stage.top_k > (size := config.get_text_config().vocab_size):
        raise InputError(
            f"train.{stage.name}.top_k: found {stage.top_k}; expected at most the vocabulary, {size} tokens"
        )


class Teacher:
    """The source, for one stage of training.

    Args:
        student: linearized, with adapters or without.
        stage: says what is learned of it.
        folder: the student was opened from.
        device, autocast: how the source runs.
        blocks: token ids [T] of every block of the run, once each.
        any_process: as for `Known`.
        is_main: whether this is the one process that reads the source's weights to name the folder.
        divided: whether weights are divided over processes, so that the source runs whole or not at all.

    Attributes:
        known: the likeliest tokens; None where the stage asks for all.
        about: part of a line for people; empty where nothing is kept.

    Raises:
        InputError: k is more than the vocabulary has, or what the source says cannot be kept.
    """

    def __init__(
        self, student: Any, stage: Stage, folder: Path, device: torch.device,
        autocast: Callable[[], AbstractContextManager], blocks: Iterable[Tensor], any_process: Callable[[bool], bool],
        is_main: bool = True, divided: bool = False,
    ):  # fmt: skip
        self.student, self.stage, self.folder, self.divided = student, stage, folder, divided
        self.device, self.autocast = device, autocast
        self.known, self.about = None, ""
        if k := stage.top_k:
            check_top_k(stage, student.config)
            # The same name in all processes; only one of them reads all weights for it.
            name = [source_hash(folder, student.config, k, stage.temperature, stage.dtype) if is_main else None]
            if distributed.is_available() and distributed.is_initialized():
                distributed.broadcast_object_list(name)
            kept = cache_folder() / f"source-{name[0]}"
            self.known = Known(kept, k, stage.temperature, self.logits, any_process)
            there, missing = self.known.prepare(blocks)
            self.about = f"; the source's {k} likeliest tokens: {there} of {there + missing} blocks known, in {kept}"

    @cached_property
    def model(self) -> Any:
        """The model that `logits` turns into the source: the student itself, unless all of it is trained."""
        if adapters.keeps_source(self.stage.peft):
            return self.student
        with torch.random.fork_rng():  # opened in the first step that needs it, whose random numbers must not move
            model: Any = open_model(self.folder, getattr(torch, self.stage.dtype))
        return model.requires_grad_(False).to(self.device)

    def __call__(self, ids: Tensor) -> Tensor | Deferred | Likeliest:
        """The source's logits [B, T, V] for token ids [B, T], maybe deferred, or its likeliest tokens."""
        return self.logits(ids) if self.known is None else self.known(ids)

    def logits(self, ids: Tensor, **keep: int) -> Tensor | Deferred:
        """Run the source.

        Args:
            ids: token ids int64 [B, T].
            keep: of the model's forward: for how many last tokens logits are wanted.

        Returns:
            [B, T, V], deferred where there are many.
        """
        if not keep and not self.divided:
            return logits_of(self.model, ids, inside=self._inside)
        with self._inside():
            return self.model(input_ids=ids, use_cache=False, **keep).logits

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with self.autocast(), adapters.as_source(self.model):
            yield


class Known:
    """The k likeliest tokens of the source after each token of a text.

    Args:
        folder: where they are kept; its name tells one source, and one way to ask it, from others.
        k: how many tokens.
        temperature: of the distribution.
        run: the source: ids [1, T] -> logits [1, T, V], maybe deferred.
        any_process: told whether this process needs the source for a micro batch, says whether any does: where its
            weights are divided over processes, all must run it together.
    """

    def __init__(
        self, folder: Path, k: int, temperature: float, run: Callable[[Tensor], Tensor | Deferred],
        any_process: Callable[[bool], bool] = bool,
    ):  # fmt: skip
        self.folder, self.k, self.temperature = folder, k, temperature
        self.run, self.any_process = run, any_process

    def __call__(self, ids: Tensor) -> Likeliest:
        """For token ids int64 [B, T]: [B, T, k] on their device.

        Raises:
            InputError: the disk is full, or the folder cannot be written or read.
        """
        rows = ids.cpu()
        known = [self._read(self._file(row), len(row)) for row in rows]
        if self.any_process(None in known):
            for index, row in enumerate(ids):
                asked = likeliest(self.run(row[None]), self.k, self.temperature)
                asked = Likeliest(*(x[0] for x in asked))
                if known[index] is None:
                    known[index] = asked = Likeliest(*(x.cpu() for x in asked))
                    self._write(self._file(rows[index]), asked)
        return Likeliest(*(torch.stack(each).to(ids.device) for each in zip(*known, strict=True)))

    def prepare(self, rows: Iterable[Tensor]) -> tuple[int, int]:
        """Make the folder, and check that the disk has room for what is missing.

        Args:
            rows: token ids int64 [T] of every block that will be asked for.

        Returns:
            How many blocks are there, and how many are not.

        Raises:
            InputError: the disk has no room, or the folder cannot be made.
        """
        with self._kept():
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
        sizes = {self._file(row): len(row) * (6 * self.k + 4) for row in rows}
        missing = [size for file, size in sizes.items() if not file.is_file()]
        check_space(self.folder, sum(missing), "or set LINEARIZE_CACHE to a folder on another disk")
        return len(sizes) - len(missing), len(missing)

    def _file(self, row: Tensor) -> Path:
        return self.folder / f"{hashlib.sha256(row.numpy().tobytes()).hexdigest()[:32]}.safetensors"

    def _read(self, file: Path, length: int) -> Likeliest | None:
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as content:
                known = Likeliest(*(content.get_tensor(name) for name in Likeliest._fields))
                good = content.metadata()["crc32"] == _checksum(known) and known.ids.shape == (length, self.k)
        except (SafetensorError, KeyError, TypeError, OSError):  # the last: not ours to read, or half a disk
            good, known = False, None
        if not good:
            print(f"{file}: is damaged, so the source reads this block again", file=sys.stderr)
        return known if good else None

    def _write(self, file: Path, known: Likeliest) -> None:
        with self._kept(), whole_file(file) as out:
            out.write(save(known._asdict(), {"crc32": _checksum(known)}))

    def _kept(self) -> AbstractContextManager[None]:
        return in_cache(self.folder, "the source's likeliest tokens")


def _checksum(known: Likeliest) -> str:
    value = 0
    for x in known:
        value = zlib.crc32(x.numpy().tobytes(), value)
    return str(value)


def source_hash(model_dir: Path, config: Any, k: int, temperature: float, dtype: str) -> str:
    """Hash all that decides the likeliest tokens of a source: its weights, its settings, and the way to ask it.

    Args:
        model_dir: a converted folder, or adapters on one.
        config: of its model.
        k: how many tokens.
        temperature: of their distribution.
        dtype: the precision it is computed in.

    Returns:
        32 hexadecimal digits.
    """
    base = base_folder(model_dir) if is_adapter(model_dir) else model_dir
    settings = {key: value for key, value in config.to_dict().items() if key not in OTHER}
    settings["model_type"] = config.linearize["source"]["model_type"]
    digest = hashlib.sha256(json.dumps([settings, k, temperature, dtype], sort_keys=True, default=str).encode())
    tensors = [tensor for name, tensor in sorted(shards.read_folder(base).items()) if not is_new(name)]
    with byte_progress("reading the source's weights", sum(tensor.size for tensor in tensors)) as advance:
        for tensor in tensors:
            digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
            with tensor.file.open("rb") as file:
                file.seek(tensor.start)
                for start in range(0, tensor.size, CHUNK):
                    digest.update(file.read(min(CHUNK, tensor.size - start)))
                    advance(min(CHUNK, tensor.size - start))
    return digest.hexdigest()[:32]
