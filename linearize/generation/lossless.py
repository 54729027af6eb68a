"""The source's own text, drafted by the student.

The student writes a few tokens, the source reads them in one pass and keeps those that it would have written itself
(speculative decoding, arXiv 2211.17192). What comes out is what the source writes: each token is picked from the
source's own scores, by the same rule and with the same random numbers as without drafts. Where the student is untrained
or holds adapters, both are one set of weights: the attention of the layers is switched, and adapters are on for the
student alone.

How many tokens are drafted is decided anew in every round, from measured times and from how many were accepted.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from linearize.checkpoint.adapters import Switch
from linearize.checkpoint.manifest import facts_of
from linearize.checkpoint.open import is_adapter
from linearize.checkpoint.sources import load_source, locate, relocate
from linearize.errors import InputError
from linearize.model.transformers_api import CACHE, cache_of

MOST = 12
"""Tokens that are drafted at a time."""
FEW = 4
"""Tokens that the student reads one by one."""
GAIN = 1.1
"""How many times faster drafting must promise to be before it begins: it has to read the text first."""
SAMPLE = 128
"""Tokens by which it is measured how fast the student reads."""
PAUSE = 64
"""Tokens until drafting that did not pay is tried again; twice as many after each failure."""


@dataclass
class Pace:
    """What drafting costs and brings, and how many tokens are best drafted.

    Attributes:
        accepted: share of drafted tokens that are kept, while no one before was refused; a running mean.
        step: seconds of a step of the source; None before one was taken.
        token: seconds that each further token adds to a pass of the source.
        draft: seconds of a step of the student; None before it was tried.
        reading: seconds in which the student reads a token of a text.
    """

    accepted: float = 0.8
    step: float | None = None
    token: float = 0.0
    draft: float | None = None
    reading: float = 0.0

    def gain(self, number: int) -> float:
        """How many times faster than the source alone, if so many tokens are drafted at a time."""
        if self.step is None or self.draft is None:
            return 1.0
        kept = sum(self.accepted**n for n in range(number + 1))
        return kept * self.step / (number * self.draft + self.step + number * self.token)

    def best(self) -> int:
        """How many tokens to draft now; 0 where the source alone is faster."""
        return max(range(MOST + 1), key=self.gain)

    def saw_pass(self, tokens: int, seconds: float) -> None:
        """Learn from a pass of the source over some tokens behind its cache."""
        if tokens == 1:
            self.step = seconds if self.step is None else 0.7 * self.step + 0.3 * seconds
        elif self.step is not None:
            self.token = 0.7 * self.token + 0.3 * max(0.0, seconds - self.step) / (tokens - 1)

    def saw_draft(self, tokens: int, seconds: float) -> None:
        """Learn from so many steps of the student."""
        self.draft = seconds / tokens if self.draft is None else 0.7 * self.draft + 0.3 * seconds / tokens

    def saw_answer(self, drafted: int, kept: int) -> None:
        """Learn how many drafted tokens were kept: each that was looked at is one observation."""
        for index in range(min(kept + 1, drafted)):
            self.accepted += 0.05 * ((index < kept) - self.accepted)


@dataclass
class Counts:
    """What happened.

    Attributes:
        passes: of the source, over the prompt and behind it.
        drafted: tokens.
        kept: of these.
        written: tokens.
        reading: seconds in which the student read text that it did not write.
    """

    passes: int = 0
    drafted: int = 0
    kept: int = 0
    written: int = 0
    reading: float = 0.0

    @property
    def per_pass(self) -> float:
        """Tokens per pass of the source; 1 without drafts."""
        return self.written / max(self.passes, 1)


@dataclass
class Lossless:
    """Decoding by source and student together, as a `custom_generate` of transformers.

    Args:
        model: linearized.
        source: a model of its own; None where its weights are in the student's, with adapters beside them.
        always: draft so many tokens in every round, whether it pays or not; None decides.

    Attributes:
        counts: of the last call.
        pace: of all calls so far.
    """

    model: Any
    source: Any = None
    always: int | None = None
    counts: Counts = field(default_factory=Counts)
    pace: Pace = field(default_factory=Pace)
    _cache: Any = None
    _streamer: Any = None
    _read: list[int] = field(default_factory=list)  # by the student

    def __post_init__(self) -> None:
        if not hasattr(self.model.config, "linearize"):
            raise InputError(
                f"lossless: {self.model.config.model_type} is no linearized model; run `linearize convert`"
            )
        if self.model._is_stateful:
            raise InputError(
                "lossless: the mixers of this model write every token into their state at once (combine: liger or "
                "none), so drafts cannot be taken back; convert with combine: memory"
            )
        self._switch = Switch(self.model) if self.source is None else lambda student: None

    @classmethod
    def of(cls, folder: str | Path, model: Any, source: str | None = None) -> "Lossless":
        """For a model that was opened from a folder; the source is loaded beside it where its weights are not in it.

        Args:
            folder: what was opened.
            model: what came of it.
            source: folder or Hub id of the source; None for the one that the folder records.

        Raises:
            InputError: the model cannot draft, or its source cannot be found.
        """
        trained = Path(folder).is_dir() and not is_adapter(Path(folder)) and "training" in facts_of(Path(folder))
        if not trained and source is None:
            return cls(model)
        located = locate(source, recipes=False) if source else relocate(model.config.linearize["source"])
        return cls(model, load_source(located, model.dtype)[0].to(model.device))

    def generate(self, inputs: Tensor, streamer: Any = None, tokenizer: Any = None, **kwargs: Any) -> Any:
        """`generate` of the source, drafted.

        Args:
            inputs: int64 [1, tokens].
            streamer: takes the prompt and then the new tokens.
            tokenizer: finds the `stop_strings` of the generation_config.
            **kwargs: of transformers' own.
        """
        # transformers keeps these two from a custom way of decoding.
        config = kwargs.get("generation_config")
        if tokenizer is not None and config is not None and config.stop_strings:
            kwargs["generation_config"] = config = copy.copy(config)
            kwargs["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer, config.stop_strings)])
            config.stop_strings = None
        if streamer is not None:
            streamer.put(inputs.cpu())
        self._streamer = streamer
        with torch.no_grad(), self._as(student=False):
            return (self.source or self.model).generate(inputs, custom_generate=self, **kwargs)

    def __call__(
        self, model: Any, input_ids: Tensor, *, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput:  # fmt: skip
        """Write tokens until one of the criteria stops it.

        Args:
            model: that transformers calls it for.
            input_ids: int64 [1, tokens].
            logits_processor: of transformers.
            stopping_criteria: of transformers.
            generation_config: whether tokens are drawn, and how many at most.
            **kwargs: the source's cache.

        Raises:
            InputError: more than one prompt.
        """
        if input_ids.shape[0] != 1:
            raise InputError(f"lossless: found {input_ids.shape[0]} prompts; one at a time is drafted")
        ids, cache, self.counts = input_ids, cache_of(kwargs), Counts()
        start, most = ids.shape[1], int(stopping_criteria.max_length or 1 << 60)
        logits = self._pass(model, ids[:, cache.get_seq_length() :], cache, 1)
        cache.activate_past_recording()
        drafts, retry, pause, stopped = ids.new_empty(1, 0), 0, PAUSE, False
        while True:
            kept = 0
            for index in range(drafts.shape[1] + 1):
                token = self._pick(logits_processor(ids, logits[:, index].float()), generation_config.do_sample)
                ids = torch.cat([ids, token[:, None]], 1)
                if self._streamer is not None:
                    self._streamer.put(token.cpu())
                stopped = bool(stopping_criteria(ids, None).all())
                if stopped or index == drafts.shape[1] or int(token) != int(drafts[0, index]):
                    break
                kept += 1
            self._count(drafts.shape[1], kept)
            # The cache holds all that was written but the last token.
            cache.crop(ids.shape[1] - 1 - cache.get_seq_length())
            if stopped:
                break
            left = most - ids.shape[1]
            may = self.pace.step is not None and ids.shape[1] - start >= retry
            number = self._decide(left, ids.shape[1], may)
            if number == 0 and may and self._read and self.always is None:
                retry, pause = ids.shape[1] - start + pause, 2 * pause
            drafts = self._draft(ids, number, logits_processor) if number else ids.new_empty(1, 0)
            start_time = time.perf_counter()
            logits = self._pass(model, torch.cat([ids[:, -1:], drafts], 1), cache, number + 1)
            self.pace.saw_pass(number + 1, time.perf_counter() - start_time)
        if self._streamer is not None:
            self._streamer.end()
        return GenerateDecoderOnlyOutput(sequences=ids, **{CACHE: cache})  # type: ignore[arg-type]

    def resume(self, cache: Any, ids: list[int]) -> None:
        """Draft behind a state of the student's that is at hand.

        Args:
            cache: the student's, which is taken as it is.
            ids: the tokens that it holds.
        """
        cache.activate_past_recording()
        self._cache, self._read = cache, ids

    # --- the source

    @staticmethod
    def _pass(model: Any, ids: Tensor, cache: Any, wanted: int) -> Tensor:
        """Logits [1, wanted, vocabulary] of the last tokens of a block behind a cache."""
        keep = {"logits_to_keep": wanted} if model._supports_logits_to_keep() else {}
        return model(input_ids=ids, **{CACHE: cache}, use_cache=True, **keep).logits[:, -wanted:]

    @staticmethod
    def _pick(scores: Tensor, drawn: bool) -> Tensor:
        """The next token [1], as transformers picks it."""
        return torch.multinomial(scores.softmax(-1), 1).squeeze(1) if drawn else scores.argmax(-1)

    def _count(self, drafted: int, kept: int) -> None:
        self.counts.passes += 1
        self.counts.drafted += drafted
        self.counts.kept += kept
        self.counts.written += kept + 1
        self.pace.saw_answer(drafted, kept)

    # --- the student

    def _decide(self, left: int, length: int, may: bool) -> int:
        """How many tokens to draft now, with so many left to write behind so many; `may`: whether drafting is on."""
        if self.always is not None:
            return max(min(self.always, left - 1), 0)
        if not may or self.pace.step is None:
            return 0
        if self.pace.draft is None:
            self._try_step()
        number = min(self.pace.best(), left - 1)
        gain = self.pace.gain(number)
        if number > 0 and not self._read:  # it has to read the text first
            saved = left * self.pace.step * (1 - 1 / gain)
            return number if gain > GAIN and saved > length * self.pace.reading else 0
        return max(number, 0)

    def _try_step(self) -> None:
        """Measure what steps and reading cost the student, on caches of its own: neither depends on the text."""
        cache, ids = DynamicCache(), torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        with self._as(student=True):
            start = time.perf_counter()
            self._pass(self.model, ids.expand(1, SAMPLE), DynamicCache(), 1)
            self.pace.reading = (time.perf_counter() - start) / SAMPLE
            for index in range(4):
                start = time.perf_counter()
                self._pass(self.model, ids, cache, 1)
                if index > 1:
                    self.pace.saw_draft(1, time.perf_counter() - start)

    def _draft(self, ids: Tensor, number: int, logits_processor: Any) -> Tensor:
        """Tokens [1, number] that the student writes behind a text."""
        known = ids[0].tolist()
        if self._read != known[: len(self._read)]:
            pairs = enumerate(zip(self._read, known, strict=False))
            self._take_back(next((index for index, (old, new) in pairs if old != new), len(known) - 1))
        written, drafts = ids, []
        with self._as(student=True):
            if self._cache is None:
                self._cache = DynamicCache()
            for index in range(number):
                new = written[:, len(self._read) :]
                start = time.perf_counter()
                # A block costs a recurrence several steps, however few tokens it has.
                few = new.shape[1] <= FEW
                for part in new.split(1, dim=1) if few else (new,):
                    logits = self._pass(self.model, part, self._cache, 1)
                if index == 0 and not self.is_recording:
                    self._cache.activate_past_recording()
                seconds = time.perf_counter() - start
                if few:
                    self.pace.saw_draft(new.shape[1], seconds)
                elif new.shape[1] > MOST + 1:
                    self.counts.reading += seconds
                self._read = written[0].tolist()
                token = logits_processor(written, logits[:, -1].float()).argmax(-1)
                written = torch.cat([written, token[:, None]], 1)
                drafts.append(token)
        return torch.stack(drafts, 1)

    @property
    def is_recording(self) -> bool:
        """Whether the student's cache can take tokens back already."""
        return bool(self._cache.layers) and all(getattr(layer, "record_past", True) for layer in self._cache.layers)

    def _take_back(self, length: int) -> None:
        """Let the student have read no more than so many tokens; from the start again where that is too far back."""
        gone = len(self._read) - length
        if gone > 0:
            try:
                self._cache.crop(-gone)
                self._read = self._read[:length]
            except RuntimeError:
                self._cache, self._read = None, []

    def alone(self, name: str) -> AbstractContextManager[None]:
        """Have the weights be the `source`'s meanwhile, or the `student`'s, which they are at rest."""
        return self._as(student=False) if name == "source" else nullcontext()

    @contextmanager
    def _as(self, student: bool) -> Iterator[None]:
        self._switch(student)
        try:
            yield
        finally:
            self._switch(not student)
