"""Recall beyond the window: generated tasks whose answer stands far back in the prompt, for any tokenizer and length.

A prompt is a line that says what to expect, a context, and a question. The context is facts among filler drawn by the
seed, as much of it as fits the wanted number of tokens. The answer is the text that has to follow; it is right if each
of its tokens is the most likely one given all before it: if greedy decoding would write it, for one forward pass.

```
needle     the code of one city among filler               RULER, arXiv 2404.06654
multikey   the codes of four cities, one asked             RULER
mqar       nothing but pairs of key and value; three are   Zoology, arXiv 2312.04927
           asked, the first two answered in the prompt
copy       eight random words, asked after the first one   Jelassi et al., arXiv 2402.01032
variables  two chains X = number, Y = X, Z = Y; one Z      RULER
babi       who went where and took what; where is it now   bAbI, arXiv 1502.05698
```

Depth is where the asked fact stands, from 0 at the start of the context to 1 at its end. The facts of mqar, variables
and babi are spread over all of it: they have no depth, and the pairs of mqar become more with the length.
"""

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from linearize.errors import InputError, suggest
from linearize.evaluation.suite import RecallSpec
from linearize.model.sizes import text_sizes

WINDOW = 64  # tokens that `multiples` count in, for a model without a window
DEPTHS = (0.0, 0.5, 1.0)


def _words(text: str) -> list[str]:
    return text.split()


# Short common words: most tokenizers have a token for each, so that a prompt is cut within a few tokens of its length.
CITIES = _words("Paris London Rome Berlin Madrid Vienna Oslo Cairo Lima Tokyo Boston Dublin Prague Athens Moscow Delhi")
PEOPLE = _words("Anna Tom Mary John Emma Paul Lucy Mark Sara Peter Jane David")
ROOMS = _words("kitchen garden office bedroom hallway cellar school park library bathroom")
THINGS = _words("apple ball book lamp coat ring")
ADJECTIVES = _words(
    "red blue green old new big small long short dark light cold warm wet dry soft hard fast slow young quiet loud "
    "thin thick round flat clean rich poor sweet"
)
NOUNS = _words(
    "house door tree river stone bird horse field road bridge table chair window boat ship train box bag cup plate "
    "knife clock mirror picture letter paper pen shoe hat shirt glass bottle wall roof floor hill lake beach island "
    "forest farm cow dog cat fish sheep wolf bear lion mouse frog snake tower castle church market shop hotel station"
)
# Parts of a filler sentence. None of their words is an answer to anything.
FILLER = (
    ["The man", "The girl", "A boy", "The cook", "My friend", "A nurse", "The old lady", "Our guest", "A child"],
    ["saw", "liked", "passed", "found", "knew", "drew", "left", "wanted", "watched", "missed"],
    ["the sun", "a cloud", "the rain", "the fire", "some snow", "the sea", "a song", "the wind", "a game", "the moon"],
    ["at night", "by day", "all week", "in May", "with joy", "once more", "after lunch", "for hours", "by chance"],
)


@dataclass(frozen=True)
class Item:
    """A prompt, and the text that has to follow it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class _Story:
    """What an item is made of, before filler brings it to its length.

    Attributes:
        head: what stands before the context.
        facts: sentences of the context that the answer needs, or that compete with it, in order.
        shares: of each fact, the share of the filler before it; None stands for the wanted depth.
        question: what stands after the context; the answer follows.
        answer: begins with a blank.
        filler: endless sentences.
        separator: between sentences.
    """

    head: str
    facts: list[str]
    shares: list[float | None]
    question: str
    answer: str
    filler: Iterator[str]
    separator: str = " "


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        yield " ".join(rng.choice(part) for part in FILLER) + "."


def _spread(rng: random.Random, count: int) -> list[float | None]:
    return [*sorted(rng.random() for _ in range(count))]


def _needles(rng: random.Random, count: int) -> _Story:
    cities, codes = rng.sample(CITIES, count), rng.sample(range(1000, 10000), count)
    facts = [f"The secret code of {city} is {code}." for city, code in zip(cities, codes, strict=True)]
    asked = f"the secret code of {cities[0]}"
    question = f"Question: What is {asked}? Answer: T{asked[1:]} is"
    shares = [None, *_spread(rng, count - 1)]
    return _Story("Remember the codes in this text.", facts, shares, question, f" {codes[0]}", _sentences(rng))


def _needle(rng: random.Random) -> _Story:
    return _needles(rng, 1)


def _multikey(rng: random.Random) -> _Story:
    return _needles(rng, 4)


def _mqar(rng: random.Random) -> _Story:
    keys = [" ".join(pair) for pair in itertools.product(ADJECTIVES, NOUNS)]
    rng.shuffle(keys)
    pairs = [f"{key}: {rng.randint(10, 99)}" for key in keys]
    asked, answer = pairs[2].split(":")
    question = "\n".join(["Again:", *pairs[:2], f"{asked}:"])
    shares: list[float | None] = [rng.random() for _ in range(3)]
    filler = itertools.chain(pairs[3:], _sentences(rng))
    return _Story("All the numbers:", pairs[:3], shares, question, answer, filler, "\n")


def _copy(rng: random.Random) -> _Story:
    first, *rest = rng.sample(NOUNS, 8)
    answer = " " + " ".join(rest)
    fact = f"The list of words is: {first}{answer}."
    question = f"Question: What is the list of words? Answer: The list of words is: {first}"
    return _Story("Remember the list of words in this text.", [fact], [None], question, answer, _sentences(rng))


def _variables(rng: random.Random) -> _Story:
    names, values = rng.sample("BCDEFGHJKLMNPQRSTUVWXYZ", 6), rng.sample(range(1000, 10000), 2)
    chains = [
        [f"{x} = {value}.", f"{y} = {x}.", f"{z} = {y}."]
        for (x, y, z), value in zip((names[:3], names[3:]), values, strict=True)
    ]
    order = rng.sample([0, 0, 0, 1, 1, 1], 6)
    facts = [chains[chain][order[:i].count(chain)] for i, chain in enumerate(order)]
    question = f"Question: Which number is {names[2]}? Answer: The number {names[2]} is"
    head = "Remember the number of each letter in this text."
    return _Story(head, facts, _spread(rng, 6), question, f" {values[0]}", _sentences(rng))


def _babi(rng: random.Random) -> _Story:
    people = rng.sample(PEOPLE, 3)
    rooms = {person: rng.sample(ROOMS, 2) for person in people}
    order = rng.sample(people * 2, 6)
    facts = [f"{person} went to the {rooms[person][order[:i].count(person)]}." for i, person in enumerate(order)]
    holder, asked, thing = people[0], rng.choice(people), rng.choice(THINGS)
    facts.insert(rng.randint(order.index(holder) + 1, 6), f"{holder} took the {thing}.")
    subject = f"the {thing}" if asked == holder else asked
    question = f"Question: Where is {subject}? Answer: {subject[0].upper()}{subject[1:]} is in the"
    head = "Remember where everybody goes in this text."
    return _Story(head, facts, _spread(rng, 7), question, f" {rooms[asked][1]}", _sentences(rng))


_STORIES: dict[str, Callable[[random.Random], _Story]] = {
    "needle": _needle,
    "multikey": _multikey,
    "mqar": _mqar,
    "copy": _copy,
    "variables": _variables,
    "babi": _babi,
}
TASKS = tuple(_STORIES)
DEEP = ("needle", "multikey", "copy")
"""Tasks that have a depth."""


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
        story = _STORIES[task](rng)
        filler = _fitting(story, tokenizer, length, depth or 0.0, rng)
        made.append(Item(_prompt(story, filler, depth or 0.0, twice), story.answer))
    return made


def _prompt(story: _Story, filler: list[str], depth: float, twice: bool = False) -> str:
    before = [round((depth if share is None else share) * len(filler)) for share in story.shares]
    context = [story.head]
    for i in range(len(filler) + 1):
        context += [fact for fact, start in zip(story.facts, before, strict=True) if start == i]
        context += filler[i : i + 1]
    return story.separator.join([*context, *(context if twice else ()), story.question])


def _fitting(story: _Story, tokenizer: Any, length: int, depth: float, rng: random.Random) -> list[str]:
    """As many sentences as fit; the last words of one more, in front, make up for the rest."""

    def tokens(filler: list[str]) -> int:
        text = _prompt(story, filler, depth) + story.answer
        return len(tokenizer(text, verbose=False)["input_ids"])

    alone = tokens([])
    if alone > length:
        raise InputError(f"recall: needs {alone} tokens or more, found {length}; use longer prompts")
    sample = list(itertools.islice(story.filler, 16))
    enough = int(1.5 * 16 * (length - alone) / (tokens(sample) - alone)) + 16
    sentences = [*sample, *itertools.islice(story.filler, enough)]
    count = bisect_right(range(len(sentences) + 1), length, key=lambda count: tokens(sentences[:count])) - 1
    words = next(_sentences(rng)).split()
    ends = [[" ".join(words[-many:])] if many else [] for many in range(len(words) + 1)]
    many = bisect_right(ends, length, key=lambda end: tokens([*end, *sentences[:count]])) - 1
    return [*ends[many], *sentences[:count]]


@torch.inference_mode()
def right(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: list[Item],
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """1.0 for each item whose answer greedy decoding would write, else 0.0.

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
        lengths = [len(tokenizer(item.prompt, verbose=False)["input_ids"]) for item in batch]
        rows = [tokenizer(item.prompt + item.answer, verbose=False)["input_ids"] for item in batch]
        longest, first = max(map(len, rows)), min(lengths)
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
        # The logits of whole prompts would take more memory than the model.
        kept = longest - first + 1
        logits = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=kept).logits[:, -kept:]
        if logits.isnan().any():
            raise InputError(
                f"recall: the model's prediction after {first} tokens is not a number; its weights are damaged or its "
                "dtype is too narrow: check them with `linearize inspect`, or evaluate in float32 (--dtype float32)"
            )
        for row, length, predicted in zip(rows, lengths, logits.argmax(-1).tolist(), strict=True):
            scores.append(float(predicted[length - first : len(row) - first] == row[length:]))
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
            value, n = sum(scores) / len(scores), len(scores)
            stderr = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None
            cells.append(cell | {"depth": depth, "value": value, "stderr": stderr, "n": n, "items": scores})
    return cells


def total(spec: RecallSpec) -> int:
    """Items that `measure` goes through."""
    return spec.items * len(spec.multiples) * sum(len(depths(task)) for task in spec.tasks)
