"""Text from a converted folder: one prompt streamed, several in a left-padded batch, or a chat that keeps its cache."""

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from linearize.checkpoint import text as agreed
from linearize.checkpoint.open import load
from linearize.checkpoint.reading import reading
from linearize.errors import InputError
from linearize.generation.lossless import Lossless

Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": text}
FOLLOWED = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("sequence_bias", "exponential_decay_length_penalty", "renormalize_logits", "min_new_tokens", "stop_strings"),
)
"""Settings of generation_config.json that decide what one answer says. Others ask for something that an answer written
as it comes into being, or a cache kept between turns, cannot have (beams, several answers, another cache)."""
ADVICE = "mend the file, or give temperature and top_p"
WITHOUT_LOSS = {"bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"}
WITHOUT_LOSS |= {"transformers_version", "_from_model_config", "return_dict_in_generate", "disable_compile"}
"""Settings that are not followed and need no word: our call has its own."""


@dataclass(frozen=True)
class Generation:
    """One answer per prompt, and how long they took together."""

    texts: list[str]
    prompt_tokens: list[int]
    new_tokens: list[int]
    prefill_seconds: float  # until the first new token
    seconds: float
    tokens_per_second: float  # new tokens of all prompts per second of decoding; the prefill is left out
    tokens_per_pass: float | None = None  # of the source, where it was drafted

    def to_dict(self) -> dict:
        """The fields, JSON-safe."""
        return asdict(self)


def generate(
    folder: str | Path | PreTrainedModel,
    prompt: str | Sequence[str] | Sequence[Message],
    *,
    system: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    raw: bool = False,
    lossless: bool = False,
    stream: TextIO | None = None,
) -> Generation:
    """Continue one or several prompts.

    Args:
        folder: a folder or Hub id (see ``load``), or a model that is already loaded.
        prompt: a text, several texts (one left-padded batch), or the messages of one chat, the last one from the user.
        system: message of the system in front of a single text.
        tokenizer: of a model that is already loaded.
        max_new_tokens: upper limit per prompt; an end-of-text token ends a prompt earlier.
        temperature: 0 takes the most likely token; None does what the model's generation_config.json says.
        top_p: sample from the most likely tokens that together have this probability.
        seed: makes sampling repeatable.
        raw: give texts to the model as they are, even if the tokenizer has a chat template.
        lossless: write exactly what the source writes, drafted by the student; one prompt at a time.
        stream: where the text is written while it comes into being; only with one prompt.

    Returns:
        The answers.

    Raises:
        InputError: for an empty prompt, a setting out of range, messages without a chat template, or a folder that
            cannot be opened.

    Example:
        >>> linearize.generate("runs/demo/merged", "Why is the sky blue?", max_new_tokens=40).texts[0]
    """
    problems = _problems(prompt, max_new_tokens, temperature, top_p, stream)
    if system and not isinstance(prompt, str):
        problems.append("system goes with a single text; put it among the messages instead")
    if problems:
        raise InputError(f"generate: {'; '.join(problems)}")
    if system:
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": str(prompt)}]
    if isinstance(folder, PreTrainedModel):
        if tokenizer is None:
            raise InputError("generate: a loaded model was given without its tokenizer; pass tokenizer=")
        model = folder
    else:
        model, own = load(folder)
        tokenizer = tokenizer or own
    drafting = _drafting(folder, model) if lossless else None
    decoder = _Decoder(model, tokenizer, max_new_tokens, temperature, top_p, drafting)
    ids = [decoder.encode(text, special) for text, special in _texts(prompt, tokenizer, raw)]
    new, clock, _ = decoder(ids, seed, stream)
    answers = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in new]
    return clock.report(answers, [len(tokens) for tokens in ids], [len(tokens) for tokens in new], drafting)


class Chat:
    """A conversation whose cache is kept from turn to turn: only what is new since the last answer is read.

    A linearized model's cache does not grow, so neither does the cost of a turn. When a chat template rewrites earlier
    turns (some drop the assistant's reasoning), what the cache holds is of no use, and the conversation is
    read again from its start.

    Args:
        model: as loaded by ``load``.
        tokenizer: must have a chat template.
        system: the first message, if any.
        max_new_tokens: as in ``generate``.
        temperature: as in ``generate``.
        top_p: as in ``generate``.
        seed: set once, before the first answer.
        drafting: write what the source writes, drafted by this; None lets the student answer.

    Raises:
        InputError: the tokenizer has no chat template, or a setting is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        drafting: Lossless | None = None,
    ):
        problems = _problems("hello", max_new_tokens, temperature, top_p, None)
        if problems:
            raise InputError(f"chat: {'; '.join(problems)}")
        if not tokenizer.chat_template:
            raise InputError("chat: the tokenizer has no chat template; give the text to continue as a prompt instead")
        self.tokenizer, self.seed = tokenizer, seed
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._decoder = _Decoder(model, tokenizer, max_new_tokens, temperature, top_p, drafting)
        self._cache: Cache | None = None
        self._ids = torch.empty(0, dtype=torch.long)  # [tokens] of the conversation so far
        self._text = ""  # the same conversation as the template writes it, up to the end of the last answer

    def say(self, content: str, stream: TextIO | None = None) -> Generation:
        """Send one message.

        Args:
            content: the message.
            stream: where the answer is written while it comes into being.

        Returns:
            The answer; ``prompt_tokens`` counts what had to be read, not the whole chat.

        Raises:
            InputError: the chat template does not take the message; the conversation stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        rendered = agreed.render(self.tokenizer, messages, add_generation_prompt=True)
        known = len(self._ids)
        if self._cache is not None and rendered.startswith(self._text):
            ids = torch.cat([self._ids, self._decoder.encode(rendered[len(self._text) :])])
        else:
            self._cache, known = None, 0
            ids = self._decoder.encode(rendered)
        self.messages = messages
        (new,), clock, self._cache = self._decoder([ids], self.seed, stream, self._cache)
        self.seed = None
        answer = str(self.tokenizer.decode(new, skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": answer})
        self._ids = torch.cat([ids, new])
        # With its special tokens, because the template writes the one that ends an answer too.
        self._text = rendered + str(self.tokenizer.decode(new, skip_special_tokens=False))
        return clock.report([answer], [len(ids) - known], [len(new)], self._decoder.drafting)


def chat(chat: Chat, lines: Iterator[str], out: TextIO = sys.stdout) -> list[Message]:
    """Answer every line until there are no more: ``linearize generate DIR`` on a terminal.

    Args:
        chat: the conversation.
        lines: what the user types, for example ``sys.stdin``; empty lines are passed over.
        out: where prompts and answers are written.

    Returns:
        The messages of the whole conversation.
    """
    out.write("> ")
    out.flush()
    for line in lines:
        if line.strip():
            chat.say(line.strip(), stream=out)
        out.write("> ")
        out.flush()
    out.write("\n")
    return chat.messages


# --- one call of transformers' generate


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
        """Write a part of the text."""
        print(text, file=self.out, end="\n" if stream_end else "", flush=True)


class _Decoder:
    """A model, its tokenizer, and the settings to generate with.

    Args:
        model: as loaded by ``load``.
        tokenizer: of the model.
        max_new_tokens: as in ``generate``.
        temperature: as in ``generate``.
        top_p: as in ``generate``.
        drafting: as in ``Chat``.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int, temperature: float | None, top_p: float | None, drafting: Lossless | None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.drafting = model, tokenizer, drafting
        self.rows = agreed.embedding_rows(model)
        agreed.fit_padding(tokenizer, self.rows)
        self.ends = agreed.end_tokens(model, tokenizer)
        self.settings = _settings(model.generation_config, max_new_tokens, temperature, top_p)
        self.settings.eos_token_id = self.ends or None
        self.settings.pad_token_id = tokenizer.pad_token_id

    def encode(self, text: str, special: bool = False) -> torch.Tensor:
        """Ids of a text, int64 [tokens]; ``special`` lets the tokenizer add its own start of text."""
        return agreed.encode(self.tokenizer, text, self.rows, special)

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
        said = ", ".join(
            f"{key} {value!r:.60}" for key, value in self.settings.to_diff_dict().items() if key in FOLLOWED
        )
        problem = f"transformers cannot generate with these settings ({said})"
        with agreed.only(self.model, self.settings) as settings, reading("generation_config.json", problem, ADVICE):
            output: Any = (self.drafting or self.model).generate(  # pyright: ignore[reportCallIssue]
                batch.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=settings,
                past_key_values=cache,
                streamer=clock,
                tokenizer=self.tokenizer,
            )
        new = []
        for row in output.sequences[:, batch.shape[1] :].cpu():
            stops = [position for position, token in enumerate(row.tolist()) if token in self.ends]
            new.append(row[: stops[0] + 1] if stops else row)
        return new, clock, output.past_key_values


def _drafting(folder: str | Path | PreTrainedModel, model: PreTrainedModel) -> Lossless:
    return Lossless(model) if isinstance(folder, PreTrainedModel) else Lossless.of(folder, model)


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
        problems = _problems("hello", max_new_tokens, values.get("temperature"), values.get("top_p"), None)
        if problems:
            raise ValueError("; ".join(problems))
        settings = GenerationConfig(max_new_tokens=max_new_tokens, return_dict_in_generate=True, **values)
        settings.validate(strict=False)
    return settings


def _texts(
    prompt: str | Sequence[str] | Sequence[Message], tokenizer: PreTrainedTokenizerBase, raw: bool
) -> list[tuple[str, bool]]:
    """What the model reads, and whether the tokenizer adds its special tokens (a chat template has written them)."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    is_chat = not isinstance(prompts[0], str)
    if is_chat and not tokenizer.chat_template:
        raise InputError("generate: messages were given, but the tokenizer has no chat template; give a text instead")
    if not is_chat and (raw or not tokenizer.chat_template):
        return [(str(text), True) for text in prompts]
    conversations = [prompts] if is_chat else [[{"role": "user", "content": text}] for text in prompts]
    return [(agreed.render(tokenizer, each, add_generation_prompt=True), False) for each in conversations]


def _problems(
    prompt: str | Sequence[str] | Sequence[Message],
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    stream: TextIO | None,
) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = [text for text in prompts if isinstance(text, str)]
    checks = [
        (not prompts or any(not text for text in texts), "the prompt is empty; give at least one character"),
        (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}; expected at least 1"),
        (temperature is not None and temperature < 0, f"temperature is {temperature}; expected 0 or more"),
        (top_p is not None and not 0 < top_p <= 1, f"top_p is {top_p}; expected more than 0, at most 1"),
        (stream is not None and len(texts) > 1, f"{len(texts)} prompts cannot be streamed; give one, or stream=None"),
    ]
    return [message for failed, message in checks if failed]
