"""Forms of the delta rule and of its diagonal-plus-low-rank generalisation agree with the naive ones."""

import pytest
import torch
from helpers.closeness import LIMIT, assert_close
from helpers.delta import FAMILIES, B, H, V, family, inputs
from torch import Tensor

from linearize.model.ops import additive, delta, dplr

DECAYS = ["none", "one", "scalar", "channel", "strong"]
decays = pytest.mark.parametrize("decay", DECAYS)


def tokens(x: dict[str, Tensor | None], start: int, stop: int) -> dict[str, Tensor | None]:
    return {n: t if t is None else t[:, :, start:stop] for n, t in x.items() if n != "state"}


@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "fp64"])
@decays
@pytest.mark.parametrize("T", [0, 1, 7, 9, 63, 64, 65, 300])
@family
def test_forms_agree(family, T, decay, dtype):
    x, ops = inputs(family, T, decay, dtype), FAMILIES[family]
    expected = ops.recurrent(**x)
    got = ops.chunked(**x)
    assert got[0].shape == expected[0].shape
    if T:
        assert_close(got, expected, LIMIT[dtype])
    else:
        assert torch.equal(got[1], x["state"])


@decays
@family
def test_a_thousand_tokens(family, decay):
    x, ops = inputs(family, 1000, decay), FAMILIES[family]
    assert_close(ops.chunked(**x), ops.recurrent(**x), 1e-5)


@decays
@family
def test_gradients_agree(family, decay):
    x, ops = inputs(family, 70, decay), FAMILIES[family]
    leaves = [t.requires_grad_() for t in x.values() if t is not None]
    weight = torch.randn(B, H, 70, V)

    def gradients(form):
        y, state = form(**x)
        return torch.autograd.grad((y * weight).sum() + state.square().sum(), leaves)

    expected = gradients(ops.recurrent)
    assert all(g.isfinite().all() for g in expected)
    assert_close(gradients(ops.chunked), expected, 1e-4)


@family
def test_gradcheck(family):
    x = {n: t[:1, :, :, :3] for n, t in inputs(family, 9, "channel", torch.float64).items() if t is not None}
    x["state"] = x["state"][:, :, :3]
    names, values = list(x), [t.clone().requires_grad_() for t in x.values()]
    assert torch.autograd.gradcheck(lambda *a: FAMILIES[family].chunked(**dict(zip(names, a, strict=True))), values)


@decays
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 99])
@family
def test_a_sequence_in_two_pieces(family, cut, decay):
    x, ops = inputs(family, 100, decay), FAMILIES[family]
    y1, middle = ops.chunked(**tokens(x, 0, cut), state=x["state"])
    y2, end = ops.chunked(**tokens(x, cut, 100), state=middle)
    assert_close((torch.cat([y1, y2], 2), end), ops.chunked(**x), 1e-5)


@decays
@family
def test_steps_in_place(family, decay):
    x, ops = inputs(family, 20, decay), FAMILIES[family]
    expected, final = ops.recurrent(**x)
    state = x["state"].clone()
    address = state.data_ptr()
    for t in range(20):
        token = tokens(x, t, t + 1)
        q = token.pop("q")
        ops.update_state(**token, state=state)
        assert_close((additive.read_state(q, state),), (expected[:, :, t : t + 1],), 1e-5)
    assert state.data_ptr() == address
    assert_close((state,), (final,), 1e-5)


@family
def test_a_zero_write_leaves_no_trace(family):
    x, ops = inputs(family, 10, "channel"), FAMILIES[family]
    zeros = {n: t if n in ("q", "state") else torch.zeros_like(t) for n, t in x.items()}
    for form in (ops.recurrent, ops.chunked):
        assert torch.equal(form(**zeros)[1], x["state"])
    token, state = tokens(zeros, 0, 1), x["state"].clone()
    del token["q"]
    ops.update_state(**token, state=state)
    assert torch.equal(state, x["state"])


def test_delta_by_hand():
    """One head, K = V = 1, k = 1, β = ½ then 2, decay 1 then ½: S = ½·6 = 3, y = 3; the second token keeps half of it,
    1.5, and goes twice the way to 4: S = 1.5 + 2·(4 − 1.5) = 6.5, y = −6.5."""
    column = lambda *a: torch.tensor(a, dtype=torch.float32).view(1, 1, 2, 1)  # noqa: E731
    for form in (delta.recurrent, delta.chunked):
        y, state = form(column(1, -1), column(1, 1), column(6, 4), column(0.5, 2), column(1, 0.5).log())
        assert y.flatten().tolist() == pytest.approx([3, -6.5])
        assert state.item() == pytest.approx(6.5)


def test_dplr_by_hand():
    """One head, K = V = 1: S = 2·3 = 6, y = 6; then decay ½, a = −1, b = ¼: S = (½ − ¼)·6 + 5·7 = 36.5, y = −36.5."""
    column = lambda *a: torch.tensor(a, dtype=torch.float32).view(1, 1, 2, 1)  # noqa: E731
    for form in (dplr.recurrent, dplr.chunked):
        y, state = form(
            column(1, -1), column(2, 5), column(3, 7), column(1, -1), column(1, 0.25), column(0.5, 0.5).log()
        )
        assert y.flatten().tolist() == pytest.approx([6, -36.5])
        assert state.item() == pytest.approx(36.5)


@decays
def test_the_delta_rule_is_a_case_of_dplr(decay):
    x = inputs("delta", 100, decay)
    k, g, beta = x["k"], x["log_decay"], x["beta"]
    general = {n: t for n, t in x.items() if n != "beta"}
    general.update(k=beta * k, a=k if g is None else g.exp() * k, b=-beta * k)
    assert_close(dplr.chunked(**general), delta.recurrent(**x), 1e-5)


@decays
def test_repeated_keys_with_negative_eigenvalues(decay):
    """β = 2 and one key for all tokens: every token reflects the state, and nothing of it fades."""
    x = inputs("delta", 300, decay)
    x["k"], x["beta"] = x["k"][:, :, :1].expand_as(x["k"]), torch.full_like(x["beta"], 2)
    # Without decay the triangular system has condition (2C)²: measured 3e-5 in fp32, 1e-4 leaves a factor of three.
    assert_close(delta.chunked(**x), delta.recurrent(**x), 1e-4)
    double = {n: t if t is None else t.double() for n, t in x.items()}
    assert_close(delta.chunked(**double), delta.recurrent(**double), 1e-10)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@family
def test_a_decay_of_zero_forgets(family, decay):
    """−∞ in the log: outputs of the form agree, and gradients stay finite."""
    x, ops = inputs(family, 100, decay), FAMILIES[family]
    x["log_decay"] = torch.where(torch.rand_like(x["log_decay"]) < 0.2, float("-inf"), x["log_decay"])
    leaves = [t.requires_grad_() for t in x.values()]
    got = ops.chunked(**x)
    assert_close(tuple(t.detach() for t in got), tuple(t.detach() for t in ops.recurrent(**x)), 1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got[0].sum() + got[1].sum(), leaves))


def test_keys_of_moderate_norm_stay_finite():
    x = inputs("delta", 1000, "channel")
    x["k"] = 1.5 * x["k"]
    y, state = delta.chunked(**{**x, "beta": x["beta"] / 2})
    assert y.isfinite().all() and state.isfinite().all()


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@family
def test_long_sequence_neither_overflows_nor_drifts(family, decay):
    """16K tokens: equal to fp64 within fp32's own rounding."""
    x = {n: t if t is None else t[:1, :, :, :4] for n, t in inputs(family, 16_384, decay).items()}
    x["q"], x["state"] = x["q"][:, :2], None
    got = FAMILIES[family].chunked(**x)
    exact = FAMILIES[family].chunked(**{n: t if t is None else t.double() for n, t in x.items()})
    assert_close(tuple(t.double() for t in got), exact, 1e-5)


@family
def test_low_precision_inputs_are_computed_in_fp32(family):
    x, ops = inputs(family, 100, "channel"), FAMILIES[family]
    low = {n: t.bfloat16() if n in ("q", "k", "v", "beta", "a", "b") else t for n, t in x.items()}
    y, state = ops.chunked(**low)
    exact, _ = ops.recurrent(**{n: t.float() for n, t in low.items()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    # The only rounding is that of the output.
    assert float((y.float() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8


@family
def test_cost_grows_with_tokens_not_their_square(family):
    """Counted, not timed: multiply-adds of the matrix products; and the largest tensor that autograd keeps."""
    from torch.utils.flop_counter import FlopCounterMode

    def cost(T):
        x, sizes = inputs(family, T, "scalar"), [0]
        x["q"].requires_grad_()
        keep = lambda t: sizes.append(t.numel()) or t  # noqa: E731
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            FAMILIES[family].chunked(**x)
        return counter.get_total_flops(), max(sizes)

    (flops, size), (more_flops, more_size) = cost(256), cost(1024)
    assert more_flops == 4 * flops and more_size == 4 * size
