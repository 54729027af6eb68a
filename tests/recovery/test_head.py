"""Deferred logits against those made at once: every architecture's head, values, gradients, whole training runs."""

import pytest
import torch
from helpers.tiny import tiny_model
from helpers.training import losses as logged
from helpers.training import recipe_for, weights
from model.test_architectures import ARCHITECTURES

from linearize.checkpoint import adapters
from linearize.model.modeling import linearize_
from linearize.recipe.schema import Peft
from linearize.recovery import head
from linearize.recovery.head import Deferred, logits_of
from linearize.recovery.losses import likeliest, token_losses
from linearize.recovery.train import train

MIXER = {"name": "gla", "window": 8, "sinks": 2}


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few tokens, for a vocabulary of 384."""
    monkeypatch.setattr(head, "PIECE", 384 * 12)
    monkeypatch.setattr(head, "FEWEST", 1)


# Of the last: the causal LM calls its decoder in another way, so that its logits are made at once.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_head_is_the_models_own(architecture, small):
    model = linearize_(tiny_model(architecture, **ARCHITECTURES[architecture]), MIXER)
    ids = torch.randint(3, 384, (2, 20))
    with torch.no_grad():
        found, whole = logits_of(model, ids), model(ids, use_cache=False).logits
        assert isinstance(found, Deferred) and found.step == 6 and found.weights == []
        pieces = [found.head(found.hidden[:, i : i + 7]) for i in range(0, 20, 7)]
    # The same products, of other heights, in fp32.
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids, use_cache=False).logits, whole)  # the decoder is as it was


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_gradients_of_all_weights_are_those_of_logits_made_at_once(architecture, tied, small):
    settings = {**ARCHITECTURES[architecture], "tie_word_embeddings": tied}
    model = linearize_(tiny_model(architecture, layers=2, **settings), MIXER).double()
    source = tiny_model(architecture, layers=2, **settings).double()
    source = linearize_(source, {"name": "window", "window": 4}).requires_grad_(False)
    ids, by_position = torch.randint(3, 384, (2, 33)), torch.rand(33, dtype=torch.float64)
    answers = []
    for whole in (True, False):
        model.zero_grad()
        logits = model(ids, use_cache=False).logits if whole else logits_of(model, ids)
        taught = source(ids, use_cache=False).logits if whole else logits_of(source, ids)
        assert whole or isinstance(logits, Deferred) and isinstance(taught, Deferred)
        found = token_losses(logits, ids, taught, lm=0.3, kl=2.0, temperature=1.5, weights=by_position)
        (found.total * 0.7).backward()
        answers.append([*found, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    assert len(answers[0]) == len(answers[1]) > 20
    for a, b in zip(*answers, strict=True):
        # fp64: only the order of additions differs.
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-9)


def test_a_second_backward_pass_fails(small):
    model = linearize_(tiny_model(layers=2), MIXER)
    ids = torch.randint(3, 384, (1, 20))
    found = token_losses(logits_of(model, ids), ids)
    found.total.backward(retain_graph=True)
    with pytest.raises(TypeError):
        found.total.backward()


def test_no_more_than_a_piece_of_logits_is_alive(small):
    model = adapters.attach(linearize_(tiny_model(layers=2), MIXER), Peft())
    ids = torch.randint(3, 384, (1, 60))
    seen = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    with adapters.as_source(model):
        source = logits_of(model, ids)
    found = token_losses(logits_of(model, ids), ids, source, kl=1.0)
    found.total.backward()
    assert max(seen) == 12 and sum(seen) == 1 + 1 + 1 + 1 + 2 * 60  # trial, and last tokens of both


def test_likeliest_tokens_of_deferred_logits(small):
    model = linearize_(tiny_model(layers=2), MIXER)
    ids = torch.randint(3, 384, (1, 30))
    with torch.no_grad():
        for a, b in zip(likeliest(logits_of(model, ids), 5), likeliest(model(ids).logits, 5), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stage", [{"lm": 0.5}, {"peft": None, "lr": 1e-3}, {"transfer": 1.0}, {"top_k": 7}], ids=str)
def test_a_run_by_pieces_is_the_run_at_once(stage, converted, text, tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    whole = train(converted, recipe_for(text, **stage), None, tmp_path / "whole")
    monkeypatch.setattr(head, "PIECE", 384 * 20)
    monkeypatch.setattr(head, "FEWEST", 1)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "another"))
    pieces = train(converted, recipe_for(text, **stage), None, tmp_path / "pieces")
    # Four steps in fp32, sums in another order.
    torch.testing.assert_close(logged(pieces), logged(whole), rtol=1e-4, atol=1e-5)
    if "peft" not in stage:
        for name, weight in weights(whole).items():
            torch.testing.assert_close(weights(pieces)[name], weight, rtol=0, atol=1e-3)
