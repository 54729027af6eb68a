"""Tokens that stay exact behind the window: which they are, what is read of them, and that every form agrees.

Rollback with them, and all of it in fp64, is in test_rollback.py.
"""

from typing import Any, cast

import pytest
import torch
from helpers.mixers import context
from helpers.tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache

from linearize.errors import InputError
from linearize.model import states
from linearize.model.cache import LinearizedCacheLayer
from linearize.model.mixers import MIXERS, Geometry, build_config
from linearize.model.modeling import linearize_
from linearize.model.ops import exact

B, H, G, K, V, W, S, T, N = 2, 4, 2, 16, 12, 5, 2, 40, 7
ADDRESSED = [name for name, cls in MIXERS.items() if cls.addressed]
SCALING = 0.4


def made(name: str, gate: float = 0.5, **values):
    config = build_config({"name": name, "window": W, "sinks": S, "exact": N, **values})
    torch.manual_seed(1)
    mixer = MIXERS[name](config, Geometry(H, G, K, K))
    if mixer.gate is not None:
        mixer.gate.data.fill_(gate)
    return mixer


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, T, K), torch.randn(B, G, T, K), torch.randn(B, G, T, K)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The source's attention over everything."""
    a = SCALING * q @ k.repeat_interleave(H // G, 1).mT
    a = a.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    return a.softmax(-1) @ v.repeat_interleave(H // G, 1)


@torch.no_grad()
def decoded(mixer, q: Tensor, k: Tensor, v: Tensor, *ends: int) -> tuple[Tensor, LinearizedCacheLayer]:
    """Outputs of blocks that end there, of single tokens behind them, and the cache."""
    cache, parts, start = DynamicCache(), [], 0
    for end in (*ends, *range(ends[-1] + 1, T + 1)):
        parts.append(mixer(*(x[:, :, start:end] for x in (q, k, v)), context(cache=cache)))
        start = end
    return torch.cat(parts, 2), cache.layers[0]  # pyright: ignore[reportReturnType]


# --- the operations


def by_definition(q, k, v, score, exists, softcap=None):
    """At every token: those of the N largest scores among all so far, the older first; softmax over them."""
    y, weight = q.new_zeros(B, H, T, V), q.new_full((B, H, T), -1.0)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        g = h // (H // G)
        there = [j for j in range(t + 1) if exists[b, g, j, 0]]
        held = sorted(there, key=lambda j, b=b, g=g: (-float(score[b, g, j, 0]), j))[:N]
        if held:
            a = SCALING * k[b, g, held] @ q[b, h, t]
            a = a if softcap is None else softcap * (a / softcap).tanh()
            y[b, h, t], weight[b, h, t] = a.softmax(0) @ v[b, g, held], a.logsumexp(0)
    return y, weight


def inputs(ties: bool):
    q, k, v = (torch.randn(B, n, T, w, dtype=torch.float64) for n, w in ((H, K), (G, K), (G, V)))
    score = torch.rand(B, G, T, 1, dtype=torch.float64)
    exists = (torch.rand(B, 1, T, 1) > 0.2).double()
    exists[0, :, :3] = 0
    return q, k, v, (4 * score).round() if ties else score, exists.expand(B, G, T, 1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("form", [exact.recurrent, exact.chunked])
def test_both_forms_are_the_definition(form, ties, softcap):
    q, *rest = inputs(ties)
    empty = tuple(x.double() for x in exact.initial_state(B, G, K, V, N, torch.device("cpu")))
    parts, state = [], empty
    for piece in (slice(0, 17), slice(17, 18), slice(18, T)):
        blocks = {"block": 8} if form is exact.chunked else {}
        given = (x[:, :, piece] for x in (q, *rest))
        *part, state = form(*given, state, scaling=SCALING, softcap=softcap, **blocks)
        parts.append(part)
    y, weight = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    expected, log_weight = by_definition(q, *rest, softcap=softcap)
    some = log_weight > -1
    some |= weight > exact.EMPTY / 2
    torch.testing.assert_close(y[some], expected[some], rtol=0, atol=1e-12)
    torch.testing.assert_close(weight[some], log_weight[some], rtol=0, atol=1e-12)
    assert (weight[~some] < exact.EMPTY / 2).all() and y.isfinite().all()
    assert not any(x.any() for x in empty)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_both_forms_round_alike(dtype):
    q, k, v, score, exists = (x.float() for x in inputs(False))
    state = exact.initial_state(B, G, K, V, N, torch.device("cpu"))
    one = exact.recurrent(q, k, v, score, exists, state, scaling=SCALING, dtype=dtype)
    other = exact.chunked(q, k, v, score, exists, state, scaling=SCALING, dtype=dtype, block=16)
    some = one[1] > exact.EMPTY / 2
    for a, b in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(a[some], b[some], rtol=0, atol=1e-5)
    assert torch.equal(one[2][1], other[2][1]) and torch.equal(one[2][0], other[2][0])


def test_what_is_read_has_its_gradient():
    """Also across blocks, and none for what is not held."""
    q, k, v, score, exists = inputs(False)
    grads, forms = [], cast("tuple[Any, ...]", (exact.chunked, by_definition))
    for form in forms:
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        state = tuple(x.double() for x in exact.initial_state(B, G, K, V, N, torch.device("cpu")))
        more = ((state,), {"scaling": SCALING, "block": 8}) if form is exact.chunked else ((), {})
        form(*own, score, exists, *more[0], **more[1])[0][:, :, 10:].square().sum().backward()
        grads.append([x.grad for x in own])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-10)


# --- the mixers


@pytest.mark.parametrize("name", ADDRESSED)
def test_blocks_and_steps_are_the_whole(name):
    mixer, (q, k, v) = made(name), drawn()
    with torch.no_grad():
        whole = mixer(q, k, v, context(scaling=SCALING))
        plain = made(name, exact=0)(q, k, v, context(scaling=SCALING))
    assert (whole - plain)[:, :, : W + S].abs().max() == 0
    assert (whole - plain)[:, :, W + S :].abs().amax((0, 1, 3)).min() > 1e-4, "tokens are read as soon as they leave"
    for ends in ((1,), (9, 26), (30,)):
        torch.testing.assert_close(decoded(mixer, q, k, v, *ends)[0], whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gla", "linear", "kda", "gated_deltanet"])
def test_a_store_for_everything_is_the_sources_attention(name):
    """A memory with a weight has none left, one without stays behind its closed gate."""
    q, k, v = drawn()
    mixer = made(name, gate=0.0, exact=T)
    with torch.no_grad():
        torch.testing.assert_close(mixer(q, k, v, context(scaling=SCALING)), causal(q, k, v), rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded(mixer, q, k, v, 20)[0], causal(q, k, v), rtol=0, atol=1e-5)


def test_what_the_recurrence_knows_is_not_kept():
    """Of values that a key tells, seen again and again, the one that is new stays."""
    q, k, v = drawn()
    k[:], v[:] = k[:, :, :4].repeat(1, 1, T // 4, 1), v[:, :, :4].repeat(1, 1, T // 4, 1)
    v[:, :, 20] = torch.randn(B, G, K)
    _, layer = decoded(made("delta_net", exact=5), q, k, v, T)
    tokens = layer.state[-3][..., K:]
    assert (tokens - v[:, :, 20:21]).abs().amax(-1).amin(-1).max() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "kda"])
def test_a_cache_is_as_large_as_it_says_and_near_in_every_dtype(name, dtype):
    q, k, v = drawn()
    mixer = made(name, state_dtype=dtype, exact=T)
    y, layer = decoded(mixer, q, k, v, 28)
    assert (y - decoded(made(name, exact=T), q, k, v, 28)[0]).abs().max() < 0.03 * y.abs().max()
    assert layer.nbytes() == mixer.state_bytes(B, 4)
    size = {"float32": 4 * 2 * K, "bfloat16": 2 * 2 * K, "int8": 2 * K + 4}[dtype] + 4
    none = made(name, state_dtype=dtype, exact=0).state_bytes(1, 4)
    assert mixer.state_bytes(1, 4) - none == G * (T * size + 4)
    assert layer.state[-2].dtype == torch.float32


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "kda"])
def test_padding_and_packed_texts_are_texts_alone(name):
    model = linearize_(tiny_model(layers=2), {"name": name, "window": W, "sinks": S, "exact": 6}).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gate"):
            parameter.data.fill_(0.5)
    x = torch.randint(3, 50, (2, T))
    with torch.no_grad():
        alone = [model(x[:1], use_cache=False).logits[0], model(x[1:, 13:], use_cache=False).logits[0]]
        mask = torch.ones_like(x)
        mask[1, :13] = 0
        cache, positions = DynamicCache(), (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(x, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        both, where = torch.cat([x[:1], x[1:, 13:]], 1), torch.cat([torch.arange(T), torch.arange(T - 13)])[None]
        packed = model(both, position_ids=where, use_cache=False).logits[0]
        new = torch.tensor([[7], [9]])
        more = torch.cat([mask, torch.ones_like(new)], 1)
        step = model(new, attention_mask=more, position_ids=more.sum(1)[:, None] - 1, past_key_values=cache).logits
        longer = model(torch.cat([x[1:, 13:], new[1:]], 1), use_cache=False).logits[0, -1]
    torch.testing.assert_close(padded[0], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1, 13:], alone[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
    torch.testing.assert_close(step[1, -1], longer, rtol=0, atol=1e-5)


def test_the_cache_is_saved_stacked_and_checked_and_the_folder_says_so(tmp_path):
    model = linearize_(tiny_model(layers=2), {"name": "gla", "window": W, "sinks": S, "exact": 6}).eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert all(values["exact"] == 6 for values in again.config.linearize["layers"].values())
    x = torch.randint(3, 50, (2, T))
    with torch.no_grad():
        caches = [model(row[None], use_cache=True).past_key_values for row in x]
        for cache in caches:
            states.check(cache, again)
        expected = torch.cat([model(x[:1, :1], past_key_values=states.copied(cache)).logits for cache in caches])
        got = again(
            x[:1, :1].expand(2, 1), past_key_values=states.stack_states(caches),
            attention_mask=torch.ones(2, T + 1), position_ids=torch.full((2, 1), T),
        ).logits  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert "exact" not in build_config({"name": "gla"}).to_dict(), "folders without it stay as they were"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "gla", "exact": -1}, "mixer.exact: found -1; expected at least 0"),
        ({"name": "gla", "exact": 4, "combine": "liger"}, "exact: found 4 with combine liger; .*use combine: memory"),
        *[
            ({"name": name, "exact": 4}, f"exact: found 4; the state of {name} is not read by key.*gated_deltanet")
            for name in ("clusters", "gsa", "window", "softmax", "hgrn", "aaren")
        ],
    ],
)
def test_what_is_refused(values, says):
    combine = {"combine": "none"} if values["name"] in ("window", "softmax") else {}
    with pytest.raises(InputError, match=says):
        build_config({**combine, **values})
