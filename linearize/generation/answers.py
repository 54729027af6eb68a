"""Text from a converted folder: one prompt streamed, or several in a left-padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.checkpoint import states
from linearize.checkpoint import text as agreed
from linearize.checkpoint.open import load
from linearize.errors import InputError
from linearize.generation import graph
from linearize.generation.chats import Chat
from linearize.generation.decoder import SOURCES_CACHE, Decoder
from linearize.generation.lossless import Lossless
from linearize.generation.result import Generation, Message, asked, wrong_settings
from linearize.generation.store import StateStore

EXACT = "lossless writes what the source's own weights write; leave quantize out"


def generate(
    folder: str | Path | PreTrainedModel, prompt: str | Sequence[str] | Sequence[Message], *,
    system: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None, max_new_tokens: int = 256,
    temperature: float | None = None, top_p: float | None = None, seed: int | None = None, raw: bool = False,
    quantize: str | None = None, lossless: bool = False, state: str | Path | None = None,
    save_state: str | Path | None = None, store: StateStore | None = None, stream: TextIO | None = None,
) -> Generation:  # fmt: skip
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
        quantize: hold the weights of a folder's model as int8, int4 or nf4.
        lossless: write exactly what the source writes, drafted by the student; one prompt at a time.
        state: file of a saved state to go on from: a single prompt is the next message of its chat, or the text behind
            its text; only that is read.
        save_state: file to save the state in, answer included, once it is there.
        store: go on from the longest text that it holds, and put this one into it; one prompt at a time.
        stream: where the text is written while it comes into being; only with one prompt.

    Returns:
        The answers; with a state or a store ``prompt_tokens`` counts what had to be read.

    Raises:
        InputError: for an empty prompt, a setting out of range, messages without a chat template, a folder that cannot
            be opened, or a state that does not fit its model.

    Example:
        >>> linearize.generate("runs/demo/merged", "Why is the sky blue?", max_new_tokens=40).texts[0]
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings["seed"] = seed
    if isinstance(folder, str | Path) and graph.is_graph(folder):
        return graph.generate(
            folder, prompt, **settings, system=system, raw=raw, stream=stream, tokenizer=tokenizer, quantize=quantize,
            lossless=lossless, state=state, save_state=save_state, store=store,
        )  # fmt: skip
    keeping = Keeping(state, save_state, store)
    problems = wrong_settings(prompt, max_new_tokens, temperature, top_p, stream)
    problems += keeping.problems(prompt, system, lossless)
    if quantize and lossless:
        problems.append(EXACT)
    prompt = asked(prompt, system, problems)
    model, tokenizer = _opened(folder, tokenizer, quantize)
    if keeping:
        return keeping.answer(prompt, raw, model, tokenizer, settings, stream)
    drafting = _drafting(folder, model) if lossless else None
    decoder = Decoder(model, tokenizer, max_new_tokens, temperature, top_p, drafting)
    ids = [decoder.encode(text, special) for text, special in agreed.prompts(prompt, tokenizer, raw)]
    new, clock, _ = decoder(ids, seed, stream)
    answers = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in new]
    return clock.report(answers, [len(tokens) for tokens in ids], [len(tokens) for tokens in new], drafting)


@dataclass(frozen=True)
class Keeping:
    """What a single answer goes on from, and what is kept of it; arguments as of `generate`."""

    state: str | Path | None
    save_state: str | Path | None
    store: StateStore | None

    def __bool__(self) -> bool:
        return any(each is not None for each in (self.state, self.save_state, self.store))

    def problems(self, prompt: Any, system: str | None, lossless: bool) -> list[str]:
        """What does not go together."""
        if not self:
            return []
        texts = [] if isinstance(prompt, str) else [each for each in prompt if isinstance(each, str)]
        checks = [
            (lossless, SOURCES_CACHE),
            (len(texts) > 1, f"{len(texts)} prompts were given; states are of one text each: give one"),
            (self.state and system, "system stands in the state already; leave it out"),
            (
                self.state and not isinstance(prompt, str) and len(prompt) > 1,
                f"{len(prompt)} messages were given; the state holds those before; give the new one alone",
            ),
        ]
        return [message for failed, message in checks if failed]

    def answer(
        self, prompt: Any, raw: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any], stream: TextIO | None,
    ) -> Generation:  # fmt: skip
        """Answer one prompt, as `generate`; `settings` are arguments of `Chat`."""
        (prompt,) = [prompt] if isinstance(prompt, str) or not isinstance(prompt[0], str) else prompt
        if self.save_state is not None:
            states.check_target(self.save_state, model)
        if isinstance(prompt, str) and (raw or not tokenizer.chat_template):
            return self._continue(prompt, model, tokenizer, settings, stream)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if messages[-1].get("role") != "user":
            raise InputError("generate: the last message is not from the user; with a state or a store it has to be")
        talk = Chat(model, tokenizer, store=self.store, **settings)
        if self.state is not None:
            talk.resume(self.state)
        talk.messages += messages[:-1]
        answer = talk.say(messages[-1]["content"], stream)
        if self.save_state is not None:
            talk.save(self.save_state)
        return answer

    def _continue(
        self, prompt: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any], stream: TextIO | None,
    ) -> Generation:  # fmt: skip
        """Write on from a plain text."""
        values = {**settings, "store": self.store, "drafting": None}
        seed, decoder = values.pop("seed"), Decoder(model, tokenizer, **values)
        if self.state is not None:
            cache, before = states.load_state(self.state, model)
            ids = torch.cat([before, decoder.encode(prompt)])
            known = len(before)
        else:
            ids = decoder.encode(prompt, special=True)
            cache, known = decoder.longest(ids)
        (new,), clock, cache = decoder([ids], seed, stream, cache)
        if self.save_state is not None:
            states.save_state(cache, torch.cat([ids, new]), model, self.save_state)
        answer = str(tokenizer.decode(new, skip_special_tokens=True))
        return clock.report([answer], [len(ids) - known], [len(new)], None)


def _opened(
    folder: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, quantize: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not isinstance(folder, PreTrainedModel):
        model, own = load(folder, quantize=quantize)
        return model, tokenizer or own
    if quantize is not None:
        raise InputError("generate: quantize is for folders; this model is loaded: linearize.load(..., quantize=)")
    if tokenizer is None:
        raise InputError("generate: a loaded model was given without its tokenizer; pass tokenizer=")
    return folder, tokenizer


def _drafting(folder: str | Path | PreTrainedModel, model: PreTrainedModel) -> Lossless:
    return Lossless(model) if isinstance(folder, PreTrainedModel) else Lossless.of(folder, model)
