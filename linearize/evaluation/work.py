"""What a comparison measures: tasks and texts, loaded once, and how one column runs all of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from linearize.checkpoint.text import check_ids
from linearize.errors import InputError
from linearize.evaluation import behaviour, capacity, continuations, perplexity, recall, tasks
from linearize.evaluation import suite as suites
from linearize.evaluation.clock import stopwatch
from linearize.evaluation.columns import Models, window_of
from linearize.evaluation.environment import embedded_sha256
from linearize.evaluation.saved import Saved
from linearize.model.sizes import text_sizes
from linearize.progress import Bar

BLOCK = 512  # tokens of a block on which distributions are compared, where the suite has no text of its own
PROBE = 256  # tokens of the forward pass that looks for broken numbers, where the suite has no text of its own


@dataclass(frozen=True)
class Options:
    """What `linearize.evaluation.evaluate.evaluate` was asked for; see its arguments.

    Attributes:
        target: the file to write; None writes none.
        shorten: whether a suite that is longer than the model's context is made to fit, see `fitted`.
    """

    folder: str
    suite: suites.Suite
    target: Path | None = None
    source: str | None = None
    against: str | None = None
    limit: int | None = None
    columns: list[str] | None = None
    batch_size: int = 1
    seed: int = 0
    dtype: str = "auto"
    quantize: str | None = None
    device: str | None = None
    include_path: str | Path | None = None
    resume: bool = False
    progress: bool = True
    shorten: bool = False


def fitted(suite: suites.Suite, context: int | None) -> tuple[suites.Suite, list[str]]:
    """A suite of the package made to fit a model that reads fewer tokens than it asks for.

    Args:
        suite: what is to be measured.
        context: most tokens that the model can read; None where it does not say.

    Returns:
        The suite, with as many tokens in shorter blocks, and a line about each change; what is recorded is what ran.
    """
    if context is None:
        return suite, []
    texts, lines = {}, []
    for spec in suite.perplexity:
        if spec.length > context:
            blocks = -(-spec.blocks * spec.length // context)
            lines.append(f"perplexity: blocks of {context} tokens, not {spec.length}: the model's context")
            spec = replace(spec, length=context, blocks=blocks)
        texts.setdefault((spec.text, spec.length), spec)
    wanted = suite.behaviour
    if wanted is not None and max(wanted.state, continuations.LONGEST + wanted.tokens) > context:
        lines.append(f"behaviour: texts of up to {context} tokens: the model's context")
        tokens = max(1, min(wanted.tokens, context - continuations.LONGEST))
        wanted = replace(wanted, state=min(wanted.state, context), tokens=tokens)
    return replace(suite, perplexity=list(texts.values()), behaviour=wanted), lines


def check(suite: suites.Suite, context: int | None) -> None:
    """Refuse what a suite asks for and a model cannot do, before anything is loaded.

    Args:
        suite: what is to be measured.
        context: most tokens that the model can read; None where it does not say.

    Raises:
        InputError: blocks, continuations or a text longer than that, an unknown task of recall, or wrong
            numbers of pairs.
    """
    for spec in suite.perplexity:
        if context is not None and spec.length > context:
            raise InputError(
                f"perplexity: blocks of {spec.length} tokens do not fit the model's context of {context}; write a "
                f"suite with length: {context}, or take one of the package, which is shortened: --suite smoke"
            )
    if suite.recall is not None:
        recall.check(suite.recall)
    if suite.capacity is not None:
        capacity.check(suite.capacity)
    if suite.behaviour is not None:
        behaviour.check(suite.behaviour, suite.perplexity[0].blocks if suite.perplexity else None, context)


class Work:
    """Tasks and texts, and how a column runs them.

    Args:
        options: of the run; what the suite asks for has passed `check`.
        models: opens the models.
        bar: shows what is running.

    Attributes:
        data: name -> sha256 of the texts and embedded items.

    Raises:
        InputError: an unknown task or text, or a text that is too short.
    """

    def __init__(self, options: Options, models: Models, bar: Bar):
        suite, tokenizer = options.suite, models.tokenizer
        self.options, self.models, self.bar = options, models, bar
        self.recall, self.capacity = suite.recall, suite.capacity
        self.window = (window_of(models.config) or (None,))[0]
        context = text_sizes(models.config).context
        read = {spec.text: suites.read_text(spec.text) for spec in suite.perplexity}
        if suite.behaviour and not read:
            read[suites.DEFAULT_TEXT] = suites.read_text(suites.DEFAULT_TEXT)
        self.texts = [
            (spec.text, perplexity.cut(read[spec.text][0], tokenizer, spec.length, spec.blocks))
            for spec in suite.perplexity
        ]
        rows = text_sizes(models.config).vocabulary
        for name, blocks in self.texts:
            check_ids(blocks, rows, tokenizer, f"perplexity: {name}")
        self.probe = None
        if not self.texts:
            text, _ = suites.read_text(suites.DEFAULT_TEXT)
            self.probe = perplexity.cut(text[: 100 * PROBE], tokenizer, min(PROBE, context or PROBE), 1)
        self.behaviour, self.referring = None, {"seconds": 0.0}
        if suite.behaviour:
            text, _ = next(iter(read.values()))
            length = min(BLOCK, context or BLOCK)
            blocks = self.texts[0][1] if self.texts else None
            self.behaviour = behaviour.Behaviour(
                suite.behaviour,
                perplexity.cut(text, tokenizer, length, suite.behaviour.kl_blocks) if blocks is None else blocks,
                text,
                tokenizer,
                window=self.window,
                batch_size=options.batch_size,
                seed=options.seed,
            )
        self.tasks = tasks.load(suite.tasks, options.include_path, model=models.folder, seed=options.seed)
        items = [entry.embedded for entry in self.tasks if entry.embedded]
        self.data = {**{name: digest for name, (_, digest) in read.items()}, **embedded_sha256(items)}

    def close(self) -> None:
        """Let go of the source's logits."""
        if self.behaviour:
            self.behaviour.close()

    def complete(self, column: dict[str, Any]) -> bool:
        """Whether a column has every task and section, speed apart."""
        return not self._missing(column) and all(name in column for name, *_ in self._sections(is_source=False))

    def _missing(self, column: dict[str, Any]) -> list[tasks.Loaded]:
        return [entry for entry in self.tasks if entry.name not in column["tasks"]]

    def _sections(self, is_source: bool) -> Iterator[tuple[str, int, Callable[[PreTrainedModel], Any]]]:
        """Name, number of steps and measurement of every section that was asked for, in order."""
        advance = self.bar.advance
        if texts := self.texts:
            total = sum(len(ids) for _, ids in texts)
            yield "perplexity", total, lambda model: perplexity.measure(model, texts, self.window, advance)
        settings = (self.window, self.options.seed, self.options.batch_size, advance)
        tokenizer = self.models.tokenizer
        if spec := self.recall:
            yield "recall", recall.total(spec), lambda model: recall.measure(model, tokenizer, spec, *settings)
        if pairs := self.capacity:
            total = capacity.total(pairs)
            yield "capacity", total, lambda model: capacity.measure(model, tokenizer, pairs, *settings)
        if shared := self.behaviour:
            total = shared.steps(is_source=is_source)
            yield "behaviour", total, lambda model: shared.measure(model, is_source, advance)

    def refer(self, names: list[str], saved: Saved) -> None:
        """See what the source does, if one of these columns is still to be compared with it.

        Args:
            names: columns that this process measures.
            saved: their results so far.
        """
        done = saved.results["columns"]
        if self.behaviour and any("behaviour" not in done.get(name, {}) for name in names):
            self.bar.start("source: loading")
            with self.models.column("source") as model:
                self.bar.start("source: reference", total=self.behaviour.steps(refers=True))
                with stopwatch(self.referring):
                    self.behaviour.refer(model, self.bar.advance)

    def column(self, name: str, saved: Saved) -> None:
        """Run what is missing of a column, and save after each part.

        Args:
            name: of the column.
            saved: the results so far.
        """
        column = saved.column(name)
        if self.complete(column):
            if self.tasks or self.texts or self.recall or self.capacity or self.behaviour:
                self.bar.line(f"{name}: kept from the earlier run")
            return
        self.bar.start(f"{name}: loading")
        with self.models.column(name) as model:
            if self.probe is not None:
                perplexity.losses(model, self.probe)
            for section, total, measure in self._sections(is_source=name == "source"):
                if section in column:
                    continue
                self.bar.start(f"{name}: {section}", total=total)
                with stopwatch(column):
                    column[section] = measure(model)
                if section == "behaviour" and name == "source":
                    column["seconds"] += self.referring["seconds"]
                saved.save()
            missing = self._missing(column)
            if missing:
                scorer = tasks.Scorer(model, self.models.tokenizer, self.options.batch_size, self.bar)
            for entry in missing:
                self.bar.start(f"{name}: {entry.label}")
                with stopwatch(column):
                    column["tasks"][entry.name] = tasks.run(scorer, entry, self.options.limit, self.options.seed)
                saved.save()
        self.bar.line(f"{name}: {column['seconds']:.0f} s")
