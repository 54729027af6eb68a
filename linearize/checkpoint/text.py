"""Text in and out of a model: the facts that tokenizer, chat template, generation settings and model each state.

They come from different files and different people. Whoever turns text into ids, or ids into text, takes them here.
torch is imported where a tensor is made, so that exported graphs are run without it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.reading import reason
from linearize.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

MARK = "20375"
"""An answer that a template leaves as it is: digits have no case."""
NEAR = 32
"""Characters behind an answer in which the token that ends it is looked for."""
TEMPLATE_SECONDS = 5.0
"""Until a chat template that has not ended is taken for one that never will."""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Let a tokenizer that was just opened write and read a word: bad settings of its own show only then."""
    tokenizer.decode(tokenizer("a b")["input_ids"], skip_special_tokens=True)
    return tokenizer


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids a model can embed."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def beyond(vocabulary: dict[str, int], rows: int) -> dict[str, int]:
    """The tokens for which an embedding has no row, by their text.

    Args:
        vocabulary: of a tokenizer.
        rows: of the embedding.
    """
    return {token: number for token, number in sorted(vocabulary.items()) if number >= rows}


def beyond_said(tokens: dict[str, int], rows: int) -> str:
    """A sentence about what `beyond` found."""
    named = ", ".join(f"{token!r} ({number})" for token, number in list(tokens.items())[:5])
    named += " ..." * (len(tokens) > 5)
    return (
        f"{len(tokens)} of its tokens lie beyond the {rows:,} rows of the embedding: {named}; "
        "a text with one of them is refused; call model.resize_token_embeddings(len(tokenizer)) on the source and save "
        "both to have rows for them"
    )


def fit_padding(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Let a tokenizer pad with a token that the model can embed; masked as it is, which one it is makes no difference.

    Args:
        tokenizer: changed in place.
        rows: of the embedding.
    """
    usable = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0]
    pad = next(number for number in usable if number is not None and number < rows)
    if tokenizer.pad_token_id != pad:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def check_ids(ids: torch.Tensor | list[int], rows: int, tokenizer: Any, where: str) -> None:
    """Check that an embedding has a row for each token of a text.

    Args:
        ids: int64, of any shape, or a list of numbers.
        rows: of the embedding.
        tokenizer: that wrote them, to name them.
        where: at the start of the error.

    Raises:
        InputError: names a token that is beyond.
    """
    number = max(ids, default=0) if isinstance(ids, list) else int(ids.max()) if ids.numel() else 0
    if number >= rows:
        raise InputError(
            f"{where}: the text has the token {tokenizer.convert_ids_to_tokens(number)!r}, number {number}, but the "
            f"model's embedding has {rows} rows; take the token out of the text or the tokenizer, or give the source a "
            "row for it (model.resize_token_embeddings(len(tokenizer))) and convert again"
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, rows: int, special: bool = False) -> torch.Tensor:
    """Ids of a text that is to be continued, int64 [tokens]; arguments and errors as of `numbers`."""
    import torch

    return torch.tensor(numbers(tokenizer, text, rows, special))


def numbers(tokenizer: Any, text: str, rows: int, special: bool = False) -> list[int]:
    """Ids of a text that is to be continued.

    Args:
        tokenizer: of the model, or what can be called like one.
        text: what the model reads.
        rows: of its embedding.
        special: let the tokenizer put its start of text in front. What it puts behind is left out: the model
            would take what it writes for a new text.

    Raises:
        InputError: there is nothing in it for the tokenizer, or a token that the model cannot embed.
    """
    ids = list(tokenizer(text, add_special_tokens=special).input_ids)
    if special and (plain := list(tokenizer(text, add_special_tokens=False).input_ids)):
        starts = (start for start in range(len(ids) - len(plain) + 1) if ids[start : start + len(plain)] == plain)
        ids = ids[: next(starts, len(ids)) + len(plain)]
    if not ids:
        raise InputError(f"prompt {text[:40]!r}: the tokenizer finds no token in it; give a text with other characters")
    check_ids(ids, rows, tokenizer, "prompt")
    return ids


def render(tokenizer: Any, messages: Any, **options: Any) -> str:
    """A conversation as the chat template writes it.

    Args:
        tokenizer: with a chat template.
        messages: a list, each with role and content.
        **options: of `apply_chat_template`.

    Raises:
        InputError: the template raises an error, does not end, or writes nothing.
    """
    roles = ", ".join(str(message.get("role")) for message in messages)
    try:
        with _time_limit(TEMPLATE_SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of somebody else, and may raise anything
        what = "does not end" if isinstance(error, TimeoutError) else f"says: {reason(error) or type(error).__name__}"
        raise InputError(
            f"chat template: on messages of the roles {roles} it {what}. Give messages that the template takes (some "
            "want no system message, or user and assistant in turn), or the plain text by raw"
        ) from error
    if not isinstance(text, str) or not text:
        raise InputError(f"chat template: it writes nothing for messages of the roles {roles}; give the plain text")
    return text


def prompts(prompt: Any, tokenizer: Any, raw: bool) -> list[tuple[str, bool]]:
    """What a model reads, and whether the tokenizer adds its special tokens (a chat template has written them).

    Args:
        prompt: a text, several texts, or the messages of one chat.
        tokenizer: of the model.
        raw: texts are read as they are, even if there is a chat template.

    Raises:
        InputError: messages without a chat template, or one that does not take them.
    """
    given = [prompt] if isinstance(prompt, str) else list(prompt)
    is_chat = not isinstance(given[0], str)
    if is_chat and not tokenizer.chat_template:
        raise InputError("generate: messages were given, but the tokenizer has no chat template; give a text instead")
    if not is_chat and (raw or not tokenizer.chat_template):
        return [(str(text), True) for text in given]
    conversations = [given] if is_chat else [[{"role": "user", "content": text}] for text in given]
    return [(render(tokenizer, each, add_generation_prompt=True), False) for each in conversations]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which an answer ends: what generation_config, config and tokenizer say, and what the chat template
    writes behind an answer. They often differ, and any of them may be the one that the model has learned.

    Args:
        model: with its configurations.
        tokenizer: of it.

    Returns:
        Their ids, ascending.
    """
    stated = (model.generation_config, model.config.get_text_config(), tokenizer)
    ends = {number for each in stated for number in _numbers(getattr(each, "eos_token_id", None))}
    if tokenizer.chat_template:
        with suppress(InputError):
            text = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}])
            behind = text.rpartition(MARK)[2][:NEAR] if MARK in text else ""
            tokens = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
            there = {token: behind.find(token) for token in tokens if token.strip() and token in behind}
            ends |= {tokens[token] for token, where in there.items() if where == min(there.values())}
    return sorted(ends)


@contextmanager
def only(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[GenerationConfig]:
    """Generate with these settings; the model's own are out of the way meanwhile, because `generate` fills gaps with
    them.

    Args:
        model: that generates.
        settings: all that counts.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=settings.pad_token_id)
    try:
        yield settings
    finally:
        model.generation_config = before


def _numbers(value: Any) -> Iterable[int]:
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, int)]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block of Python that takes longer; in any thread, which signals cannot do."""
    thread = ctypes.c_ulong(threading.get_ident())
    expire = ctypes.pythonapi.PyThreadState_SetAsyncExc
    timer = threading.Timer(seconds, expire, (thread, ctypes.py_object(TimeoutError)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
