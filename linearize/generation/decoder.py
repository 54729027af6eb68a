"""One call of transformers' `generate`: its settings, its times, what is read, and what comes out."""

import copy
import time
import warnings
from typing import Any, TextIO

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from linearize.checkpoint import text as agreed
from linearize.checkpoint.describe import learned_positions
from linearize.checkpoint.reading import reading, reason
from linearize.checkpoint.states import fingerprint
from linearize.errors import InputError
from linearize.formats import plain
from linearize.generation.lossless import Lossless
from linearize.generation.result import Generation, wrong_settings
from linearize.generation.store import StateStore
from linearize.model.transformers_api import CACHE, cache_of

FOLLOWED = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("sequence_bias", "exponential_decay_length_penalty", "renormalize_logits", "min_new_tokens", "stop_strings"),
)
"""Settings of generation_config.json that decide what one answer says. Others ask for something that an answer written
as it comes into being, or a cache kept between turns, cannot have (beams, several answers, another cache)."""
SOURCES_CACHE = (
    "the lossless mode goes on from the source's cache, which grows with the text, so there is no state to keep; leave "
    "lossless out"
)
ADVICE = "mend the file, or give temperature and top_p"
WITHOUT_LOSS = {"bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"}
WITHOUT_LOSS |= {"transformers_version", "_from_model_config", "return_dict_in_generate", "disable_compile"}
"""Settings that are not followed and need no word: our call has its own."""


class Clock(BaseStreamer):
    """Notes when tokens arrive, and passes them to a text streamer if there is one. Takes batches, unlike that."""

    def __init__(self, text: TextStreamer | None):
        self.text = text
        self.times: list[float] = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        """As of any streamer."""
        # transformers sends the prompt first; that moment is not interesting.
        if value.ndim < 2:
            self.times.append(time.perf_counter())
        if self.text:
            self.text.put(value)

    def end(self) -> None:
        """As of any streamer."""
        if self.text:
            self.text.end()

    def report(
        self, texts: list[str], prompt_tokens: list[int], new_tokens: list[int], drafting: Lossless | None
    ) -> Generation:
        """The answers, of so many tokens each, with the times."""
        prefill, seconds = self.times[1] - self.times[0], self.times[-1] - self.times[0]
        # The first token of each prompt comes out of the prefill.
        rate = (sum(new_tokens) - len(new_tokens)) / max(seconds - prefill, 1e-9)
        per_pass = None if drafting is None else drafting.counts.per_pass
        return Generation(texts, prompt_tokens, new_tokens, prefill, seconds, rate, per_pass)


class _FileStreamer(TextStreamer):
    """A TextStreamer that writes to any stream instead of stdout."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a part of the text; to a terminal as text alone, whatever the vocabulary holds."""
        text = plain(text, lines=True) if self.out.isatty() else text
        print(text, file=self.out, end="\n" if stream_end else "", flush=True)


class Decoder:
    """A model, its tokenizer, and the settings to generate with.

    Args:
        model: as loaded by ``load``.
        tokenizer: of the model.
        max_new_tokens: as in ``generate``.
        temperature: as in ``generate``.
        top_p: as in ``generate``.
        drafting: as in ``Chat``.
        store: as in ``Chat``.

    Raises:
        InputError: both are given, or a store with a model that is not linearized.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int, temperature: float | None, top_p: float | None,
        drafting: Lossless | None, store: StateStore | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.drafting, self.store = model, tokenizer, drafting, store
        if store is not None and drafting is not None:
            raise InputError(f"store: {SOURCES_CACHE}")
        if store is not None:
            fingerprint(model)
        self.rows = agreed.embedding_rows(model)
        agreed.fit_padding(tokenizer, self.rows)
        self.ends = agreed.end_tokens(model, tokenizer)
        self.settings = _settings(model.generation_config, max_new_tokens, temperature, top_p)
        self.settings.eos_token_id = self.ends or None
        self.settings.pad_token_id = tokenizer.pad_token_id

    def encode(self, text: str, special: bool = False) -> torch.Tensor:
        """Ids of a text, int64 [tokens]; ``special`` lets the tokenizer add its own start of text."""
        return agreed.encode(self.tokenizer, text, self.rows, special)

    def longest(self, ids: torch.Tensor) -> tuple[Cache | None, int]:
        """What the store holds of a text, int64 [tokens], but for its last token, and how many tokens that are."""
        return (None, 0) if self.store is None else self.store.longest(ids[:-1], self.model)

    def _read(self, ids: torch.Tensor, cache: Cache | None) -> Cache | None:
        """Read a prompt but for its last token, and keep the state: another answer to the same begins there."""
        known = 0 if cache is None else int(cache.get_seq_length())
        if known < len(ids) - 1:
            model: Any = self.model
            keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
            new = ids[None, known:-1].to(model.device)
            with torch.no_grad():
                cache = cache_of(model(input_ids=new, **{CACHE: cache}, use_cache=True, **keep))
            self._keep(ids[:-1], cache)
        return cache

    def _keep(self, ids: torch.Tensor, cache: Any) -> None:
        """Put a state into the store; an answer is not lost because that fails."""
        try:
            self.store.put(ids, cache, self.model)  # type: ignore[union-attr]
        except InputError as error:
            warnings.warn(f"the state was not kept: {error}", stacklevel=2)

    def _within(self, length: int) -> GenerationConfig:
        """The settings for a prompt of so many tokens: no more new ones than a learned table of positions has left."""
        limit = learned_positions(self.model)
        if limit is None:
            return self.settings
        if length >= limit:
            raise InputError(
                f"prompt: {length:,} tokens; this model has learned positions for {limit:,} and none beyond them, so "
                "nothing can follow; give a shorter text"
            )
        settings = copy.copy(self.settings)
        settings.max_new_tokens = min(settings.max_new_tokens, limit - length)
        return settings

    def __call__(
        self, ids: list[torch.Tensor], seed: int | None, stream: TextIO | None, cache: Cache | None = None
    ) -> tuple[list[torch.Tensor], Clock, Cache]:
        """Generate for prompts of different lengths.

        Args:
            ids: token ids, one [tokens] int64 tensor per prompt.
            seed: makes sampling repeatable.
            stream: where the text is written.
            cache: holds the first tokens of the (single) prompt already.

        Returns:
            The new ids of each prompt, without padding and with the end token if there was one; the times; the cache.
        """
        pad = int(self.settings.pad_token_id or 0)
        batch = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
        if seed is not None:
            torch.manual_seed(seed)
        clock = Clock(_FileStreamer(self.tokenizer, stream) if stream else None)
        if self.store is not None:
            cache = self._read(ids[0], cache)
        said = ", ".join(
            f"{key} {value!r:.60}" for key, value in self.settings.to_diff_dict().items() if key in FOLLOWED
        )
        try:
            with agreed.only(self.model, self._within(batch.shape[1])) as settings:
                output: Any = (self.drafting or self.model).generate(  # pyright: ignore[reportCallIssue]
                    batch.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    generation_config=settings,
                    **{CACHE: cache},
                    streamer=clock,
                    tokenizer=self.tokenizer,
                )
        except (ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            problem = f"transformers cannot generate with these settings ({said}): {reason(error)}"
            raise InputError(f"generation_config.json: {problem}; {ADVICE}") from error
        new = []
        for row in output.sequences[:, batch.shape[1] :].cpu():
            stops = [position for position, token in enumerate(row.tolist()) if token in self.ends]
            new.append(row[: stops[0] + 1] if stops else row)
        cache = cache_of(output)
        if self.store is not None and cache is not None:
            self._keep(torch.cat([ids[0], new[0]])[: int(cache.get_seq_length())], cache)
        return new, clock, cache  # type: ignore[return-value]


def _settings(
    own: GenerationConfig | None, max_new_tokens: int, temperature: float | None, top_p: float | None
) -> GenerationConfig:
    """What the model's author says of sampling, and what our call says; see `FOLLOWED`."""
    stated = (own or GenerationConfig()).to_diff_dict()
    left = {key: value for key, value in stated.items() if key not in (*FOLLOWED, *WITHOUT_LOSS) and value}
    if left:
        listed = ", ".join(f"{key} {value!r:.60}" for key, value in left.items())
        warnings.warn(f"generation_config.json: not followed here: {listed}", stacklevel=2)
    values = {key: stated[key] for key in FOLLOWED if stated.get(key) is not None}
    if temperature is not None:
        values |= {"do_sample": temperature > 0, "temperature": temperature}
    if top_p is not None:
        values["top_p"] = top_p
    if not values.get("do_sample"):
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"):
            values.pop(key, None)  # set, they draw a warning per call
    values["min_new_tokens"] = min(values.get("min_new_tokens", 0), max_new_tokens) or None
    with reading("generation_config.json", "it asks for what transformers cannot do", ADVICE):
        problems = wrong_settings("hello", max_new_tokens, values.get("temperature"), values.get("top_p"), None)
        if problems:
            raise ValueError("; ".join(problems))
        settings = GenerationConfig(max_new_tokens=max_new_tokens, return_dict_in_generate=True, **values)
        settings.validate(strict=False)
    return settings
