"""The texts of a data set, one after the other: local files are read here, a column of theirs and nothing else.

So neither the other columns nor a guess at their types matters (a date in quotes is text), and no copy is kept: the
reader of ``datasets`` knows a file by path, size and time. It reads what is on the Hub, and folders of other formats.
"""

import csv
import gzip
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from pyarrow import parquet

from linearize.checkpoint.copying import sha256
from linearize.checkpoint.reading import reading
from linearize.checkpoint.room import check_memory
from linearize.errors import InputError, suggest
from linearize.recipe.resources import package_folder
from linearize.recipe.schema import Data

READERS = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".tsv")
AT_ONCE = 256
"""Rows of a table in memory."""
PIECE = 1 << 20
"""Characters of a text file in memory."""
WHOLE = 4
"""Bytes of memory for each byte of a JSON file that is read whole, at least."""
Text = str | Iterator[str] | None
"""A document: as it is, or piece by piece, or none in this row."""


@dataclass(frozen=True)
class Documents:
    """The documents of one entry of a recipe's ``data``.

    Attributes:
        content: a text that changes when they do.
        total: of what `read` reports: bytes of the files, else documents.
        read: yields them; takes a function that is told how much more has been read.
    """

    content: str
    total: int
    read: Callable[[Callable[[int], None]], Iterator[Text]]


def documents(source: Data) -> Documents:
    """Find the documents of a data set.

    Args:
        source: an entry of a recipe's ``data``.

    Raises:
        InputError: there are none; while they are read: they cannot be, or hold no column of text of the name.
    """
    folder = os.path.expanduser(source.path)
    if source.path not in embedded() and os.path.isdir(folder):
        with _reading(source), _plain_name(folder) as (name, scratch):
            splits = datasets.load_dataset_builder(name, cache_dir=scratch).config.data_files or {}
            files = splits.get(re.split(r"[\[+]", source.split)[0], ())
            files = [Path(folder, os.path.relpath(file, name)) for file in files]
        kinds = {_kind(file) for file in files}
        readable = len(kinds) == 1 and kinds <= {*READERS}
        return _local(source, files, lines=True) if readable else _by_datasets(source, folder)
    if files := _files(source.path):
        return _local(source, files)
    return _by_datasets(source, None)


def check(source: Data, whole: bool = True) -> None:
    """Refuse a data set that cannot be read, before work that needs it.

    Args:
        source: part of a recipe's data.
        whole: read its first document, from the Hub too; without, only see whether local files are there.

    Raises:
        InputError: as `documents`.
    """
    if whole:
        next(documents(source).read(_ignore), None)
    else:
        _files(source.path)


@contextmanager
def _plain_name(folder: str) -> Iterator[tuple[str, str]]:
    """A folder under a name that ``datasets`` takes for no pattern, with links to its files, and one to write to."""
    with tempfile.TemporaryDirectory() as scratch:
        if escape(folder) != folder:
            folder = shutil.copytree(os.path.abspath(folder), os.path.join(scratch, "data"), copy_function=os.symlink)
        yield folder, scratch


def _ignore(count: int) -> None:
    pass


def embedded() -> list[str]:
    """Names of the data sets that come with the package."""
    folder = package_folder("recipes") / "data"
    return sorted(file.name.removesuffix(".jsonl.gz") for file in folder.glob("*.jsonl.gz"))


def is_local(path: str) -> bool:
    """Whether a recipe's ``path`` means files of this machine.

    Raises:
        InputError: it means nothing.
    """
    return os.path.isdir(os.path.expanduser(path)) or bool(_files(path))


def local_files(sources: Iterable[Data]) -> list[Path]:
    """What data sets read of this machine: files, or their folder; nothing that comes with the package."""
    read: list[Path] = []
    for path in (source.path for source in sources if source.path not in embedded()):
        with suppress(InputError):  # told where it is read
            folder = Path(os.path.expanduser(path))
            read += [folder] if folder.is_dir() else _files(path)
    return read


def _files(path: str) -> list[Path]:
    """The local files that a recipe's ``path`` means: one of that name, else a pattern; none for an id on the Hub."""
    if path in embedded():
        return [package_folder("recipes") / "data" / f"{path}.jsonl.gz"]
    files = sorted(Path(match) for match in glob(_pattern(path), recursive=True) if os.path.isfile(match))
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1 or not kinds <= set(READERS):
        raise InputError(
            f"data: {path!r}: cannot read {', '.join(sorted(kinds))} as one data set; "
            f"allowed: one of {', '.join(READERS)}, also with .gz behind it"
        )
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and _kind(Path(path)) not in READERS
    if not files and not is_hub_id:
        raise InputError(
            f"data: found nothing named {path!r}; allowed: a local file or glob, a data set on the Hub as owner/name, "
            f"or an embedded text. {suggest(path, embedded())}"
        )
    return files


def _pattern(path: str) -> str:
    """A glob in which the parts of a path that are there as they are written stand for themselves."""
    parts = Path(os.path.expanduser(path)).parts
    there = next(n for n in range(len(parts), -1, -1) if n == 0 or os.path.exists(os.path.join(*parts[:n])))
    return os.path.join("", *(escape(part) for part in parts[:there]), *parts[there:])


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _reading(source: Data) -> Any:
    local = os.path.exists(os.path.expanduser(source.path)) or "*" in source.path
    hint = "" if local else "is the Hub within reach, and the name right? A local file or folder works offline; or "
    return reading(
        f"data: {source.path!r}, split {source.split!r}", "cannot be read", f"{hint}check the file and split"
    )


def _local(source: Data, files: list[Path], lines: bool = False) -> Documents:
    """Local files as one data set. They have no splits: what the recipe calls theirs is made of all of them."""
    names: dict[str, None] = {}

    def everything(advance: Callable[[int], None]) -> Iterator[Any]:
        for file in files:
            yield from _column(file, source.column, names, advance, lines)

    def chosen(advance: Callable[[int], None]) -> Iterator[Any]:
        wanted, parts = datasets.ReadInstruction.from_spec(source.split), [(0, None)]
        if not re.fullmatch(r"\w+", source.split):
            length = {re.split(r"\W", source.split)[0]: sum(1 for _ in everything(_ignore))}
            parts = [(part.from_, part.to) for part in wanted.to_absolute(length)]
        for first, last in parts:
            yield from islice(everything(advance), first, last)

    with _reading(source):
        content = f"{source.split} {[sha256(file) for file in files]}" + " lines" * lines
        total = sum(file.stat().st_size for file in files)
    return Documents(content, total, lambda advance: _texts(source, lambda: chosen(advance), names))


def _texts(source: Data, values: Callable[[], Iterator[Any]], names: dict[str, None]) -> Iterator[Text]:
    """The values of the column, all of which must be text, in a data set that has columns of these names."""
    with _reading(source):
        for value in values():
            if isinstance(value, str | Iterator | None):
                yield value
                continue
            raise InputError(
                f"data: {source.path!r}: column {source.column!r} holds {type(value).__name__}, expected text; "
                f"columns there: {', '.join(names)}"
            )
    if source.column not in names:
        raise InputError(f"data: {source.path!r} has no column {source.column!r}. {suggest(source.column, names)}")


def _column(
    file: Path, column: str, names: dict[str, None], advance: Callable[[int], None], lines: bool
) -> Iterator[Any]:
    """The values of a column in a file; the names of all columns are added to `names`."""
    if _kind(file) == ".parquet":
        yield from _of_parquet(file, column, names, advance)
        return
    with ExitStack() as stack:
        raw = stack.enter_context(file.open("rb"))
        content: Any = stack.enter_context(gzip.open(raw)) if file.name.endswith(".gz") else raw
        told = 0
        if _kind(file) == ".txt":
            names["text"] = None
            content = io.TextIOWrapper(content, encoding="utf-8-sig")
            values: Iterator[Any] = (line.rstrip("\n") for line in content) if lines else iter([_pieces(content)])
        elif _kind(file) in (".csv", ".tsv"):
            content = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
            values = _of_csv(file, content, column, names)
        else:
            values = _of_json(file, content, column, names)
        for value in values:
            yield value if column in names else None
            advance(raw.tell() - told)
            told = raw.tell()


def _pieces(content: io.TextIOWrapper) -> Text:
    first = content.read(PIECE)
    return first if len(first) < PIECE else _chain(first, content)


def _chain(first: str, content: io.TextIOWrapper) -> Iterator[str]:
    while first:
        yield first
        first = content.read(PIECE)


def _of_json(file: Path, content: Any, column: str, names: dict[str, None]) -> Iterator[Any]:
    """One object a line; else one list, of objects or of texts, or one object, which is read whole."""
    for number, line in enumerate(content, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            first = line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            if not names and (first == b"[" or first == b"{" and ".jsonl" not in file.name.lower()):
                advice = "write one object a line (.jsonl), which is read line by line"
                check_memory(WHOLE * file.stat().st_size, f"data: {file}: as one piece of JSON", advice)
                row = json.loads(line + content.read())
            else:
                raise ValueError(f"{file.name}, line {number}: {error}") from error
        for each in row if isinstance(row, list) else [row]:
            fields = {"text": each} if isinstance(each, str) else each
            if not isinstance(fields, dict):
                raise ValueError(f"{file.name}, line {number}: found {type(fields).__name__}, expected an object")
            if len(names) < AT_ONCE or column in fields:
                names |= dict.fromkeys(fields)
            yield fields.get(column)


def _of_csv(file: Path, content: io.TextIOWrapper, column: str, names: dict[str, None]) -> Iterator[str | None]:
    """The first line names the columns; whatever else stands there is text: a number, a date, NA."""
    csv.field_size_limit(sys.maxsize)  # a document is longer than its 128 KiB
    rows = csv.reader(content, delimiter="\t" if _kind(file) == ".tsv" else ",", strict=True)
    header = next(rows, [])
    names |= dict.fromkeys(header)
    at = header.index(column) if column in header else len(header)
    for row in rows:
        if row and len(row) != len(header):
            raise ValueError(
                f"{file.name}, line {rows.line_num}: found {len(row)} fields, and the first line names {len(header)} "
                "columns; a text with the separator, a quote or a line break in it stands in double quotes"
            )
        if row:
            yield row[at] if at < len(row) else None


def _of_parquet(file: Path, column: str, names: dict[str, None], advance: Callable[[int], None]) -> Iterator[Any]:
    with gzip.open(file) if file.name.endswith(".gz") else nullcontext(file) as content:
        table = parquet.ParquetFile(content)
        names |= dict.fromkeys(table.schema_arrow.names)
        if column in table.schema_arrow.names:
            for batch in table.iter_batches(AT_ONCE, columns=[column]):
                yield from batch[column].to_pylist()
        advance(file.stat().st_size)


def _by_datasets(source: Data, folder: str | None) -> Documents:
    """A data set on the Hub, or a folder of other formats, which is read anew: its files may have changed."""

    def load(name: str, **options: Any) -> Any:
        datasets.disable_progress_bars()
        return datasets.load_dataset(name, split=source.split, **options)

    def values(table: Any, advance: Callable[[int], None]) -> Iterator[Any]:
        for batch in table.select_columns([source.column]).iter(AT_ONCE) if source.column in table.column_names else ():
            yield from dict(batch)[source.column]
            advance(len(batch[source.column]))

    def anew(advance: Callable[[int], None], names: dict[str, None]) -> Iterator[Any]:
        with _plain_name(folder or "") as (name, scratch):
            table = load(name, cache_dir=scratch)
            names |= dict.fromkeys(table.column_names)
            yield from values(table, _ignore)
        advance(1)

    with _reading(source):
        if folder is None:
            table = load(source.path)
            names = dict.fromkeys(table.column_names)
            read = lambda advance: _texts(source, lambda: values(table, advance), names)  # noqa: E731
            return Documents(table._fingerprint, len(table), read)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        content = f"{source.split} {[(str(file.relative_to(folder)), sha256(file)) for file in files]}"
    columns: dict[str, None] = {}
    return Documents(content, 1, lambda advance: _texts(source, lambda: anew(advance, columns), columns))
