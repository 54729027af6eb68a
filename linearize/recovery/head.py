"""Logits that are made when they are needed, some tokens at a time: a vocabulary of 128K words takes 0.5 MiB a token.

The head of a model is all that its own forward does with the decoder's output (projection, scale, soft cap). It runs
here as it stands: the causal LM is called with its decoder replaced by one that returns the hidden states at hand. No
architecture is named, and nothing is copied; whether it works is seen by the logits of a token, made in both ways.
"""

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from linearize.model import architectures

PIECE = 2**25
"""Elements of the logits of one piece (128 MiB in fp32)."""
FEWEST = 256
"""Tokens of a piece at least: with fewer, reading the head's weights takes longer than using them."""
_splits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Causal LM -> whether its head can be run alone, once that was tried."""


class Deferred(NamedTuple):
    """Logits [B, T, V] that are not there yet.

    Attributes:
        hidden: the decoder's output, [B, T, D].
        head: [B, t, D] -> logits [B, t, V].
        weights: of the head, that are trained.
        step: for how many positions logits are to be made at a time.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    weights: list[Tensor]
    step: int


def piece(rows: int, vocabulary: int) -> int:
    """Positions of a block of `rows` texts whose logits are made at a time, for a vocabulary of that many words."""
    return max(1, max(FEWEST, PIECE // vocabulary) // rows)


def logits_of(
    model: Any, ids: Tensor, run: Callable[..., Any] | None = None,
    inside: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor | Deferred:  # fmt: skip
    """The logits of a causal LM, deferred where there are many and its head can be run alone.

    Args:
        model: linearized, in peft's wrapper or without.
        ids: int64 [B, T].
        run: calls the model, or what wraps it, with the arguments that it is given; None: the model itself.
        inside: a context for every run of the model or its head, such as autocast.
    """
    plain = _plain(model)
    call: Callable[..., Any] = model if run is None else run
    step = piece(len(ids), plain.config.get_text_config().vocab_size)
    if ids.shape[1] <= step or not splits(model, ids, inside):
        with inside():
            return call(input_ids=ids, use_cache=False).logits
    output, _ = _watched(plain, call, ids, inside)
    weights = []
    if torch.is_grad_enabled():
        head = {id(weight) for weight in plain.get_output_embeddings().parameters()}
        inner = {id(weight) for weight in _decoder(plain).parameters()} - head
        weights = [weight for weight in plain.parameters() if weight.requires_grad and id(weight) not in inner]
    return Deferred(output.last_hidden_state, lambda hidden: _head(plain, output, ids, hidden, inside), weights, step)


def splits(model: Any, ids: Tensor, inside: Callable[[], AbstractContextManager] = nullcontext) -> bool:
    """Whether the head of a model can be run alone; tried on two tokens, once for each model.

    Args:
        model: as for `logits_of`.
        ids: int64 [B, T].
        inside: as for `logits_of`.
    """
    plain = _plain(model)
    if plain not in _splits:
        training = plain.training
        plain.eval()
        try:
            with torch.no_grad():
                _splits[plain] = _may_split(plain) and _agrees(plain, ids[:1, :2], inside)
        finally:
            plain.train(training)
    return _splits[plain]


def _agrees(plain: Any, ids: Tensor, inside: Callable[[], AbstractContextManager]) -> bool:
    output, logits = _watched(plain, plain, ids, inside)
    if output is None:
        return False
    found = _head(plain, output, ids, output.last_hidden_state[:, -1:], inside)
    # The same operations on the same numbers, which a kernel may add up in another order.
    return found.shape == logits.shape and torch.allclose(found.float(), logits.float(), rtol=1e-2, atol=1e-2)


def _watched(plain: Any, run: Callable[..., Any], ids: Tensor, inside: Callable[[], AbstractContextManager]) -> Any:
    """What the decoder gives, None unless it ran once; and the logits of the last token."""
    outputs = []
    hook = _decoder(plain).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with inside():
            logits = run(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    finally:
        hook.remove()
    whole = len(outputs) == 1 and isinstance(getattr(outputs[0], "last_hidden_state", None), Tensor)
    return outputs[0] if whole else None, logits


def _plain(model: Any) -> Any:
    """The causal LM inside peft's wrapper."""
    return getattr(model, "get_base_model", lambda: model)()


def _may_split(model: Any) -> bool:
    forward = getattr(type(model), "source_class", type(model)).forward
    return (
        "logits_to_keep" in inspect.signature(forward).parameters
        and _decoder(model) is not model
        and model.get_output_embeddings() is not None
    )


def _decoder(model: Any) -> Any:
    entered = architectures.arch_of(model.config).enters
    return model.get_submodule(entered) if entered else model.base_model


def _head(
    plain: Any, output: Any, ids: Tensor, hidden: Tensor, inside: Callable[[], AbstractContextManager]
) -> Tensor:  # fmt: skip
    """Logits [B, t, V] of hidden states [B, t, D], by the model's own forward."""
    decoder, answer = _decoder(plain), copy.copy(output)
    answer.last_hidden_state = hidden
    before = vars(decoder).get("forward")
    decoder.forward = lambda *args, **kwargs: answer
    try:
        with inside():
            return plain(input_ids=ids[:, : hidden.shape[1]], use_cache=False).logits
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before
