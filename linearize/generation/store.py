"""States that are kept: whoever reads a text that begins as an earlier one goes on from there."""

import contextlib
import hashlib
import os
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from linearize.checkpoint.atomic import sweep
from linearize.checkpoint.states import check_cache, copied, fingerprint, held_bytes, load_state, save_state
from linearize.errors import InputError

_FILE = re.compile(r"[0-9a-f]{16}-\d+-[0-9a-f]{32}\.safetensors")


class StateStore:
    """States by the tokens of what was read and by the model that read it; those used longest ago go first.

    Args:
        bytes_limit: of all states together; one that is larger is not kept.
        folder: where they are kept, as files of `save_state`, beyond the end of the process; several processes may
            share it. None keeps them in memory, on the device of the model.

    Raises:
        InputError: the limit is no positive number, or the folder cannot be made.

    Example:
        >>> store = linearize.StateStore(1 << 30, "states")
    """

    def __init__(self, bytes_limit: int, folder: str | Path | None = None):
        if not isinstance(bytes_limit, int) or bytes_limit < 1:
            raise InputError(f"store: bytes_limit is {bytes_limit!r}; expected a whole number of at least 1")
        self.bytes_limit, self.folder = bytes_limit, None if folder is None else Path(folder).expanduser()
        self._kept: dict[str, tuple[Cache, Tensor, int]] = {}  # the last used at the end
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"{self.folder}: the folder of the store cannot be made ({error.strerror}); choose another"
                ) from error
            sweep(self.folder)

    def longest(self, tokens: Tensor, model: PreTrainedModel) -> tuple[Cache | None, int]:
        """The state of the longest kept text with which this one begins.

        Args:
            tokens: int64 [tokens].
            model: that is to go on from it.

        Returns:
            A copy of the cache, and how many tokens it holds; None and 0 where nothing fits.

        Raises:
            InputError: several texts, or a model that is not linearized.
        """
        if tokens.numel() != tokens.shape[-1]:
            raise InputError(f"store: tokens are {list(tokens.shape)}; one text at a time is looked up")
        ids, digest, names = tokens.detach().to("cpu", torch.int64).flatten(), fingerprint(model).digest, self._names()
        own = [name for name in names if name.startswith(f"{digest}-")]
        hashed, done, fitting = hashlib.sha256(), 0, []
        for length in sorted({int(name.split("-")[1]) for name in own}):
            if length > len(ids):
                break
            hashed.update(ids[done:length].numpy().tobytes())
            done, name = length, f"{digest}-{length}-{hashed.hexdigest()[:32]}.safetensors"
            if name in names:
                fitting.append((name, length))
        for name, length in reversed(fitting):
            cache = self._take(name, ids[:length], model)
            if cache is not None:
                return cache, length
        return None, 0

    def put(self, tokens: Tensor, cache: Cache, model: PreTrainedModel) -> bool:
        """Keep a copy of a state.

        Args:
            tokens: int64 [tokens], as `save_state` takes them.
            cache: of one text; it stays as it is.
            model: that has filled it.

        Returns:
            Whether it is kept: not where it is larger than the limit.

        Raises:
            InputError: they do not belong together, or the folder cannot be written to.
        """
        ids = check_cache(cache, tokens, model)[: int(cache.get_seq_length())]
        size = held_bytes(cache)
        if size > self.bytes_limit:
            return False
        digest, hashed = fingerprint(model).digest, hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:32]
        name = f"{digest}-{len(ids)}-{hashed}.safetensors"
        if self.folder is None:
            kept = self._kept.pop(name, None)
            self._kept[name] = kept or (copied(cache), ids.clone(), size)
        elif not self._touch(name):
            save_state(cache, ids, model, self.folder / name)
        self._make_room()
        return name in self._names()

    @property
    def nbytes(self) -> int:
        """Bytes of all states that are kept now, those of other models among them."""
        return sum(size for _, size in self._sizes())

    def _names(self) -> set[str]:
        return {name for name, _ in self._sizes()}

    def _sizes(self) -> list[tuple[str, int]]:
        """Names and bytes, the longest unused first."""
        if self.folder is None:
            return [(name, size) for name, (_, _, size) in self._kept.items()]
        files = []
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another process has just removed it
                    if _FILE.fullmatch(entry.name):
                        files.append((entry.stat().st_mtime_ns, entry.name, entry.stat().st_size))
        return [(name, size) for _, name, size in sorted(files)]

    def _make_room(self) -> None:
        sizes = self._sizes()
        total = sum(size for _, size in sizes)
        for name, size in sizes:
            if total <= self.bytes_limit:
                break
            self._drop(name)
            total -= size

    def _drop(self, name: str) -> None:
        self._kept.pop(name, None)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()

    def _touch(self, name: str) -> bool:
        """Note that a file was used; False where there is none."""
        try:
            os.utime(self.folder / name)  # type: ignore[operator]
        except OSError:
            return False
        return True

    def _take(self, name: str, ids: Tensor, model: PreTrainedModel) -> Cache | None:
        if self.folder is None:
            kept = self._kept.pop(name)
            self._kept[name] = kept
            cache, tokens = copied(kept[0]), kept[1]
        else:
            try:
                cache, tokens = load_state(self.folder / name, model)
            except InputError:  # another process has removed it, or it is damaged
                self._drop(name)
                return None
            self._touch(name)
        return cache if torch.equal(tokens, ids) else None
