"""Gives the tasks in this folder their items, from ../data beside it: no working directory, Hub or variable needed."""

import gzip
import json
from pathlib import Path

import datasets

DATA = Path(__file__).resolve().parent.parent / "data"


def load(items: str, **_) -> dict[str, datasets.Dataset]:
    """Called by lm-eval with the `dataset_kwargs` of a task, and with metadata that is of no use here."""
    with gzip.open(DATA / f"{items}.jsonl.gz", "rt", encoding="utf-8") as file:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in file])}
