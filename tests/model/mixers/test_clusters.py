"""The memory of clusters: its block form is its definition token by token, and exact where nothing was merged."""

import pytest
import torch
from helpers.mixers import context
from helpers.oracles import clustered
from helpers.tiny import tiny_model
from torch.nn import functional as F
from transformers import DynamicCache

from linearize.errors import InputError
from linearize.model.mixers import Geometry, build_config
from linearize.model.mixers.clusters import Mixer
from linearize.model.modeling import linearize_
from linearize.model.ops import clusters as ops
from linearize.model.ops import joining

B, H, G, K, V, M, C = 2, 4, 2, 6, 5, 8, 2
RULE = ops.Rule(chunk=C, mass=0.5, expected=0.7, heads=H // G, scaling=0.4, softcap=20.0)


def drawn(T: int, dtype=torch.float64, holes: bool = True):
    exists = (torch.rand(B, 1, T, 1) > (0.3 if holes else -1)).to(dtype).expand(-1, G, -1, -1)
    q, k, v = (torch.randn(B, n, T, w, dtype=dtype) for n, w in ((H, K), (G, K), (G, V)))
    return q, k * exists, v * exists, exists


def empty(dtype=torch.float64):
    return tuple(x.to(dtype) for x in ops.initial_state(B, G, K, V, M, torch.device("cpu")))


@pytest.mark.parametrize("T", [0, 1, 5, 8, 9, 10, 57])
@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
def test_blocks_are_steps(T, holes):
    x = drawn(T, holes=holes)
    y, weight, state = ops.run(*x, empty(), RULE)
    if T == 0:
        return
    expected = clustered(*x, empty(), RULE)
    real = x[3][:, :1, :, 0].expand(-1, H, -1) > 0
    # fp64: sums of at most 57 terms in two orders.
    for a, b in zip((y[real], weight[real], *state), (expected[0][real], expected[1][real], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("T", [1, 9, 57])
@pytest.mark.parametrize("cut", [0, 4])
def test_blocks_in_four_bits_are_steps(T, cut):
    """With rows whose first token comes later; the centre is the first token of each."""
    q, k, v, exists = drawn(T, torch.float32)
    k, v = (F.pad(x, (0, 8 - x.shape[-1])) + 5 * exists for x in (k, v))
    q = F.pad(q, (0, 8 - K))
    start = ops.initial_state(B, G, 8, 8, M, q.device, torch.uint8)
    parts, block = [x.split([cut, T - cut], 2) if cut < T else (x[:, :, :0], x) for x in (q, k, v, exists)], start
    for i in range(2):
        *last, block = ops.run(*(x[i] for x in parts), block, RULE)
    steps, y, weight = tuple(x.clone() for x in start), [], []
    for t in range(T):
        one = slice(t, t + 1)
        ops.update_state(k[:, :, one], v[:, :, one], exists[:, :, one], steps, RULE)
        for kept, part in zip((y, weight), ops.read_state(q[:, :, one], steps, RULE), strict=True):
            kept.append(part)
    real = exists[:, :1, -last[0].shape[2] :, 0].expand(-1, H, -1) > 0
    for a, b in zip(last, (torch.cat(x, 2) for x in (y, weight)), strict=True):
        torch.testing.assert_close(a[real], b[:, :, -a.shape[2] :][real], rtol=0, atol=1e-5)
    torch.testing.assert_close(ops.opened(block), ops.opened(steps), rtol=0, atol=1e-5)
    seen = exists[:, :1] > 0
    first = torch.stack([k[b, :, int(seen[b, 0, :, 0].int().argmax())] for b in range(B)])
    there = seen.any(2)[:, :, None]
    torch.testing.assert_close(block[-1][:, :, 0, :8], torch.where(there[:, :, 0], first, 0), rtol=0, atol=0)


def stepped(q, k, v, exists, state):
    """All tokens one by one: what they read, and the state behind them."""
    state, read = tuple(x.clone() for x in state), []
    for t in range(q.shape[2]):
        one = slice(t, t + 1)
        ops.update_state(k[:, :, one], v[:, :, one], exists[:, :, one], state, RULE)
        read.append(ops.read_state(q[:, :, one], state, RULE)[0])
    return torch.cat(read, 2), state


@pytest.mark.parametrize("seed", range(6))
def test_many_merges_in_four_bits_round_alike(seed, monkeypatch):
    """Rounding what is rounded may change it, so blocks and steps round as often; of rows that are full at
    different times, one by one or all at once."""
    torch.manual_seed(seed)
    monkeypatch.setattr(ops, "MERGED", 1 if seed % 2 else ops.MERGED)
    q, k, v = (torch.randn(B, n, 160, 32) for n in (H, G, G))
    exists, start = torch.ones(B, G, 160, 1), ops.initial_state(B, G, 32, 32, 32, q.device, torch.uint8)
    exists[1, :, :5] = 0
    y, _, state = ops.run(q, k, v, exists, start, RULE)
    read, steps = stepped(q, k, v, exists, start)
    torch.testing.assert_close(y[:, :, 5:], read[:, :, 5:], rtol=0, atol=1e-4)
    torch.testing.assert_close(ops.opened(state), ops.opened(steps), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8, torch.uint8])
def test_a_token_that_does_not_exist_leaves_nothing(dtype):
    q, k, v = (torch.randn(1, n, 20, 8) for n in (H, G, G))
    exists, start = torch.ones(1, G, 20, 1), ops.initial_state(1, G, 8, 8, M, q.device, dtype)
    for t in (0, 7, 19):
        k[:, :, t], v[:, :, t], exists[:, :, t] = float("nan"), float("inf"), 0
    read, state = stepped(q, k, v, exists, start)
    assert ops.opened(state).isfinite().all() and read[:, :, 1:].isfinite().all()
    assert state[1][..., 0].sum() == 17 * G


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_gradients_end_between_pieces_of_whole_numbers(dtype, monkeypatch):
    monkeypatch.setattr(ops, "PIECE", 20)
    q, k, v = (torch.randn(1, n, 44, 8, requires_grad=True) for n in (H, G, G))
    y, *_ = ops.run(q, k, v, torch.ones(1, G, 44, 1), ops.initial_state(1, G, 8, 8, M, q.device, dtype), RULE)
    (g,) = torch.autograd.grad(y[:, :, 40:].square().sum(), v)
    assert g[:, :, 40:].any() and not g[:, :, :40].any()


@pytest.mark.parametrize("cuts", [(3,), (8, 9), (20, 21, 40)])
def test_pieces_are_the_whole(cuts, monkeypatch):
    x = drawn(57)
    with monkeypatch.context() as small:
        small.setattr(ops, "PIECE", 16)  # and so are those that it makes itself
        y, weight, last = ops.run(*x, empty(), RULE)
    state, parts = empty(), []
    for start, end in zip((0, *cuts), (*cuts, 57), strict=True):
        *part, state = ops.run(*(each[:, :, start:end] for each in x), state, RULE)
        parts.append(part)
    real = x[3][:, :1, :, 0].expand(-1, H, -1) > 0
    for whole, pieces in zip((y, weight), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces, 2)[real], whole[real], rtol=0, atol=1e-10)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_gradients_are_those_of_the_definition():
    found = []
    for form in (ops.run, clustered):
        torch.manual_seed(3)
        *x, exists = drawn(30, holes=False)
        x = [each.requires_grad_() for each in x]
        y, weight, state = form(*x, exists, empty(), RULE)
        total = y.square().sum() + weight.sin().sum() + state[0].square().sum()
        found.append(torch.autograd.grad(total, x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [3, joining.ROWS])
def test_a_merge_is_the_cheapest_pairs_and_keeps_every_token(rows, monkeypatch):
    """By hand: of eight clusters two go, each into the earlier one that changes outputs least; counts and sums stay."""
    monkeypatch.setattr(joining, "ROWS", rows)
    keys, values, n = torch.randn(1, 1, M, K), torch.randn(1, 1, M, V), torch.randint(1, 5, (1, 1, M, 1)).float()
    queries, sizes = 9 * torch.rand(1, 1, 1, 2 * K + 1), torch.cat([n, torch.rand(1, 1, M, 1)], -1)
    means, size, _ = ops.joined(torch.cat([keys, values], -1), sizes, queries[..., :-1], RULE)
    merged = *means.split((K, V), -1), size[..., :1]
    w, k, v, count = queries[0, 0, 0, :K], keys[0, 0], values[0, 0], n[0, 0, :, 0]
    square, mean = (queries[0, 0, 0, part] / count.sum() / 2 for part in (slice(0, K), slice(K, 2 * K)))
    variance = (square - mean**2).clamp(min=0)
    share = count * ((k * mean).sum(1) + 0.5 * (k**2 * variance).sum(1)).exp() ** 0.7
    found = []
    for i in range(1, M):
        costs = [
            min(share[i], share[j]) * (w * (k[i] - k[j]).square()).sum() * (v[i] - v[j]).square().sum()
            for j in range(i)
        ]
        found.append((float(min(costs)), i, int(torch.stack(costs).argmin())))
    for _, i, j in sorted(sorted(found)[:C], key=lambda row: -row[1]):  # the last one first: partners are earlier
        k[j] = (k[i] * count[i] + k[j] * count[j]) / (count[i] + count[j])
        v[j] = (v[i] * count[i] + v[j] * count[j]) / (count[i] + count[j])
        count[j], count[i] = count[i] + count[j], 0
    stays = count > 0
    for a, b in zip(merged, (k, v, count[:, None]), strict=True):
        torch.testing.assert_close(a[0, 0, : M - C], b[stays])
        assert not a[0, 0, M - C :].any()


def test_it_is_the_source_while_nothing_is_merged_and_merges_after():
    model = tiny_model("llama", layers=2)
    ids = torch.arange(3, 43).view(1, 40)
    with torch.no_grad():
        source = model(ids).logits
        mixer = {"name": "clusters", "window": 6, "sinks": 2, "clusters": 16, "chunk": 4}
        logits = linearize_(model, mixer)(ids).logits
    reach = 6 + 2 + 16
    # fp32, two softmaxes joined instead of one.
    torch.testing.assert_close(logits[:, :reach], source[:, :reach], rtol=0, atol=1e-5)
    assert (logits[:, reach + 4 :] - source[:, reach + 4 :]).abs().max() > 1e-3


def test_the_spread_of_a_cluster_is_the_variance_of_its_members():
    """After merges of all kinds, a cluster of tokens at known places holds Σ_d w_d Var_d of them."""
    keys = torch.tensor([0.0, 0.1, 5.0, 5.3, 9.0, 9.1, 20.0, 30.0]).view(1, 1, M, 1).expand(-1, -1, -1, K).clone()
    values = keys[..., :V].clone()
    sizes = torch.tensor([1.0, 0.0]).expand(1, 1, M, 2).clone()
    queries = 8 * torch.rand(1, 1, 1, 2 * K + 1)
    rule = ops.Rule(chunk=2, mass=1.0)
    _, size, _ = ops.joined(torch.cat([keys, values], -1), sizes, queries[..., :-1], rule)  # 0 with 0.1, 9 with 9.1
    w = float(queries[..., :K].sum()) / M  # all channels of a key are equal
    expected = [w * 0.05**2, 0, 0, w * 0.05**2, 0, 0, 0, 0]
    torch.testing.assert_close(size[0, 0, :, 1], torch.tensor(expected), rtol=1e-3, atol=2e-4 * w)
    assert size[0, 0, :, 0].tolist() == [2, 1, 1, 2, 1, 1, 0, 0]


def test_equal_tokens_merge_without_loss():
    """Two tokens, said again and again, are two clusters with counts: what full attention over all of them gives."""
    T = 60
    key, value = torch.randn(1, 1, 2, K).repeat(1, 1, T // 2, 1), torch.randn(1, 1, 2, V).repeat(1, 1, T // 2, 1)
    q = torch.randn(1, 1, T, K)
    state = ops.initial_state(1, 1, K, V, M, torch.device("cpu"))
    y, weight, _ = ops.run(q, key, value, torch.ones(1, 1, T, 1), state, RULE)
    a = 20 * (0.4 * q @ key.mT / 20).tanh()
    a = a.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(y, a.softmax(-1) @ value, rtol=0, atol=1e-5)  # fp32, sums of 60 terms
    torch.testing.assert_close(weight, a.logsumexp(-1), rtol=0, atol=1e-5)


def test_a_mixer_decodes_what_it_prefills_across_merges():
    config = build_config({"name": "clusters", "window": 3, "sinks": 1, "clusters": M, "chunk": C})
    mixer = Mixer(config, Geometry(H, G, K, K))
    q, k, v = (torch.randn(B, n, 40, K) for n in (H, G, G))
    whole = mixer(q, k, v, context())
    cache = DynamicCache()
    parts = [mixer(*(x[:, :, a:b] for x in (q, k, v)), context(cache=cache)) for a, b in ((0, 15), (15, 30))]
    parts += [mixer(*(x[:, :, t : t + 1] for x in (q, k, v)), context(cache=cache)) for t in range(30, 40)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-5)  # as every cached form


def test_too_few_clusters_are_refused():
    with pytest.raises(InputError, match=r"clusters: found 20; expected at least 2 x chunk = 32"):
        build_config({"name": "clusters", "clusters": 20, "chunk": 16})
