"""Schema of results.json. Scores are fractions, not per cent; losses are in nats per token.

Keys that it does not name are allowed and ignored.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

SCHEMA = 1
COLUMNS = {
    "source": "the model that was converted, untouched",
    "window": "the source with the same window and sinks and nothing else, no training",
    "converted": "the source converted, no training",
    "student": "the evaluated model",
    "student/window": "the student without its memory",
    "student/memory": "the student without its window",
    "other": "another student, given by --against",
}


Above0 = Annotated[float, Field(gt=0)]


class Choices(TypedDict):
    """How often each position was chosen and how often it was right, as counts."""

    chosen: list[int]
    gold: list[int]


class Rotation(TypedDict):
    """Of a task whose suite entry says `rotate`: every item with k options asked in all k rotations."""

    n: int  # items that could be rotated
    accuracy: float  # mean over items of the share of rotations answered right
    stderr: float | None  # over items
    consistent: float  # share of items answered right in every rotation
    letters: dict[str, float]  # letter -> share of the answers over all items and rotations that it was
    most: float  # the largest of these shares
    items: list[float]  # share of rotations answered right of each item


class Score(TypedDict):
    """Of one task."""

    label: NotRequired[str]  # name in tables
    metric: str  # name in lm-eval, e.g. acc_norm
    value: float
    stderr: float | None  # null where lm-eval gives none
    n: int  # items scored
    higher_is_better: bool
    chance: NotRequired[float | None]
    """Score of guessing: 0 where the answer is free text, null where it has no meaning (perplexities)."""
    prompts: NotRequired[str]  # sha256 over every prompt and choice scored: equal in all columns
    choices: NotRequired[Choices | None]  # null where there are none to choose from
    items: NotRequired[list[float] | None]  # score of each item, in order; null for metrics that are no mean over items
    rotation: NotRequired[Rotation]


class Bucket(TypedDict):
    """A range of positions; a token's position is the number of tokens before it."""

    start: int
    end: int
    ppl: Above0
    tokens: int


class Text(TypedDict):
    """Perplexity of one text, cut into blocks of `length` tokens."""

    text: str
    length: int
    blocks: int
    value: Above0
    tokens: int  # how many were predicted
    by_position: Annotated[list[Bucket], Field(min_length=1)]
    losses: NotRequired[list[list[float]]]  # [block][bucket]: mean loss


class Perplexity(TypedDict):
    """Of all texts."""

    value: Above0  # of the suite's first text
    tokens: int
    by_position: Annotated[list[Bucket], Field(min_length=1)]  # of the text with the longest blocks
    texts: Annotated[list[Text], Field(min_length=1)]


class Recall(TypedDict):
    """Share of right answers of one generated task. Where nothing could be measured, `skipped` says why."""

    task: str
    length: int  # tokens
    multiple: int  # the same in windows
    depth: float | None  # 0 at the start of the context, 1 at its end; null where the task has none
    value: float | None
    stderr: float | None
    n: int
    items: list[float]  # score of each
    skipped: NotRequired[str]


def _excused(cell: Recall) -> Recall:
    if cell["value"] is None and "skipped" not in cell:
        raise ValueError("value: found None, and no `skipped` that says why")
    return cell


class Capacity(TypedDict):
    """Share of right answers about pairs of key and value that stand beyond any window."""

    pairs: int  # in the prompt
    length: int  # tokens of the longest prompt with its answers
    cache_bytes: int  # behind the pairs
    value: float
    stderr: float | None
    n: int
    items: list[float]  # score of each


class Divergence(TypedDict):
    """Of a range of positions, see `Bucket`."""

    start: int
    end: int
    kl: float
    tokens: int


class KL(TypedDict):
    """KL(source ‖ model) in nats per token."""

    value: float
    stderr: float | None  # over blocks; null for one
    tokens: int
    by_position: Annotated[list[Divergence], Field(min_length=1)]


class Agreement(TypedDict):
    """Greedy tokens until the first that differs from the source's."""

    mean: float
    median: float
    lengths: list[Annotated[int, Field(ge=0, le=1_000_000)]]  # per prompt


class Repetition(TypedDict):
    """Of the greedy continuations, fractions."""

    rep_2: float
    rep_3: float
    rep_4: float
    distinct_1: float
    distinct_2: float


class Cached(TypedDict):
    """Steps at which cached and whole forward pick the same token, and the largest difference of their logits."""

    checked: int
    equal: int
    difference: float


class State(TypedDict):
    """Of the memory's state at a position, mean over layers and heads."""

    position: int
    norm: float
    effective_rank: float | None  # null where the state is a vector per head


class Behaviour(TypedDict):
    """What the model does beside the source."""

    kl: KL
    agreement: Agreement
    repetition: Repetition
    cached: Cached
    state: list[State] | None  # null without a memory


class Speed(TypedDict):
    """At one context, in tokens, and batch."""

    context: Annotated[int, Field(gt=0)]
    batch: Annotated[int, Field(gt=0)]
    prefill_seconds: float
    token_seconds: Above0  # median per decoded token, and its quartiles:
    low: float
    high: float
    peak_bytes: int | None  # while decoding; null where the system does not tell
    cache_bytes: int


class NoSpeed(TypedDict):
    """What could not be measured."""

    context: int
    batch: int
    reason: str


class Column(TypedDict):
    """One of `COLUMNS`."""

    tasks: dict[str, Score]
    perplexity: NotRequired[Perplexity]  # absent when the suite has no texts
    recall: NotRequired[list[Annotated[Recall, AfterValidator(_excused)]]]
    capacity: NotRequired[list[Capacity]]
    behaviour: NotRequired[Behaviour]
    speed: NotRequired[list[Speed]]  # of source, window and student
    speed_left_out: NotRequired[list[NoSpeed]]  # absent when all could be measured
    seconds: float  # wall time, without loading and speed
    model: NotRequired[str]  # of the column other: folder or Hub id
    weights: NotRequired[str]  # of the column other: see `Settings`


class Average(TypedDict):
    """Plain mean of the tasks that have a chance level, without MMLU and other tasks answered by a letter."""

    value: float
    stderr: float | None
    tasks: int


class Recovery(TypedDict):
    """Share of the source's average kept, s / t and (s − r) / (t − r) with chance r; null where the source itself is
    within two standard errors of chance."""

    raw: float | None
    chance_corrected: float | None


class Memory(TypedDict("Memory", {"with": float})):
    """Perplexity at positions from `start` (the window) on, with and without the memory, and the difference of the
    losses with its 95 % interval."""

    without: float
    loss: float
    low: float
    high: float
    start: int


class Interval(TypedDict):
    """A difference and its 95 % interval."""

    difference: float
    low: float
    high: float


class Paired(TypedDict):
    """Student minus control on the same items."""

    tasks: dict[str, Interval]
    average: NotRequired[Interval]
    loss: NotRequired[Interval]


class Summary(TypedDict):
    """What follows from the columns alone, see `linearize.results.summary`."""

    average: dict[str, Average]  # by column
    recovery: dict[str, Recovery]  # by column
    memory: Memory | None  # null without the columns that it takes
    paired: dict[str, Paired]  # by control


class Layer(TypedDict):
    """And the mixer's settings."""

    layer: int
    mixer: str  # softmax for a layer left as it was


class Pruning(TypedDict):
    """What `linearize prune` did to the weights; losses are of text that it did not read."""

    sparsity: str
    zeros: float  # share of the weights of linear layers
    loss_before: float  # nats per token
    loss_after: float


class Settings(TypedDict, total=False):
    """What two results must share to be comparable."""

    suite: dict[str, Any]
    limit: int | None
    seed: int
    batch_size: int
    dtype: str
    quantize: str | None  # int8, int4 or nf4; earlier versions do not say: as they are
    device: str
    window: int | None
    sinks: int | None
    weights: str  # sha256 of the evaluated folder's files
    source: dict[str, Any]


def _known(column: str) -> str:
    if column not in COLUMNS:
        raise ValueError(f"unknown column; allowed: {', '.join(COLUMNS)}")
    return column


class Results(TypedDict):
    """What a comparison leaves behind."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)  # type: ignore[misc]

    schema: Literal[1]
    complete: NotRequired[bool]  # false while columns are still missing: an interrupted run
    model: str  # what was evaluated: folder or Hub id
    layers: NotRequired[list[Layer]]
    pruning: NotRequired[Pruning]
    source: str  # where the student's weights came from: Hub id, or name of a folder or file
    suite: str
    settings: NotRequired[Settings]
    columns: dict[Annotated[str, AfterValidator(_known)], Column]  # in the order of COLUMNS
    summary: NotRequired[Summary]  # absent until complete
    environment: dict[str, Any]  # versions, commit, cpu, threads, device, seed, date, data (name -> sha256), …
