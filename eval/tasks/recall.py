"""Gives the recall tasks in this folder their items: those of `linearize eval`, for the tokenizer that lm-eval is told.

    lm_eval --model hf --model_args pretrained=DIR --include_path eval/tasks --tasks recall \
        --metadata '{"pretrained": "DIR", "lengths": [256, 1024]}'
"""

import datasets
from transformers import AutoTokenizer

from linearize.errors import InputError
from linearize.evaluation import recall


def load(
    task: str,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    lengths: tuple[int, ...] = (1024,),
    items: int = 10,
    seed: int = 0,
    twice: bool = False,
    **_,
) -> dict[str, datasets.Dataset]:
    """Called by lm-eval with the `dataset_kwargs` of a task and its metadata; `items` are per length and depth."""
    name = tokenizer or pretrained
    if not name:
        raise InputError(
            f"recall_{task}: no tokenizer given, by whose tokens the prompts get their lengths; add it by --metadata "
            '\'{"pretrained": "DIR"}\''
        )
    opened = AutoTokenizer.from_pretrained(name)
    rows = [
        {"prompt": prompt, "answer": answer, "length": length, "depth": depth}
        for length in lengths
        for depth in recall.depths(task)
        for item in recall.items(task, opened, length, seed, items, depth, twice)
        for prompt, answer in item.steps
    ]
    return {"test": datasets.Dataset.from_list(rows)}
