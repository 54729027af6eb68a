"""Forms of the diagonal recurrence and of the running softmax average agree with the naive ones."""

import math

import pytest
import torch
from helpers.closeness import LIMIT, assert_close
from torch import Tensor
from torch.nn import functional as F

from linearize.model.ops import average, diagonal

B, H, G, V = 2, 4, 2, 6
LENGTHS = [0, 1, 2, 63, 64, 65, 300]
KINDS = ["one", "real", "strong", "zero", "complex"]
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "fp64"])


def inputs(T: int, kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    normal = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    g = F.logsigmoid(normal(B, G, T, V) * (50 if kind == "strong" else 1))
    if kind == "one":
        g = torch.zeros(1, G, 1, V, dtype=dtype)
    if kind == "zero":
        g = torch.where(torch.rand_like(g) < 0.3, float("-inf"), g)
    x, state, phase = normal(B, G, T, V), normal(B, G, V), None
    if kind == "complex":
        phase, state = 3 * normal(B, G, T, V), torch.complex(state, normal(B, G, V))
    return {"x": x, "log_decay": g, "phase": phase, "state": state}


def tokens(x: dict[str, Tensor | None], start: int, stop: int) -> dict[str, Tensor | None]:
    return {n: t if t is None or t.shape[2] == 1 else t[:, :, start:stop] for n, t in x.items() if n != "state"}


@dtypes
@kinds
@pytest.mark.parametrize("T", LENGTHS)
def test_forms_agree(T, kind, dtype):
    x = inputs(T, kind, dtype)
    expected = diagonal.recurrent(**x)
    for got in (diagonal.chunked(**x), diagonal.chunked(**x, chunk=7)):
        assert got[0].shape == expected[0].shape
        if T:
            assert_close(got, expected, LIMIT[dtype])
        else:
            assert torch.equal(got[1], x["state"])


@kinds
def test_gradients_agree(kind):
    x = inputs(70, kind)
    leaves = [t.requires_grad_() for t in x.values() if t is not None]
    weight = torch.randn(B, G, 70, V)

    def gradients(form):
        h, state = form(**x)
        return torch.autograd.grad((h * weight).abs().sum() + state.abs().square().sum(), leaves)

    expected = gradients(diagonal.recurrent)
    assert all(g.isfinite().all() for g in expected)
    assert_close(gradients(diagonal.chunked), expected, 1e-4)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_gradcheck(kind):
    x = {n: t[:1][..., :2].clone().requires_grad_() for n, t in inputs(5, kind, torch.float64).items() if t is not None}
    form = lambda *a: diagonal.chunked(**dict(zip(x, a, strict=True)), chunk=3)  # noqa: E731
    assert torch.autograd.gradcheck(form, list(x.values()))
    assert torch.autograd.gradgradcheck(form, list(x.values()))


@kinds
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 99])
def test_a_sequence_in_two_pieces(cut, kind):
    x = inputs(100, kind)
    y1, middle = diagonal.chunked(**tokens(x, 0, cut), state=x["state"])
    y2, end = diagonal.chunked(**tokens(x, cut, 100), state=middle)
    assert_close((torch.cat([y1, y2], 2), end), diagonal.chunked(**x), 1e-5)


def test_unwritten_memory_shows():
    """What conftest.py does for the scan, which writes into memory of its own."""
    x = torch.zeros(3)
    assert all(t.isnan().all() for t in (torch.empty(3), torch.empty_like(x), x.new_empty(3)))


def test_the_state_is_not_a_view_of_the_output():
    """The next step writes into it."""
    x = inputs(65, "real")
    for form in (diagonal.recurrent, diagonal.chunked):
        h, state = form(**x)
        before = h.clone()
        state.zero_()
        assert torch.equal(h, before)


@kinds
def test_steps_in_place(kind):
    x = inputs(20, kind)
    expected, final = diagonal.recurrent(**x)
    state = x["state"].clone()
    address, got = state.data_ptr(), []
    for t in range(20):
        diagonal.update_state(**tokens(x, t, t + 1), state=state)
        got.append(state.clone())
    assert state.data_ptr() == address
    assert_close((torch.stack(got, 2), state), (expected, final), 1e-5)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_a_zero_write_leaves_no_trace(kind):
    x = inputs(10, kind)
    zeros = {n: t if n == "state" or t is None else torch.zeros_like(t) for n, t in x.items()}
    for form in (diagonal.recurrent, diagonal.chunked):
        assert torch.equal(form(**zeros)[1], x["state"])
    state = x["state"].clone()
    diagonal.update_state(**tokens(zeros, 0, 1), state=state)
    assert torch.equal(state, x["state"])


def test_by_hand():
    """h = 3, then ½·3 + 4 = 5.5; with a quarter turn, ½i·3 + 4 = 4 + 1.5i."""
    x, g = torch.tensor([3.0, 4.0]).view(1, 1, 2, 1), torch.full((1, 1, 2, 1), 0.5).log()
    for form in (diagonal.recurrent, diagonal.chunked):
        h, state = form(x, g)
        assert h.flatten().tolist() == pytest.approx([3, 5.5]) and state.item() == pytest.approx(5.5)
        h, state = form(x, g, torch.full_like(g, math.pi / 2))
        assert h.flatten().tolist() == pytest.approx([3, 4 + 1.5j]) and state.item() == pytest.approx(4 + 1.5j)


@pytest.mark.parametrize("kind", ["real", "strong", "complex"])
def test_long_sequence_does_not_drift(kind):
    x = inputs(16_384, kind)
    got = diagonal.chunked(**x)
    wide = lambda t: t if t is None else t.to(torch.promote_types(t.dtype, torch.float64))  # noqa: E731
    exact = diagonal.chunked(**{n: wide(t) for n, t in x.items()})
    assert_close(tuple(wide(t) for t in got), exact, 1e-5)


def test_low_precision_inputs_are_computed_in_fp32():
    x = inputs(100, "real")
    h, state = diagonal.chunked(x["x"].bfloat16(), x["log_decay"], state=x["state"])
    exact, _ = diagonal.recurrent(x["x"].bfloat16().float(), x["log_decay"], state=x["state"])
    assert h.dtype == torch.bfloat16 and state.dtype == torch.float32
    # The only rounding is that of the output.
    assert float((h.float() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8


# --- the running softmax average


def scored(T: int, scale: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Scores and values of T tokens, of which the first of one row and two more do not exist; and a state that has seen
    five others in one row and none in the other."""
    v = F.pad(torch.randn(B, G, T + 5, V, dtype=dtype), (0, 1), value=1.0)
    v[0, :, :5] = 0
    state = average.recurrent(torch.randn(B, H, 5, 1, dtype=dtype) * scale, v[:, :, :5])[2]
    v = v[:, :, 5:].clone()
    v[0, :, :1] = v[1, :, 2:4] = 0
    return {"score": torch.randn(B, H, T, 1, dtype=dtype) * scale, "v": v, "state": state}


def finite(*results: Tensor) -> tuple[Tensor, ...]:
    """The log weight of nothing, −∞, as 0."""
    return tuple(t.masked_fill(t == float("-inf"), 0) for t in results)


def direct(score: Tensor, v: Tensor) -> Tensor:
    """The definition by torch's softmax, for tokens that all exist and rows that start empty."""
    T = score.shape[2]
    logits = score.mT.expand(-1, -1, T, T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))
    return logits.softmax(-1) @ v[..., :-1].repeat_interleave(H // G, 1)


@dtypes
@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("T", LENGTHS)
def test_averages_agree(T, scale, dtype):
    x = scored(T, scale, dtype)
    expected = average.recurrent(**x)
    if T:
        # The row that has seen nothing and whose first token does not exist.
        assert bool((expected[1][0, :, 0] == float("-inf")).all()) and not expected[0][0, :, 0].any()
    got = average.chunked(**x)
    if T:
        assert_close(finite(*got), finite(*expected), LIMIT[dtype])
    else:
        assert torch.equal(got[2], x["state"])


@pytest.mark.parametrize("scale", [1, 1000])
def test_average_is_softmax(scale):
    x = scored(300, scale)
    x["v"][..., -1] = 1
    y, n, _ = average.chunked(x["score"], x["v"])
    assert_close((y,), (direct(x["score"], x["v"]),), 1e-5)
    assert_close((n,), (x["score"].squeeze(-1).logcumsumexp(-1),), 1e-5)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("scale", [1, 1000])
def test_gradients_of_the_average(form, scale):
    x = scored(70, scale)
    x["v"][..., -1] = 1
    leaves = [x["score"].requires_grad_(), x["v"].requires_grad_()]
    weight = torch.randn(B, H, 70, V)

    def gradients(y):
        return torch.autograd.grad((y * weight).sum(), leaves)

    got = gradients(getattr(average, form)(x["score"], x["v"])[0])
    expected = gradients(direct(x["score"], x["v"]))
    # The column of ones is a constant.
    assert_close((got[0], got[1][..., :-1]), (expected[0], expected[1][..., :-1]), 1e-4)


def test_gradcheck_of_the_average_with_its_weight():
    x = scored(6, 1, torch.float64)
    values, ones = x["v"][:, :, 2:, :2].clone().requires_grad_(), x["v"][:, :, 2:, -1:]
    score = x["score"][:, :, 2:].clone().requires_grad_()
    ones = torch.where(torch.arange(4)[:, None] == 0, 1.0, ones)

    def form(score, values):
        return average.chunked(score, torch.cat([values, ones], -1))[:2]

    assert torch.autograd.gradcheck(form, (score, values))


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 99])
def test_the_average_in_two_pieces(cut):
    x = scored(100, 1000)
    y1, n1, middle = average.chunked(x["score"][:, :, :cut], x["v"][:, :, :cut], x["state"])
    y2, n2, end = average.chunked(x["score"][:, :, cut:], x["v"][:, :, cut:], middle)
    assert_close(finite(torch.cat([y1, y2], 2), torch.cat([n1, n2], 2), end), finite(*average.chunked(**x)), 1e-5)


def test_steps_of_the_average_in_place():
    x = scored(20, 1000)
    expected, _, final = average.recurrent(**x)
    state = x["state"].clone()
    address = state.data_ptr()
    for t in range(20):
        average.update_state(x["score"][:, :, t : t + 1], x["v"][:, :, t : t + 1], state)
        assert_close(average.read_state(state)[:1], (expected[:, :, t : t + 1],), 1e-5)
    assert state.data_ptr() == address
    assert_close((state,), (final,), 1e-5)


def test_a_token_that_does_not_exist_leaves_no_trace_in_the_average():
    """Whatever its score; rows that have seen something and rows that have not."""
    x = scored(10, 1000)
    for form in (average.recurrent, average.chunked):
        end = form(x["score"], torch.zeros_like(x["v"]), x["state"])[2]
        assert torch.equal(end[1], x["state"][1]) and not end[0, :, :-1].any()


def test_the_average_of_many_equal_scores_does_not_drift():
    """16K tokens of score 20: the mean of all values, where log-sums in fp32 would lose 3 % of each weight."""
    v = F.pad(torch.randn(1, 1, 16_384, 4), (0, 1), value=1.0)
    y, _, _ = average.chunked(torch.full((1, 1, 16_384, 1), 20.0), v)
    count = torch.arange(1, 16_385, dtype=torch.float64)[:, None]
    assert_close((y.double(),), (v[..., :-1].double().cumsum(2) / count,), 1e-5)
