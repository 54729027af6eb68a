"""Questions with lettered options, asked again with the options rotated: is it the question that a model answers?

In rotation r the option at index r stands first, and those before it go to the end; the letters stay. An
item with k options is asked k times, as in CircularEval (arXiv 2307.06281), and every letter is right equally often:
who always says A has 1 / k right, and no item in all of its rotations. Only items are rotated here; lm-eval's own task
then words them, and lm-eval scores them.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from string import ascii_uppercase
from typing import Any

import numpy as np

from linearize.errors import InputError

Doc = dict[str, Any]


def gold(task: Any, doc: Doc, target: Any = None) -> int | None:
    """Index of the right choice of an item; None where lm-eval names none or several.

    Args:
        task: of lm-eval, multiple choice.
        doc: the item.
        target: what the task says of the item, if it has been asked; the text of a choice, or its index.
    """
    choices = task.doc_to_choice(doc)
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc) if target is None else target
    index = choices.index(right) if right in choices else right
    return index if isinstance(index, int) and 0 <= index < len(choices) else None


def rotations(task: Any, doc: Doc) -> list[Doc]:
    """An item in its rotations 1 to k - 1; empty where its options or its answer cannot be told.

    The options are a list of strings, alone or as `text` beside `label`, that all stand in the prompt. The answer is
    the field whose change moves the task's own answer: an index, counted from 0 or 1, a letter, or one of the labels.

    Args:
        task: of lm-eval, multiple choice.
        doc: the item.
    """
    letters = [choice.strip(" ().") for choice in task.doc_to_choice(doc)]
    right, prompt = gold(task, doc), task.doc_to_text(doc)
    if letters != [*ascii_uppercase[: len(letters)]] or right is None or not isinstance(prompt, str):
        return []
    for key, value in doc.items():
        options = value.get("text") if isinstance(value, dict) else value
        if isinstance(options, list) and len(options) == len(letters) and all(str(each) in prompt for each in options):
            rotated = [_rotated(task, doc, key, options, right, by) for by in range(1, len(letters))]
            return [each for each in rotated if each] if all(rotated) else []
    return []


def _rotated(task: Any, doc: Doc, key: str, options: list[str], right: int, by: int) -> Doc | None:
    moved, new_right = options[by:] + options[:by], (right - by) % len(options)
    changed = {**doc, key: {**doc[key], "text": moved} if isinstance(doc[key], dict) else moved}
    labels = doc[key].get("label") if isinstance(doc[key], dict) else None
    for field, old, new in _answers(doc, labels, right, new_right):
        candidate = {**changed, field: new}
        words = task.doc_to_text(candidate) != task.doc_to_text(doc) or moved == options
        if doc[field] == old and gold(task, candidate) == new_right and words:
            return candidate
    return None


def _answers(doc: Doc, labels: list[str] | None, right: int, moved: int) -> Iterator[tuple[str, Any, Any]]:
    """(field, value if it is the answer, value of the rotated item) for every field and way to name an option."""
    for field, value in doc.items():
        if isinstance(value, str):
            if labels:
                yield field, labels[right], labels[moved]
            yield field, ascii_uppercase[right], ascii_uppercase[moved]
            yield from ((field, str(right + first), str(moved + first)) for first in (0, 1))
        elif isinstance(value, int):
            yield from ((field, right + first, moved + first) for first in (0, 1))


def check(name: str, task: Any) -> None:
    """Refuse a task that cannot be rotated, as its first item shows.

    Args:
        name: of the task, for the message.
        task: of lm-eval.

    Raises:
        InputError: says why.
    """
    reason, first = None, next(iter(task.eval_docs))
    if task.OUTPUT_TYPE != "multiple_choice":
        reason = "is no multiple choice"
    elif task.config.num_fewshot and first in list(task.fewshot_docs()):
        reason = "takes its examples from the items themselves"
    elif not rotations(task, first):
        reason = "does not show options by letters and score the letters, or names options and answer in unknown fields"
    if reason:
        raise InputError(f"tasks: {name}: cannot be rotated: it {reason}; leave out `rotate`")


def with_items(task: Any, docs: list[Doc]) -> Any:
    """The same task with other items, `docs`."""
    task = copy.copy(task)
    task.has_test_docs, task.test_docs = lambda: True, lambda: docs
    return task


def summarize(right: list[list[float]], chosen: list[int]) -> dict[str, Any]:
    """The `rotation` entry of a score in results.json.

    Args:
        right: of each item, the score of each rotation, 0 or 1.
        chosen: index of the letter that was chosen, of every item and rotation.
    """
    items, counts = [float(np.mean(scores)) for scores in right], Counter(chosen)
    letters = range(max(max(counts) + 1, *(len(scores) for scores in right)))
    shares = {ascii_uppercase[i]: counts[i] / len(chosen) for i in letters}
    return {
        "n": len(items),
        "accuracy": float(np.mean(items)),
        "stderr": float(np.std(items, ddof=1)) / math.sqrt(len(items)) if len(items) > 1 else None,
        "consistent": float(np.mean([min(scores) == 1 for scores in right])),
        "letters": shares,
        "most": max(shares.values()),
        "items": items,
    }
