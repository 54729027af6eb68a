"""Forms of one recurrence agree with the naive one, window attention with its explicit mask, rows with what they stand
for."""

import pytest
import torch
from accelerate.utils import send_to_device
from helpers.closeness import LIMIT, assert_close
from helpers.oracles import naive_window_attention
from torch import Tensor
from torch.nn import functional as F

from linearize.model.ops import additive
from linearize.model.ops.rows import Rows
from linearize.model.ops.window import window_attention

B, H, G, K, V = 2, 6, 2, 16, 12
LENGTHS = [1, 2, 7, 8, 9, 63, 64, 65, 130, 300]
DECAYS = ["none", "one", "scalar", "channel", "strong"]


def inputs(T: int, decay: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    width = {"scalar": 1, "channel": K, "strong": K}.get(decay)
    g = None
    if decay == "one":
        g = torch.zeros(B, G, T, 1, dtype=dtype)
    elif width:
        # "strong": keys near ±50, where a factorised form overflows within a chunk.
        g = F.logsigmoid(torch.randn(B, G, T, width, dtype=dtype) * (50 if decay == "strong" else 1))
    return {
        "q": torch.randn(B, H, T, K, dtype=dtype),
        "k": torch.randn(B, G, T, K, dtype=dtype),
        "v": torch.randn(B, G, T, V, dtype=dtype),
        "log_decay": g,
        "state": torch.randn(B, G, K, V, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "fp64"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_forms_agree(T, decay, dtype):
    x = inputs(T, decay, dtype)
    expected = additive.recurrent(**x)
    assert_close(additive.chunked(**x), expected, LIMIT[dtype])


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_agree(decay):
    x = {n: t.requires_grad_() if t is not None else None for n, t in inputs(70, decay).items()}
    leaves = [t for t in x.values() if t is not None]
    weight = torch.randn(B, H, 70, V)

    def gradients(form):
        y, state = form(**x)
        return torch.autograd.grad((y * weight).sum() + state.square().sum(), leaves)

    assert_close(gradients(additive.chunked), gradients(additive.recurrent), 1e-4)


def test_gradcheck():
    x = [t if t is None else t[:1, :, :, :3].requires_grad_() for t in inputs(11, "channel", torch.float64).values()]
    x[-1] = torch.randn(1, G, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(additive.chunked, x)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 99])
def test_a_sequence_in_two_pieces(cut, decay):
    x = inputs(100, decay)
    whole = additive.chunked(**x)
    first = {n: t if n == "state" or t is None else t[:, :, :cut] for n, t in x.items()}
    y1, middle = additive.chunked(**first)
    second = {n: t if t is None else t[:, :, cut:] for n, t in x.items() if n != "state"}
    y2, end = additive.chunked(**second, state=middle)
    assert_close((torch.cat([y1, y2], 2), end), whole, 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_steps_in_place(decay):
    x = inputs(20, decay)
    expected, final = additive.recurrent(**x)
    state = x["state"].clone()
    address = state.data_ptr()
    for t in range(20):
        token = {n: v if v is None else v[:, :, t : t + 1] for n, v in x.items() if n != "state"}
        q = token.pop("q")
        additive.update_state(**token, state=state)
        assert_close((additive.read_state(q, state),), (expected[:, :, t : t + 1],), 1e-5)
    assert state.data_ptr() == address
    assert_close((state,), (final,), 1e-5)


def test_by_hand():
    """Two tokens, one head, K = V = 1, decay ½: S = 2·3 = 6, y = 6; S = ½·6 + 5·7 = 38, y = −38."""
    column = lambda *a: torch.tensor(a, dtype=torch.float32).view(1, 1, 2, 1)  # noqa: E731
    for form in (additive.recurrent, additive.chunked):
        y, state = form(column(1, -1), column(2, 5), column(3, 7), column(0.5, 0.5).log())
        assert y.flatten().tolist() == pytest.approx([6, -38])
        assert state.item() == pytest.approx(38)


def test_a_zero_write_leaves_no_trace():
    x = inputs(10, "channel")
    zeros = {n: torch.zeros_like(x[n]) for n in ("k", "v", "log_decay")}
    for form in (additive.recurrent, additive.chunked):
        assert torch.equal(form(x["q"], **zeros, state=x["state"])[1], x["state"])


def test_long_sequence_neither_overflows_nor_drifts():
    """16K tokens with keys at −50 half of the time: finite, and equal to fp64 within fp32's own rounding."""
    T = 16_384
    raw = torch.randn(1, 1, T, 8) * 25 - 25
    x = {
        "q": torch.randn(1, 2, T, 8).softmax(-1),
        "k": raw.softmax(-1),
        "v": torch.randn(1, 1, T, 4),
        "log_decay": F.logsigmoid(raw) / 16,
    }
    y, state = additive.chunked(**x)
    exact, _ = additive.chunked(**{n: t.double() for n, t in x.items()})
    assert y.isfinite().all() and state.isfinite().all()
    assert_close((y.double(),), (exact,), 1e-5)


def test_low_precision_inputs_are_computed_in_fp32():
    x = inputs(100, "channel")
    low = {n: t.bfloat16() if n in "qkv" else t for n, t in x.items()}
    y, state = additive.chunked(**low)
    exact, _ = additive.recurrent(**{n: t.float() for n, t in low.items()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    # The only rounding is that of the output.
    assert float((y.float() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8


@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 68, 200, 300])
@pytest.mark.parametrize(("window", "sinks"), [(64, 4), (16, 0), (7, 3), (1, 0), (300, 2)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_window_is_the_masked_softmax(T, window, sinks, softcap):
    q, k, v = torch.randn(B, H, T, K), torch.randn(B, G, T, K), torch.randn(B, G, T, V)
    extra = torch.randn(H)
    sink = [F.pad(x, (0, 0, 0, sinks))[:, :, :sinks] for x in (k, v)]
    local = [F.pad(x, (0, 0, window, 0)) for x in (k, v)]
    common = {"scaling": 0.3, "softcap": softcap, "extra": extra}
    got = window_attention(q, *local, *sink, seen=0, window=window, **common)
    expected = naive_window_attention(q, k, v, window=window, sinks=sinks, **common)
    assert_close(got, expected, 1e-5)


def test_window_cost_grows_with_tokens_not_their_square():
    """Counted, not timed: multiply-adds of the matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(T):
        q, k = torch.randn(1, 2, T, K), torch.randn(1, 1, T + 64, K)
        with FlopCounterMode(display=False) as counter:
            window_attention(q, k, k, k[:, :, :4], k[:, :, :4], seen=0, window=64, scaling=1.0)
        return counter.get_total_flops()

    assert flops(4096) == 4 * flops(1024)


def test_rows_of_a_padded_batch():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]])
    rows = Rows.from_padding(real)
    x = torch.arange(20.0).view(4, 1, 5, 1)
    got = rows.gather(x)
    assert [r[v].tolist() for r, v in zip(got[:, 0, :, 0], rows.valid, strict=True)] == [
        [2, 3, 4], [5, 6], [10, 12, 14], []
    ]  # fmt: skip
    assert torch.equal(rows.scatter(got), x * real[:, None, :, None])


def test_rows_of_packed_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0]])
    rows = Rows.from_positions(positions)
    x = torch.arange(12.0).view(2, 1, 6, 1)

    def documents(part):
        got = part.gather(x)
        return [r[v].tolist() for r, v in zip(got[:, 0, :, 0], part.valid, strict=True)]

    for cached in (False, True):
        parts = rows.parts(cached)
        assert torch.equal(sum(part.scatter(part.gather(x)) for part in parts), x)
        every = [document for part in parts for document in documents(part)]
        assert sorted(every) == [[0, 1, 2], [3, 4], [5], [6, 7, 8, 9, 10], [11]]
    assert documents(rows.parts(True)[0]) == [[5], [11]], "a cache goes on from the last document of each item"
    assert Rows.from_positions(torch.arange(6)[None] + 3) is None


def test_packed_documents_cost_their_own_length():
    lengths = [100] * 70 + [2048] + [100] * 70
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for cached in (False, True):
        parts = Rows.from_positions(positions).parts(cached)
        assert sum(part.valid.numel() for part in parts) == sum(lengths) and len(parts) <= 3
    lengths = [int(n) for n in torch.randint(1, 500, (90,))]
    parts = Rows.from_positions(torch.cat([torch.arange(n) for n in lengths])[None]).parts(False)
    assert sum(part.valid.numel() for part in parts) <= 1.5 * sum(lengths) and len(parts) < 9


def test_rows_go_where_a_layer_lies():
    """Where a model lies on several devices, accelerate sends the arguments of each layer to its own."""
    packed = Rows.from_positions(torch.tensor([[0, 1, 0, 1]]))
    for rows in (Rows.from_padding(torch.tensor([[0, 1, 1]])), packed):
        moved = send_to_device({"rows": rows}, "meta")["rows"]
        for part in moved.parts(True):
            assert {x.device.type for x in (part.index, part.valid, part.back, part.real)} == {"meta"}
            part.gather(torch.zeros(*part.real.shape[:1], 1, part.real.shape[1], 2, device="meta"))
        assert moved.documents == rows.documents and moved.real.device.type == "meta"
        assert rows.to("cpu") is rows
    assert packed.to("meta") is packed.to("meta"), "made once, not once per layer"
