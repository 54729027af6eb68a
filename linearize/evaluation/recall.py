"""Recall beyond the window: generated tasks whose answer stands far back in the prompt, for any tokenizer and length.

A prompt is a line that says what to expect, a context, and a question. The context is facts among filler drawn by the
seed, as much of it as fits the wanted number of tokens. The answer is the text that has to follow; it is right if each
of its tokens is the most likely one given all before it: if greedy decoding would write it, for one forward pass.

`linearize.evaluation.stories` lists the tasks. A task with several answers gives the earlier ones before it asks for
the next; its score is the share of the answers that are right.

Depth is where the asked fact stands, from 0 at the start of the context to 1 at its end. Facts of the tasks without a
depth are spread over all of it, and the pairs of mqar and phonebook become more with the length.
"""

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from linearize.errors import InputError, suggest
from linearize.evaluation.stories import DEEP, STORIES, Story, filler_words
from linearize.evaluation.suite import RecallSpec
from linearize.model.sizes import text_sizes

WINDOW = 64  # tokens that `multiples` count in, for a model without a window
DEPTHS = (0.0, 0.5, 1.0)
TASKS = tuple(STORIES)


@dataclass(frozen=True)
class Item:
    """A prompt, and the text that has to follow it.

    Attributes:
        prompt: head, context and question.
        answer: to the first, or only, question.
        more: what follows the answer, and the answer after that; see `stories.Story`.
        context: characters of the prompt before the question.
    """

    prompt: str
    answer: str
    more: tuple[tuple[str, str], ...] = ()
    context: int = 0

    @property
    def steps(self) -> list[tuple[str, str]]:
        """Every answer, and all the text before it."""
        made = [(self.prompt, self.answer)]
        for text, answer in self.more:
            made.append(("".join(made[-1]) + text, answer))
        return made

    @property
    def text(self) -> str:
        """The prompt and all that has to follow it."""
        return "".join(self.steps[-1])


def depths(task: str) -> tuple[float | None, ...]:
    """Depths at which a task is measured: `(None,)` for a task that has none."""
    return DEPTHS if task in DEEP else (None,)


def check(spec: RecallSpec) -> None:
    """Refuse what cannot be measured.

    Raises:
        InputError: an unknown task (with the nearest names), no task or multiple, one given twice, or one below 1.
    """
    for task in spec.tasks:
        if task not in TASKS:
            raise InputError(f"recall: unknown task {task!r}. {suggest(task, TASKS)}")
    for name, values in (("tasks", spec.tasks), ("multiples", spec.multiples)):
        if not values or len(set(values)) < len(values):
            raise InputError(f"recall: {name} is {values}; expected at least one, each once")
    if min(spec.multiples) < 1:
        raise InputError(f"recall: multiples is {spec.multiples}; expected lengths in windows, 1 or more")


def items(
    task: str, tokenizer: Any, length: int, seed: int, n: int, depth: float | None = None, twice: bool = False
) -> list[Item]:
    """Generate items; the same arguments give the same items, and other lengths and depths the same facts.

    Args:
        task: one of `TASKS`.
        tokenizer: of the model, with its special tokens.
        length: tokens of a prompt with its answer: never more, and less by no more than a word has.
        seed: of facts and filler.
        n: how many items.
        depth: 0 to 1; ignored by tasks that have none, where None stands for 0.
        twice: give head and context twice before the question (JRT, arXiv 2407.05483): the same item, up to twice as
            long.

    Returns:
        `n` items.

    Raises:
        InputError: an unknown task, or a length that cannot hold its facts and question.
    """
    if task not in TASKS:
        raise InputError(f"recall: unknown task {task!r}. {suggest(task, TASKS)}")
    made = []
    for number in range(n):
        rng = random.Random(f"{task} {seed} {number}")
        story = STORIES[task](rng)
        filler = _fitting(story, tokenizer, length, depth or 0.0, rng)
        prompt = _prompt(story, filler, depth or 0.0, twice)
        context = len(prompt) - len(story.separator + story.question)
        made.append(Item(prompt, story.answer, story.more, context))
    return made


def _prompt(story: Story, filler: list[str], depth: float, twice: bool = False) -> str:
    before = [round((depth if share is None else share) * len(filler)) for share in story.shares]
    context = [story.head]
    for i in range(len(filler) + 1):
        context += [fact for fact, start in zip(story.facts, before, strict=True) if start == i]
        context += filler[i : i + 1]
    return story.separator.join([*context, *(context if twice else ()), story.question])


def _fitting(story: Story, tokenizer: Any, length: int, depth: float, rng: random.Random) -> list[str]:
    """As many sentences as fit; the last words of one more, in front, make up for the rest."""

    def tokens(filler: list[str]) -> int:
        text = Item(_prompt(story, filler, depth), story.answer, story.more).text
        return len(tokenizer(text, verbose=False)["input_ids"])

    alone = tokens([])
    if alone > length:
        raise InputError(f"recall: needs {alone} tokens or more, found {length}; use longer prompts")
    sample = list(itertools.islice(story.filler, 16))
    enough = int(1.5 * 16 * (length - alone) / (tokens(sample) - alone)) + 16
    sentences = [*sample, *itertools.islice(story.filler, enough)]
    count = bisect_right(range(len(sentences) + 1), length, key=lambda count: tokens(sentences[:count])) - 1
    words = filler_words(rng)
    ends = [[" ".join(words[-many:])] if many else [] for many in range(len(words) + 1)]
    many = bisect_right(ends, length, key=lambda end: tokens([*end, *sentences[:count]])) - 1
    return [*ends[many], *sentences[:count]]


def _span(tokenizer: Any, before: str, answer: str) -> tuple[int, int]:
    """Where the tokens of an answer begin and end."""
    start, end = (len(tokenizer(text, verbose=False)["input_ids"]) for text in (before, before + answer))
    return start, end


@torch.inference_mode()
def right(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: list[Item],
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Share of each item's answers that greedy decoding would write, given all before: 1.0 or 0.0 where there is one.

    Rows are padded on the right, where a causal model cannot see: no mask is needed.

    Args:
        model: a causal LM; evaluated as it is.
        tokenizer: its tokenizer.
        asked: see `items`.
        batch_size: items per forward pass.
        advance: called with the number of items after each pass.

    Returns:
        A score per item, in order.

    Raises:
        InputError: a prediction is not a number.
    """
    scores = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        spans = [[_span(tokenizer, *step) for step in item.steps] for item in batch]
        rows = [tokenizer(item.text, verbose=False)["input_ids"] for item in batch]
        longest, first = max(map(len, rows)), min(start for span in spans for start, _ in span)
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
        # The logits of whole prompts would take more memory than the model.
        kept = longest - first + 1
        logits = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=kept).logits[:, -kept:]
        if logits.isnan().any():
            raise InputError(
                f"recall: the model's prediction after {first} tokens is not a number; its weights are damaged or its "
                "dtype is too narrow: check them with `linearize inspect`, or evaluate in float32 (--dtype float32)"
            )
        for row, span, predicted in zip(rows, spans, logits.argmax(-1).tolist(), strict=True):
            hits = [predicted[start - first : end - first] == row[start:end] for start, end in span]
            scores.append(sum(hits) / len(hits))
        advance(len(batch))
    return scores


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    spec: RecallSpec,
    window: int | None,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """The `recall` entry of a column of results.json.

    Lengths that the model's context or a task does not allow are no error: their cell says why it is empty.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        spec: tasks, lengths and numbers of items, see `check`.
        window: W that `multiples` count in; None for `WINDOW`.
        seed: of the items.
        batch_size: items per forward pass.
        advance: called with the number of items after each pass, `total` in all.

    Returns:
        See `linearize.results.schema.Recall`.
    """
    context = text_sizes(model.config).context or math.inf
    cells = []
    for task, multiple in itertools.product(spec.tasks, spec.multiples):
        length = multiple * (window or WINDOW)
        cell = {"task": task, "length": length, "multiple": multiple}
        try:
            if length * (1 + spec.twice) > context:
                raise InputError(f"recall: the model's context is {context}")
            groups = {at: items(task, tokenizer, length, seed, spec.items, at, spec.twice) for at in depths(task)}
        except InputError as error:
            empty = {"depth": None, "value": None, "stderr": None, "n": 0, "items": []}
            cells.append(cell | empty | {"skipped": str(error).removeprefix("recall: ")})
            advance(spec.items * len(depths(task)))
            continue
        for depth, asked in groups.items():
            scores = right(model, tokenizer, asked, batch_size, advance)
            cells.append(cell | {"depth": depth, **summary(scores)})
    return cells


def summary(scores: list[float]) -> dict[str, Any]:
    """Mean, its standard error and number of scores, and the scores, as results.json holds them."""
    value, n = sum(scores) / len(scores), len(scores)
    stderr = math.sqrt(sum((score - value) ** 2 for score in scores) / n / (n - 1)) if n > 1 else None
    return {"value": value, "stderr": stderr, "n": n, "items": scores}


def total(spec: RecallSpec) -> int:
    """Items that `measure` goes through."""
    return spec.items * len(spec.multiples) * sum(len(depths(task)) for task in spec.tasks)
