"""Suites: which tasks, texts and columns a comparison has. YAML files in eval/suites/, or the user's own."""

import gzip
import hashlib
from dataclasses import field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from linearize.errors import InputError, suggest
from linearize.formats import quoted
from linearize.recipe.resources import package_folder
from linearize.recipe.schema import STRICT, FolderName
from linearize.recipe.text import read_yaml
from linearize.results.schema import COLUMNS

DEFAULT_TEXT = "wikitext2_valid"


@dataclass(frozen=True, config=STRICT)
class TaskSpec:
    """One task, group or tag of lm-eval.

    Attributes:
        task: its name in lm-eval.
        metric: which of its metrics is shown; None takes the first one that it lists.
        label: name in tables; None takes the task's name.
        fewshot: examples in the prompt; None leaves what the task says.
        rotate: ask every item in all rotations of its options too, where they are shown by letter and the letter is
            scored: shows who answers by position. Takes as many times longer as there are options.
    """

    task: str
    metric: str | None = None
    label: str | None = None
    fewshot: int | None = Field(default=None, ge=0)
    rotate: bool = False


@dataclass(frozen=True, config=STRICT)
class TextSpec:
    """A text for perplexity by position.

    Attributes:
        text: name of an embedded text (eval/data/NAME.txt.gz), or a file (.txt or .txt.gz).
        length: tokens per block.
        blocks: how many blocks.
    """

    text: str
    length: int = Field(default=512, ge=2)
    blocks: int = Field(default=8, ge=1)


@dataclass(frozen=True, config=STRICT)
class RecallSpec:
    """Generated tasks whose answer lies beyond the window; see `linearize.evaluation.recall`.

    Attributes:
        tasks: which of `linearize.evaluation.recall.TASKS`.
        multiples: lengths of the prompts with their answers, in windows.
        items: per task, length and depth.
        twice: the context is given twice before the question (JRT, arXiv 2407.05483); lengths are of one reading.
    """

    tasks: list[str]
    multiples: list[int]
    items: int = Field(default=10, ge=1)
    twice: bool = False


@dataclass(frozen=True, config=STRICT)
class CapacitySpec:
    """How many pairs are remembered, by how many there were; see `linearize.evaluation.capacity`.

    Attributes:
        pairs: how many of them a prompt has.
        items: per number of pairs.
    """

    pairs: list[int]
    items: int = Field(default=10, ge=1)


@dataclass(frozen=True, config=STRICT)
class BehaviourSpec:
    """What the model does beside the source; see `linearize.evaluation.behaviour`.

    Attributes:
        prompts: how many beginnings of texts it continues.
        tokens: how many tokens it continues each by.
        kl_blocks: blocks of the suite's first text on which its distribution is compared with the source's.
        state: tokens up to which the health of the state is followed; 0 leaves it out.
    """

    prompts: int = Field(default=50, ge=1)
    tokens: int = Field(default=256, ge=1)
    kl_blocks: int = Field(default=4, ge=1)
    state: int = Field(default=4096, ge=0)


@dataclass(frozen=True, config=STRICT)
class SpeedSpec:
    """Speed and memory by context length; see `linearize.evaluation.speed`.

    Attributes:
        contexts: tokens in the cache.
        batches: rows decoded together.
        steps: decoded tokens per context and batch.
    """

    contexts: list[PositiveInt] = Field(min_length=1)
    batches: list[PositiveInt] = Field(default_factory=lambda: [1], min_length=1)
    steps: int = Field(default=12, ge=3)


@dataclass(frozen=True, config=STRICT)
class Suite:
    """What a suite file may say.

    Attributes:
        name: file stem.
        description: one line.
        tasks: in the order of the table.
        perplexity: texts; the first one gives the headline perplexity, the one with the longest blocks the buckets.
        recall, capacity, behaviour, speed: what else is measured; None leaves it out.
        columns: which of `linearize.results.schema.COLUMNS` run when the user names none.
        limit: items per task; None means all.
    """

    name: FolderName
    description: str = ""
    tasks: list[TaskSpec] = field(default_factory=list)
    perplexity: list[TextSpec] = field(default_factory=list)
    recall: RecallSpec | None = None
    capacity: CapacitySpec | None = None
    behaviour: BehaviourSpec | None = None
    speed: SpeedSpec | None = None
    columns: list[str] = field(default_factory=lambda: list(COLUMNS))
    limit: int | None = Field(default=None, ge=1)


def names() -> list[str]:
    """Names of the suites that ship with the package."""
    return sorted(path.stem for path in (package_folder("eval") / "suites").glob("*.yaml"))


def load(suite: str | Path | list[str] | Suite) -> Suite:
    """Read a suite.

    Args:
        suite: name of a shipped suite, a YAML file, or lm-eval tasks, as a list or separated by commas.

    Raises:
        InputError: unknown name, or every problem of the file, one line each.
    """
    if isinstance(suite, Suite):
        return suite
    if isinstance(suite, list):
        if not suite:
            raise InputError(f"suite: found no task; name a suite ({', '.join(names())}), a file, or tasks of lm-eval")
        return Suite(name="custom", tasks=[TaskSpec(task=task) for task in suite])
    path = Path(suite)
    if path.suffix not in (".yaml", ".yml"):
        if str(suite) not in names():
            # Looking for a task of that name would take lm-eval a quarter of a minute.
            if get_close_matches(str(suite), names(), cutoff=0.7):
                raise InputError(f"unknown suite {str(suite)!r}. {suggest(str(suite), names())}")
            return load([task.strip() for task in str(suite).split(",") if task.strip()])
        path = package_folder("eval") / "suites" / f"{suite}.yaml"
    values = read_yaml(path)
    try:
        loaded = TypeAdapter(Suite).validate_python({"name": path.stem, **values})
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(map(str, problem['loc']))}: found {quoted(problem['input'])}; {problem['msg']}"
            for problem in error.errors(include_url=False)
        ]
        raise InputError("\n".join(problems)) from error
    check_columns(loaded.columns, str(path))
    parts = (loaded.tasks, loaded.perplexity, loaded.recall, loaded.capacity, loaded.behaviour, loaded.speed)
    if not any(parts):
        raise InputError(
            f"{path}: has neither tasks, perplexity, recall, capacity, behaviour nor speed; add at least one of them"
        )
    return loaded


def check_columns(columns: list[str], where: str) -> None:
    """Refuse columns that do not exist.

    Args:
        columns: names.
        where: they were given, for the message.

    Raises:
        InputError: names the nearest ones.
    """
    for column in columns:
        if column not in COLUMNS:
            raise InputError(f"{where}: unknown column {column!r}. {suggest(column, COLUMNS)}")


def read_text(name: str) -> tuple[str, str]:
    """Text of a perplexity entry, and its sha256.

    Raises:
        InputError: no embedded text and no file has this name.
    """
    embedded = package_folder("eval") / "data" / f"{name}.txt.gz"
    path = embedded if embedded.is_file() else Path(name).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        known = [file.name.removesuffix(".txt.gz") for file in embedded.parent.glob("*.txt.gz")]
        raise InputError(
            f"perplexity: unknown text {name!r}. {suggest(name, known)}. A file is given by its path"
        ) from error
    plain: Any = gzip.decompress(content) if path.suffix == ".gz" else content
    return plain.decode("utf-8"), hashlib.sha256(plain).hexdigest()
