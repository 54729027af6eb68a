"""What comes out of a model, and the talk on a terminal: the same for a model in torch and for a graph without it."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from linearize.errors import InputError

Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": text}


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


def chat(chat: Any, lines: Iterator[str], out: TextIO = sys.stdout, save_state: Path | None = None) -> list[Message]:
    """Answer every line until there are no more: ``linearize generate DIR`` on a terminal.

    Args:
        chat: the conversation, a `Chat` or what can be talked to like one.
        lines: what the user types, for example ``sys.stdin``; empty lines are passed over.
        out: where prompts and answers are written.
        save_state: file to save the conversation in after each answer.

    Returns:
        The messages of the whole conversation.
    """
    if save_state is not None:
        chat.check_target(save_state)
    out.write("> ")
    out.flush()
    for line in lines:
        if line.strip():
            chat.say(line.strip(), stream=out)
            if save_state is not None:
                chat.save(save_state)
        out.write("> ")
        out.flush()
    out.write("\n")
    return chat.messages


def wrong_settings(
    prompt: str | Sequence[str] | Sequence[Message],
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    stream: TextIO | None,
) -> list[str]:
    """What is wrong with arguments of `generate`, a sentence each."""
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


def asked(prompt: Any, system: str | None, problems: list[str]) -> Any:
    """The prompt with the message of the system in front.

    Args:
        prompt: a text, several texts, or messages.
        system: the message, if any.
        problems: of the other arguments of `generate`.

    Raises:
        InputError: there are problems, or the system speaks to something else than one text.
    """
    if system and not isinstance(prompt, str):
        problems = [*problems, "system goes with a single text; put it among the messages instead"]
    if problems:
        raise InputError(f"generate: {'; '.join(problems)}")
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}] if system else prompt
