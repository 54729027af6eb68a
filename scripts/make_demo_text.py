"""Build recipes/data/demo-text.jsonl.gz, the training text of the demo, from larger collections of free text.

    python scripts/make_demo_text.py COLLECTIONS [--avoid FOLDER ...] [--out recipes/data/demo-text.jsonl.gz]

COLLECTIONS holds one ``<name>.jsonl.gz`` per row of ``BYTES``, each line with ``text``, ``source`` and ``id``; where
each collection comes from is written in recipes/data/README.md. Every choice follows from hashes of these fields, so
the same collections always give the same text. A passage that shares 13 words in a row with a text under an
``--avoid`` folder (``*.jsonl``, ``*.jsonl.gz``, ``*.txt``: benchmarks, held-out text) is left out.
"""

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Bytes of text from each collection: about one million tokens of SmolLM2 in all, the encyclopaedic part largest.
BYTES = {
    "openstax": 1_250_000,
    "books": 800_000,
    "usgov_blogs": 650_000,
    "papers_qasper": 600_000,
    "technical_docs": 400_000,
    "us_speeches": 400_000,
}
PASSAGE = 8_000  # characters at most: many subjects are worth more to a short training than whole books
PASSAGES_PER_DOCUMENT = 12  # books are few and long
RUN = 13  # words in a row that count as the same text


def rank(*parts: object) -> int:
    """A number that depends on the parts alone: sorting by it shuffles."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a .jsonl or .jsonl.gz, or a .txt as one row."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines) if ".jsonl" in path.name else [{"text": lines.read()}]


def runs(text: str) -> set[int]:
    """Hashes of all runs of ``RUN`` words, case and punctuation ignored."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}


def strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def forbidden(folders: Iterable[Path]) -> set[int]:
    """Runs of all texts under the folders."""
    paths = (
        path for folder in folders for path in folder.rglob("*") if path.name.endswith((".jsonl", ".jsonl.gz", ".txt"))
    )
    return {run for path in paths for row in rows(path) for text in strings(row) for run in runs(text)}


def passages(document: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Cut a document at blank lines into pieces of at most ``PASSAGE`` characters; keep a few, in shuffled order."""
    pieces: list[str] = []
    for paragraph in document["text"].split("\n\n"):
        if pieces and len(pieces[-1]) + len(paragraph) + 2 <= PASSAGE:
            pieces[-1] += "\n\n" + paragraph
        elif paragraph.strip():
            pieces.append(paragraph)
    order = sorted(range(len(pieces)), key=lambda index: rank(document["id"], index))
    for index in order[:PASSAGES_PER_DOCUMENT]:
        if 1_000 <= len(pieces[index]) <= PASSAGE:  # shorter: a heading or a rest; longer: a table without blank lines
            yield index, pieces[index].strip()


def choose(name: str, collection: Path, avoid: set[int]) -> Iterator[dict[str, str]]:
    """One passage of every document in a shuffled order, then the second of each, until the bytes are there."""
    candidates = [
        (turn, rank(document["id"]), index, document["id"], document["source"], text)
        for document in rows(collection)
        for turn, (index, text) in enumerate(passages(document))
    ]
    size, taken = 0, set()
    for _, _, index, identity, source, text in sorted(candidates):
        if size >= BYTES[name]:
            return
        key = f"{identity}#{index}"  # some textbooks share chapters
        if key not in taken and runs(text).isdisjoint(avoid):
            taken.add(key)
            size += len(text.encode())
            yield {"text": text, "source": source, "id": key}


def main() -> None:
    """Choose, pack, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collections", type=Path)
    parser.add_argument("--avoid", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("recipes/data/demo-text.jsonl.gz"))
    arguments = parser.parse_args()

    avoid = forbidden(arguments.avoid)
    chosen: list[dict[str, str]] = []
    for name in BYTES:
        part = list(choose(name, arguments.collections / f"{name}.jsonl.gz", avoid))
        print(f"{name}: {len(part)} passages, {sum(len(row['text'].encode()) for row in part):,} bytes")
        chosen += part
    chosen.sort(key=lambda row: rank("order", row["id"]))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # No file name and no time in the header: the same rows give the same bytes.
    with arguments.out.open("wb") as out, gzip.GzipFile("", "wb", fileobj=out, compresslevel=9, mtime=0) as packed:
        packed.write(lines.encode())
    print(f"{arguments.out}: {len(chosen)} passages, {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
