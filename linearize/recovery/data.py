"""Blocks of tokens to train on: read text, tokenise it once, cut it into blocks, draw them in a fixed order.

Documents of a data set are tokenised one after the other with the end-of-text token between them; the long row of
tokens is kept in a file (in ``LINEARIZE_CACHE``, else ``~/.cache/linearize``) and cut into blocks of ``seq_len``. The
order of the blocks is a function of the seed alone: neither the number of processes nor a resume changes it.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError

from linearize.checkpoint.copying import sha256
from linearize.errors import InputError, suggest
from linearize.progress import step_progress
from linearize.recipe.resources import package_folder
from linearize.recipe.schema import Data

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
DOCUMENTS_AT_ONCE = 256


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
    sources: Sequence[Data], tokenizer: Any, seq_len: int, count: int, seed: int = 0, hold: bool = False
) -> Blocks:
    """Tokenise a mixture of data sets and lay out the blocks of a run.

    Args:
        sources: entries of a recipe's ``data``.
        tokenizer: of the model to be trained.
        seq_len: tokens in a block.
        count: blocks in the run.
        seed: of the order.
        hold: as in :class:`Blocks`.

    Returns:
        The blocks, in the order of the run.

    Raises:
        InputError: a data set cannot be read, lacks the column, is empty, or is smaller than one block.
    """
    rows = []
    for source in sources:
        row = tokens(source, tokenizer)
        needed = seq_len * (1 + hold)
        if len(row) < needed:
            each = f"one block needs {seq_len}" + f", one more is held back, so {needed} are needed" * hold
            raise InputError(
                f"data: {source.path!r} holds {len(row)} tokens, {each} (train.seq_len); give it more text or lower "
                "seq_len"
            )
        rows.append(row)
    return Blocks(rows, [source.weight for source in sources], seq_len, count, seed, hold)


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
    documents, content = _open(source)
    key = hashlib.sha256(f"1 {content} {source.column} {_fingerprint(tokenizer)}".encode()).hexdigest()[:32]
    file = cache_folder() / f"tokens-{key}.bin"
    if not file.exists():
        _tokenise(documents, source, tokenizer, file)
    return np.memmap(file, dtype=np.int32, mode="r")


def cache_folder() -> Path:
    """Where tokenised data sets and what sources say of them are kept; safe to delete at any time."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linearize"
    return Path(os.environ.get("LINEARIZE_CACHE") or default)


@contextmanager
def whole_file(file: Path) -> Iterator[Any]:
    """A file to write into, of which other processes, or the next run after a crash, see all or nothing."""
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as out:
        try:
            yield out
        except BaseException:
            os.unlink(out.name)
            raise
    os.replace(out.name, file)


def _tokenise(documents: datasets.Dataset, source: Data, tokenizer: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with step_progress(f"tokenising {source.path}", len(documents)) as advance, whole_file(file) as out:
        for batch in documents.select_columns([source.column]).iter(DOCUMENTS_AT_ONCE):
            texts = dict(batch)[source.column]
            for ids in _encoded(texts, documents, source, tokenizer):
                out.write(np.asarray(ids, dtype=np.int32).tobytes())
            advance(len(texts))
        if out.tell() == 0:
            raise InputError(f"data: {source.path!r} holds no text in column {source.column!r}; check the file")


def _encoded(texts: list[Any], documents: datasets.Dataset, source: Data, tokenizer: Any) -> Iterator[list[int]]:
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise InputError(
                f"data: {source.path!r}: column {source.column!r} holds {type(text).__name__}, expected text; "
                f"columns there: {', '.join(documents.column_names)}"
            )
    texts = [text for text in texts if text and text.strip()]
    # verbose: a document longer than the model's context is no mistake here.
    for ids in tokenizer(texts, verbose=False)["input_ids"] if texts else ():
        yield ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _open(source: Data) -> tuple[datasets.Dataset, str]:
    """The documents of a data set, and a text that changes when its content does."""
    files = _files(source.path)
    datasets.disable_progress_bars()
    where = os.path.expanduser(source.path)
    options: dict[str, Any] = {}
    if files:
        where = READERS[_kind(files[0])]
        # Local files have no splits: what the recipe calls theirs ("train", "train[:10%]") is made of all of them.
        options["data_files"] = {source.split.partition("[")[0]: [str(file) for file in files]}
        if where == "text":
            options["sample_by"] = "document"
    try:
        documents: Any = datasets.load_dataset(where, split=source.split, **options)
    except (OSError, ValueError, DatasetsError) as error:
        # datasets wraps what was wrong with a file into a sentence that does not say it.
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        hint = "" if files else "; is the Hub within reach, and the name right? A local file or folder works offline"
        raise InputError(
            f"data: cannot read {source.path!r}, split {source.split!r}: {cause.splitlines()[0]}{hint}"
        ) from error
    if source.column not in documents.column_names:
        raise InputError(
            f"data: {source.path!r} has no column {source.column!r}. {suggest(source.column, documents.column_names)}"
        )
    if files:
        return documents, f"{source.split} {[sha256(file) for file in files]}"
    return documents, documents._fingerprint


def embedded() -> list[str]:
    """Names of the data sets that come with the package."""
    folder = package_folder("recipes") / "data"
    return sorted(file.name.removesuffix(".jsonl.gz") for file in folder.glob("*.jsonl.gz"))


def _files(path: str) -> list[Path]:
    """The local files that a recipe's ``path`` means; none if it is a folder or the id of a data set on the Hub."""
    if path in embedded():
        return [package_folder("recipes") / "data" / f"{path}.jsonl.gz"]
    files = sorted(Path(match) for match in glob(os.path.expanduser(path), recursive=True) if os.path.isfile(match))
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1 or not kinds <= set(READERS):
        raise InputError(
            f"data: {path!r}: cannot read {', '.join(sorted(kinds))} as one data set; "
            f"allowed: one of {', '.join(READERS)}, also with .gz behind it"
        )
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and _kind(Path(path)) not in READERS
    if not files and not is_hub_id and not os.path.isdir(os.path.expanduser(path)):
        raise InputError(
            f"data: found nothing named {path!r}; allowed: a local file or glob, a data set on the Hub as owner/name, "
            f"or an embedded text. {suggest(path, embedded())}"
        )
    return files


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _fingerprint(tokenizer: Any) -> str:
    """A text that changes when the tokenizer would write other ids."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(truncation=None, padding=None)  # left over from the last call, set anew by the next
    else:
        state = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
