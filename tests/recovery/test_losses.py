"""Losses against their definitions written with torch's own functions, in values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from linearize.recovery import losses
from linearize.recovery.losses import IGNORE, count_targets, token_losses

B, T, V = 2, 7, 11


def example(dtype=torch.float64):
    logits = torch.randn(B, T, V, dtype=dtype, requires_grad=True)
    source = torch.randn(B, T, V, dtype=dtype)
    labels = torch.randint(0, V, (B, T))
    labels[0, 2] = labels[1, -1] = IGNORE
    return logits, labels, source


def reference(logits, labels, source, lm, kl, temperature):
    """The definitions, on [B, T - 1, V] at once."""
    logits, source, target = logits[:, :-1], source[:, :-1], labels[:, 1:]
    keep = target != IGNORE
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="sum")
    log_q, p = (logits / temperature).log_softmax(-1)[keep], (source / temperature).softmax(-1)[keep]
    divergence = temperature**2 * F.kl_div(log_q, p, reduction="sum")
    return lm * cross_entropy + kl * divergence, cross_entropy, divergence


@pytest.mark.parametrize("chunk", [1, 3 * V, 2**22])
@pytest.mark.parametrize(("lm", "kl", "temperature"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.3, 2.0, 2.5)])
def test_values_and_gradients_follow_the_definitions(monkeypatch, chunk, lm, kl, temperature):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    logits, labels, source = example()
    expected = reference(logits, labels, source, lm, kl, temperature)
    (expected_gradient,) = torch.autograd.grad(expected[0] / 5, logits)
    found = token_losses(logits, labels, source.clone(), lm=lm, kl=kl, temperature=temperature)
    (gradient,) = torch.autograd.grad(found.total / 5, logits)
    # fp64: only the order of additions differs.
    torch.testing.assert_close(found.total, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.lm, expected[1].detach(), rtol=1e-12, atol=1e-12)
    if kl:
        torch.testing.assert_close(found.kl, expected[2].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_the_next_token_loss_is_that_of_transformers(llama_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    ids = torch.randint(3, 300, (2, 20))
    output = model(input_ids=ids, labels=ids)
    found = token_losses(output.logits, ids)
    torch.testing.assert_close(found.total / count_targets(ids), output.loss, rtol=1e-6, atol=1e-6)


def test_a_source_equal_to_the_student_costs_nothing():
    logits, labels, _ = example()
    found = token_losses(logits, labels, logits.detach().clone(), lm=0, kl=1)
    (gradient,) = torch.autograd.grad(found.total, logits)
    assert found.kl.abs() < 1e-14 and gradient.abs().max() < 1e-14


def test_sums_of_halves_are_the_sum_of_the_whole():
    logits, labels, source = example()
    whole = token_losses(logits, labels, source.clone(), lm=1, kl=1)
    halves = [token_losses(logits[i : i + 1], labels[i : i + 1], source[i : i + 1].clone(), lm=1, kl=1) for i in (0, 1)]
    torch.testing.assert_close(whole.total, halves[0].total + halves[1].total, rtol=1e-12, atol=1e-12)


def test_low_precision_logits_are_reduced_in_fp32():
    logits = (20 * torch.randn(1, 64, 1000)).bfloat16().requires_grad_()
    source = (20 * torch.randn(1, 64, 1000)).bfloat16()
    labels = torch.randint(0, 1000, (1, 64))
    found = token_losses(logits, labels, source.clone(), lm=1, kl=1)
    total, cross_entropy, divergence = reference(logits.double(), labels, source.double(), 1, 1, 1)
    assert found.lm.dtype == found.kl.dtype == torch.float32
    torch.testing.assert_close(found.lm.double(), cross_entropy.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.kl.double(), divergence.detach(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(found.total, logits)
    (expected,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=2**-9)  # rounding of the bf16 gradient itself


def test_a_row_without_targets_gives_zero_and_no_gradient():
    logits, labels, source = example()
    labels[:] = IGNORE
    found = token_losses(logits, labels, source, lm=1, kl=1)
    (gradient,) = torch.autograd.grad(found.total, logits)
    assert count_targets(labels) == 0 and found.total == 0 and not gradient.any()


def test_the_gradient_takes_the_place_of_the_source_and_backward_runs_once():
    logits, labels, source = example()
    found = token_losses(logits, labels, source, lm=0, kl=1)
    found.total.backward(retain_graph=True)
    assert logits.grad is not None and logits.grad.data_ptr() == source.data_ptr()
    with pytest.raises(AttributeError):
        found.total.backward()


def test_kl_without_a_source_is_refused():
    logits, labels, _ = example()
    with pytest.raises(ValueError, match="kl needs source"):
        token_losses(logits, labels, kl=1.0)


def test_weights_of_positions_weigh_values_and_gradients():
    logits, labels, source = example()
    weights = torch.rand(T, dtype=torch.float64)
    rows = [
        reference(logits[:, t : t + 2], labels[:, t : t + 2], source[:, t : t + 2], 0.5, 2, 1) for t in range(T - 1)
    ]
    expected = [sum(w * x for w, x in zip(weights, values, strict=False)) for values in zip(*rows, strict=True)]
    (expected_gradient,) = torch.autograd.grad(expected[0], logits)
    found = token_losses(logits, labels, source.clone(), lm=0.5, kl=2, weights=weights)
    (gradient,) = torch.autograd.grad(found.total, logits)
    for a, b in zip((*found, gradient), (*expected, expected_gradient), strict=True):
        # fp64: only the order of additions differs.
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)
    keep = labels[:, 1:] != IGNORE
    assert count_targets(labels, weights) == pytest.approx(
        float((keep * weights[:-1]).sum()), rel=1e-6
    )  # fp32 at least
    assert count_targets(labels, torch.ones(T)) == count_targets(labels) == keep.sum()


# --- the source's likeliest tokens


def exact(source, k, temperature=1.0):
    """The k likeliest tokens without rounding to fp16."""
    log_p = (source / temperature).log_softmax(-1)
    top, ids = log_p.topk(k)
    return losses.Likeliest(ids.int(), top, log_p.scatter(-1, ids, float("-inf")).logsumexp(-1).clamp(min=losses.NEVER))


def bucketed(logits, labels, source, k, temperature):
    """τ² KL over k + 1 outcomes, from sums of probabilities."""
    keep = (labels[:, 1:] != IGNORE)[..., None]
    p, q = ((x[:, :-1] / temperature).softmax(-1) for x in (source, logits))
    ids = p.topk(k).indices
    p, q = (torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (p, q))
    return temperature**2 * (keep * p * (p.log() - q.log())).sum()


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize(("lm", "kl", "temperature"), [(0.0, 1.0, 1.0), (0.3, 2.0, 2.5)])
def test_the_likeliest_tokens_and_any_other_are_one_distribution(monkeypatch, chunk, lm, kl, temperature):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    logits, labels, source = example()
    expected = bucketed(logits, labels, source, 4, temperature)
    cross_entropy = reference(logits, labels, source, 1, 0, 1)[0]
    (expected_gradient,) = torch.autograd.grad(lm * cross_entropy + kl * expected, logits)
    found = token_losses(logits, labels, exact(source, 4, temperature), lm=lm, kl=kl, temperature=temperature)
    (gradient,) = torch.autograd.grad(found.total, logits)
    # fp64: 1 − Σ cancels some digits in the reference, not here.
    torch.testing.assert_close(found.kl, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_all_tokens_as_the_likeliest_are_the_dense_loss():
    logits, labels, source = example()
    dense = token_losses(logits, labels, source.clone(), lm=0.5, kl=2, temperature=1.5)
    found = token_losses(logits, labels, exact(source, V, 1.5), lm=0.5, kl=2, temperature=1.5)
    gradients = [torch.autograd.grad(each.total, logits)[0] for each in (dense, found)]
    # fp64: only the order of operations differs.
    for a, b in zip((*found, gradients[1]), (*dense, gradients[0]), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1, 30])
def test_rounded_probabilities_still_give_a_divergence(scale):
    """Sharp and flat sources, as they are kept: near the dense loss, never negative, 0 for the student itself."""
    logits, source = scale * torch.randn(2, 64, 500), scale * torch.randn(2, 64, 500)
    labels = torch.randint(0, 500, (2, 64))
    ks = (1, 8, 100, 500)
    found = [float(token_losses(logits, labels, losses.likeliest(source, k), kl=1).kl) for k in ks]
    dense = float(token_losses(logits, labels, source.clone(), kl=1).kl)
    # fp16 has 11 bits: probabilities, and what they weigh, are off by that in either direction.
    assert found[0] >= 0 and all(a < b * (1 + 2**-11) for a, b in zip(found, found[1:], strict=False))
    assert found[-1] == pytest.approx(dense, rel=2**-11)
    for k in ks:
        own = token_losses(source, labels, losses.likeliest(source, k), kl=1).kl / count_targets(labels)
        assert -1e-7 < own < 1e-4  # fp32 sums; squares of the rounding


def test_the_rest_keeps_a_mass_too_small_for_a_difference():
    """A token of probability 1 − 1e-12: in fp32 1 − p is 0, its logarithm is not."""
    source = torch.zeros(1, 2, 8)
    source[..., 3] = 30.0
    known = losses.likeliest(source, 1)
    assert known.ids.flatten().tolist() == [3, 3] and known.ids.dtype == torch.int32
    torch.testing.assert_close(known.log_rest, torch.full((1, 2), 7.0).log() - 30.0)
