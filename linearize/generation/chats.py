"""A conversation that keeps what it has read."""

from pathlib import Path
from typing import TextIO

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from linearize.checkpoint import states
from linearize.checkpoint import text as agreed
from linearize.checkpoint.reading import reading
from linearize.errors import InputError
from linearize.generation.decoder import SOURCES_CACHE, Decoder
from linearize.generation.lossless import Lossless
from linearize.generation.result import Generation, Message, wrong_settings
from linearize.generation.store import StateStore


class Chat:
    """A conversation whose cache is kept from turn to turn: only what is new since the last answer is read.

    A linearized model's cache does not grow, so neither does the cost of a turn. When a chat template rewrites earlier
    turns (some drop the assistant's reasoning), what the cache holds is of no use, and the conversation is
    read again from its start.

    `messages` may be cut or changed between turns. With a store a state is put there at the end of each message of the
    user and of each answer, so only what comes after the first change is read again; without, all is.

    Args:
        model: as loaded by ``load``.
        tokenizer: must have a chat template.
        system: the first message, if any.
        max_new_tokens: as in ``generate``.
        temperature: as in ``generate``.
        top_p: as in ``generate``.
        seed: set once, before the first answer.
        drafting: write what the source writes, drafted by this; None lets the student answer.
        store: where states are kept.

    Raises:
        InputError: the tokenizer has no chat template, a setting is out of range, or drafting and store are given.
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
        store: StateStore | None = None,
    ):
        problems = wrong_settings("hello", max_new_tokens, temperature, top_p, None)
        if problems:
            raise InputError(f"chat: {'; '.join(problems)}")
        if not tokenizer.chat_template:
            raise InputError("chat: the tokenizer has no chat template; give the text to continue as a prompt instead")
        self.tokenizer, self.seed = tokenizer, seed
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._decoder = Decoder(model, tokenizer, max_new_tokens, temperature, top_p, drafting, store)
        self._cache: Cache | None = None  # of `_ids`, but for the last
        self._ids = torch.empty(0, dtype=torch.long)  # [tokens] of the conversation so far
        self._text = ""  # the same conversation as the template writes it, up to the end of the last answer
        self._marks: list[tuple[int, int]] = []  # ends of messages: characters of `_text`, tokens of `_ids`

    @property
    def model(self) -> PreTrainedModel:
        """That answers."""
        return self._decoder.model

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
        marks = [mark for mark in self._marks if rendered.startswith(self._text[: mark[0]])]
        known, length = marks[-1] if marks else (0, 0)
        ids, rest = self._ids[:length], rendered[known:]
        if rest:
            ids = torch.cat([ids, self._decoder.encode(rest)])
        # Where reading is interrupted, what the cache holds is not known.
        cache, self._cache = self._cache, None
        if cache is None or length < len(self._ids):
            cache, length = self._decoder.longest(ids)
        (new,), clock, cache = self._decoder([ids], self.seed, stream, cache)
        self.seed = None
        answer = str(self.tokenizer.decode(new, skip_special_tokens=True))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        # With its special tokens, because the template writes the one that ends an answer too.
        self._text = rendered + str(self.tokenizer.decode(new, skip_special_tokens=False))
        self._ids, self._cache = torch.cat([ids, new]), cache
        self._marks = [*marks, (len(rendered), len(ids)), (len(self._text), len(self._ids))]
        return clock.report([answer], [len(ids) - length], [len(new)], self._decoder.drafting)

    def edit(self, index: int, content: str, stream: TextIO | None = None) -> Generation:
        """Say something else in the place of an earlier message; what came behind it is forgotten.

        Args:
            index: of the message, in `messages`; it must be one from the user.
            content: the new message.
            stream: as in `say`.

        Returns:
            The answer, as `say`.

        Raises:
            InputError: there is no message from the user at this index; or as `say`, the conversation stays then.
        """
        before, roles = self.messages, [message["role"] for message in self.messages]
        if not -len(roles) <= index < len(roles) or roles[index] != "user":
            users = [number for number, role in enumerate(roles) if role == "user"]
            raise InputError(f"chat: message {index} is none of the user; theirs are {users}")
        self.messages = before[: index % len(roles)]
        try:
            return self.say(content, stream)
        except BaseException:
            self.messages = before
            raise

    def regenerate(self, stream: TextIO | None = None) -> Generation:
        """Answer the last message again; `stream` and what is returned and raised as of `edit`."""
        users = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise InputError("chat: there is no message to answer again; say something first")
        return self.edit(users[-1], self.messages[users[-1]]["content"], stream)

    def check_target(self, file: str | Path) -> None:
        """Refuse, before anything is said, a file that `save` could not write; as that raises."""
        if self._decoder.drafting is not None:
            raise InputError(f"chat: {SOURCES_CACHE}")
        states.check_target(file, self.model)

    def save(self, file: str | Path) -> Path:
        """Save the conversation with its state.

        Args:
            file: see `save_state`.

        Raises:
            InputError: nothing was read yet, the cache is the source's, or the file cannot be written.
        """
        self.check_target(file)
        if self._cache is None:
            raise InputError("chat: nothing has been answered yet, so there is no state to save; say something first")
        notes = {"messages": self.messages, "text": self._text, "marks": self._marks}
        return states.save_state(self._cache, self._ids, self.model, file, notes)

    def resume(self, file: str | Path) -> None:
        """Go on with a conversation that was saved; only what is new is read.

        Args:
            file: of `save`.

        Raises:
            InputError: this conversation has begun, the file holds none, or it does not fit the model.
        """
        if self.messages or self._decoder.drafting is not None:
            reason = SOURCES_CACHE if self._decoder.drafting is not None else "it has begun; the state brings its own"
            raise InputError(f"chat: {reason}")
        cache, ids, notes = states.read_state(file, self.model)
        if not {"messages", "text", "marks"} <= notes.keys():
            raise InputError(f"{file}: holds a plain text and no chat; go on from it by a prompt with raw (--raw)")
        with reading(file, "holds no chat that can be read", "save it anew"):
            messages = [{"role": str(each["role"]), "content": str(each["content"])} for each in notes["messages"]]
            marks = [(int(text), int(tokens)) for text, tokens in notes["marks"]]
            if marks != sorted(marks) or marks[-1] != (len(notes["text"]), len(ids)):
                raise ValueError("its marks are not those of its text")
        self.messages, self._text, self._marks = messages, str(notes["text"]), marks
        self._ids, self._cache = ids, cache
