"""Blocks of tokens to train on: read text, tokenise it once, cut it into blocks, draw them in a fixed order.

Documents of a data set are tokenised one after the other with the end-of-text token between them; the long row of
tokens is kept in a file (in ``LINEARIZE_CACHE``, else ``~/.cache/linearize``) and cut into blocks of ``seq_len``. The
order of the blocks is a function of the seed alone: neither the number of processes nor a resume changes it.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from linearize.checkpoint.atomic import sweep, whole_file
from linearize.checkpoint.copying import sha256
from linearize.checkpoint.room import cache_folder, check_memory
from linearize.checkpoint.text import check_ids
from linearize.errors import InputError, disk_error
from linearize.progress import byte_progress
from linearize.recipe.schema import Data
from linearize.recovery.documents import PIECE, Documents, Text, documents, is_local

DOCUMENTS_AT_ONCE = 256
TAIL = 1 << 12
"""Characters before the end of a piece of a long document in which a good place to cut it is looked for."""
BLOCK = 16
"""Bytes of memory for each block of a run."""
NO_MATTER = {"name_or_path", "chat_template", "model_max_length", "tokenizer_file", "tokenizer_object", "verbose"}
NO_MATTER |= {"special_tokens_map_file", "local_files_only", "is_local", "padding_side", "truncation_side", "backend"}
"""Settings of a tokenizer that change no token of a text, or that stand in its own state."""
DIGEST = 32
"""Bytes behind the tokens in a file of the cache: their sha256."""


class Blocks(Sequence):
    """The blocks of a training run, in the order in which it sees them.

    Each data set gives its share of *every* prefix of the run, to within one block, and its own blocks in a shuffled
    order, reshuffled when it has to start again.

    Args:
        rows: one long row of token ids per data set, int32 ``[tokens]``, each at least ``seq_len`` long.
        weights: share of each data set, any positive numbers.
        seq_len: tokens in a block.
        count: blocks in the run.
        seed: changes the order and nothing else.
        hold: keep the last block of the data set with the largest share out of the run.

    Attributes:
        epochs: how often the run goes through each data set.
        held: token ids int64 ``[seq_len]`` of the block that is kept out, or None.
    """

    def __init__(
        self, rows: Sequence[np.ndarray], weights: Sequence[float], seq_len: int, count: int, seed: int = 0,
        hold: bool = False,
    ):  # fmt: skip
        self.held: torch.Tensor | None = None
        if hold:
            largest = int(np.argmax(weights))
            self.held = torch.from_numpy(rows[largest][-seq_len:].astype(np.int64))
            rows = [row[:-seq_len] if which == largest else row for which, row in enumerate(rows)]
        self.rows, self.seq_len = rows, seq_len
        sizes = [len(row) // seq_len for row in rows]
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        taken = np.zeros(len(rows), dtype=np.int64)
        order = [self._shuffled(seed, which, 0, size) for which, size in enumerate(sizes)]
        self.plan = np.empty((count, 2), dtype=np.int64)
        for index in range(count):
            which = int(np.argmax(shares * (index + 1) - taken))
            epoch, step = divmod(int(taken[which]), sizes[which])
            if step == 0 and epoch:
                order[which] = self._shuffled(seed, which, epoch, sizes[which])
            self.plan[index] = which, order[which][step]
            taken[which] += 1
        self.epochs = [float(n / size) for n, size in zip(taken, sizes, strict=True)]

    @staticmethod
    def _shuffled(seed: int, which: int, epoch: int, size: int) -> np.ndarray:
        return np.random.default_rng([seed, which, epoch]).permutation(size)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Token ids int64 ``[seq_len]`` of the block at an index, ``[n, seq_len]`` of the blocks of a slice."""
        if isinstance(index, slice):
            return torch.stack([self[i] for i in range(*index.indices(len(self)))])
        which, block = self.plan[index]
        start = int(block) * self.seq_len
        return torch.from_numpy(self.rows[which][start : start + self.seq_len].astype(np.int64))

    def distinct(self) -> Iterator[torch.Tensor]:
        """Token ids int64 ``[seq_len]`` of every block of the run, each once."""
        _, first = np.unique(self.plan, axis=0, return_index=True)
        return (self[int(index)] for index in first)


def blocks(
    sources: Sequence[Data],
    tokenizer: Any,
    seq_len: int,
    count: int,
    seed: int = 0,
    hold: bool = False,
    vocabulary: int | None = None,
) -> Blocks:
    """Tokenise a mixture of data sets and lay out the blocks of a run.

    Args:
        sources: entries of a recipe's ``data``.
        tokenizer: of the model to be trained.
        seq_len: tokens in a block.
        count: blocks in the run.
        seed: of the order.
        hold: as in :class:`Blocks`.
        vocabulary: rows of the model's embedding, which every token must have one of; None does not look.

    Returns:
        The blocks, in the order of the run.

    Raises:
        InputError: a data set cannot be read, lacks the column, is empty, or is smaller than one block.
    """
    advice = "read less (tokens), or longer blocks (seq_len)"
    check_memory(BLOCK * count, f"data: the order of {count:,} blocks of {seq_len:,} tokens", advice)
    rows = []
    for source in sources:
        row = tokens(source, tokenizer)
        if vocabulary is not None:
            check_ids(torch.from_numpy(row.max(keepdims=True).astype(np.int64)), vocabulary, tokenizer, source.path)
        needed = seq_len * (1 + hold)
        if len(row) < needed:
            each = f"one block needs {seq_len}" + f", one more is held back, so {needed} are needed" * hold
            raise InputError(
                f"data: {source.path!r} holds {len(row)} tokens, {each} (train.seq_len); give it more text or lower "
                "seq_len"
            )
        rows.append(row)
    return Blocks(rows, [source.weight for source in sources], seq_len, count, seed, hold)


def contents(sources: Sequence[Data]) -> list[str | None]:
    """For each data set a text that changes when its local files do; None for one on the Hub, or gone."""
    known: list[str | None] = []
    for source in sources:
        known.append(None)
        with suppress(InputError):
            if is_local(source.path):
                known[-1] = hashlib.sha256(documents(source).content.encode()).hexdigest()
    return known


def tokens(source: Data, tokenizer: Any) -> np.ndarray:
    """All tokens of one data set, documents separated by the end-of-text token, from the cache if they are there.

    Args:
        source: an entry of a recipe's ``data``.
        tokenizer: of the model to be trained.

    Returns:
        int32 ``[tokens]``, mapped from a file.

    Raises:
        InputError: the data set cannot be read, lacks the column or holds no text, or the tokenizer has no end-of-text
            token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "tokenizer: it has no end-of-text token, which separates documents; set eos_token in tokenizer_config.json"
        )
    read = documents(source)
    key = hashlib.sha256(f"3 {read.content} {source.column} {_fingerprint(tokenizer)}".encode()).hexdigest()[:32]
    file = cache_folder() / f"tokens-{key}.bin"
    row = _kept(file)
    if row is None:
        if os.path.isfile(file):
            print(f"{file}: is damaged or may not be read, so the text is tokenised again", file=sys.stderr)
        with in_cache(file.parent, "the tokens"):
            file.parent.mkdir(parents=True, exist_ok=True)
            sweep(file.parent)
            _tokenise(read, source, tokenizer, file)
        row = _kept(file)
    if row is None:
        raise InputError(f"{file}: changes while it is read; set LINEARIZE_CACHE to a folder of your own")
    return row


@contextmanager
def in_cache(folder: Path, what: str) -> Iterator[None]:
    """Turn what the file system says about the cache into one paragraph.

    Args:
        folder: in the cache.
        what: is to be kept there.

    Raises:
        InputError: it cannot be kept there.
    """
    try:
        yield
    except Exception as error:
        ours = not isinstance(error, InputError) or str(error).startswith(f"{folder}")  # else of a file that is read
        if not ours or (said := disk_error(error)) is None:
            raise
        raise InputError(
            f"{folder}: {what} cannot be kept there ({said}); free some space, or set LINEARIZE_CACHE to another "
            "folder that you may write to; --resume goes on from the last checkpoint, if there is one"
        ) from error


def _kept(file: Path) -> np.ndarray | None:
    """The tokens in a file of the cache, int32 [tokens], mapped; None where they are not all there and unchanged."""
    if not os.path.isfile(file):
        return None
    try:
        content = np.memmap(file, dtype=np.uint8, mode="r")
    except (OSError, ValueError):  # the latter: it is empty
        return None
    row, digest = content[:-DIGEST], content[-DIGEST:]
    whole = len(row) and len(row) % 4 == 0 and hashlib.sha256(row.data).digest() == digest.tobytes()
    return row.view(np.int32) if whole else None


def _tokenise(read: Documents, source: Data, tokenizer: Any, file: Path) -> None:
    digest = hashlib.sha256()
    with byte_progress(f"tokenising {source.path}", read.total) as advance, whole_file(file) as out:
        for ids in _encoded(read.read(advance), tokenizer):
            content = np.asarray(ids, dtype=np.int32).tobytes()
            out.write(content)
            digest.update(content)
        if out.tell() == 0:
            raise InputError(
                f"data: {source.path!r} holds no text in column {source.column!r}, or none that the tokenizer leaves "
                "anything of; check the file"
            )
        out.write(digest.digest())


def _encoded(texts: Iterable[Text], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of one document after the other, the end token behind each; nothing of one that comes to nothing."""
    # verbose: a document longer than the model's context is no mistake here.
    (nothing,) = tokenizer([""], verbose=False)["input_ids"]
    for batch in _batches(texts):
        if isinstance(batch, list):
            rows = tokenizer(batch, verbose=False)["input_ids"] if batch else []
            for ids in rows:
                if ids and ids != nothing:
                    yield ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
            continue
        last = None
        for ids in _long(batch, tokenizer):
            last = ids[-1]
            yield ids
        if last not in (None, tokenizer.eos_token_id):
            yield [tokenizer.eos_token_id]


def _batches(texts: Iterable[Text]) -> Iterator[list[str] | Iterator[str]]:
    """Documents to be tokenised together, no more than a piece of text in all; a longer one by itself, in pieces."""
    batch, size = [], 0
    for text in texts:
        if isinstance(text, str) and len(text) <= PIECE:
            if len(batch) == DOCUMENTS_AT_ONCE or size + len(text) > PIECE:
                yield batch
                batch, size = [], 0
            if text.strip():
                batch.append(_readable(text))
                size += len(text)
        elif text is not None:
            yield batch
            batch, size = [], 0
            parts = (text[at : at + PIECE] for at in range(0, len(text), PIECE)) if isinstance(text, str) else text
            yield map(_readable, parts)
    yield batch


def _readable(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _long(parts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of a long document, piece by piece, so that memory does not grow with it.

    It is cut before a word, where byte-level tokenizers cut it too; at the space, where the tokenizer puts one before
    each text. The ids are those of the whole then. A piece without any space is cut where it ends: there, and where a
    normalizer or a merge would reach over a cut, they may differ by a token or two.
    """

    def ids(text: str) -> list[int]:
        return tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]

    sample = tokenizer(["a"], return_special_tokens_mask=True, verbose=False)
    special, mask = sample["input_ids"][0], sample["special_tokens_mask"][0]
    before = next((i for i, is_special in enumerate(mask) if not is_special), len(mask))
    after = next((i for i, is_special in enumerate(reversed(mask)) if not is_special), 0)
    drops = ids("a b") != ids("a") + ids(" b") and ids("a b") == ids("a") + ids("b")
    rest, empty = "", True
    for part in chain(parts, [None]):
        text = rest + (part or "")
        if part is not None:
            start, tail = max(0, len(text) - TAIL), text[-TAIL:]
            cuts = [match.start() for match in re.finditer(r"(?<=\S) (?=[^\W\d_])", tail)]
            cuts = cuts or [match.start() for match in re.finditer(r"\s(?=\S)", tail)]
            cut = start + cuts[-1] if cuts else len(text)
            text, rest = text[:cut], text[cut + (drops and text[cut : cut + 1] == " ") :]
        if encoded := ids(text) if text.strip() or not empty else []:
            yield [*special[:before], *encoded] if empty else encoded
            empty = False
    if not empty and after:
        yield special[-after:]


def _fingerprint(tokenizer: Any) -> str:
    """A text that changes when the tokenizer would write other ids: its class, its settings, the content of its files.

    The names of folders say nothing, and chat templates and lengths change no id of a text.
    """
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in NO_MATTER}
    for name, value in settings.items():
        if isinstance(value, str) and os.path.isfile(value):
            settings[name] = sha256(Path(value))
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(truncation=None, padding=None)  # left over from the last call, set anew by the next
    else:
        state = [tokenizer.get_vocab(), tokenizer.special_tokens_map]
    settings["split_special_tokens"] = tokenizer.split_special_tokens  # may be set later
    known = [type(tokenizer).__name__, settings, state, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
