"""The cache of one layer keeps transformers' contract, and says so in one sentence where it cannot."""

import pytest
import torch
from helpers.tiny import tiny_model
from transformers import DynamicCache, StaticCache

from linearize.model.cache import LinearizedCacheLayer, cache_layer
from linearize.model.modeling import linearize_

W, S = 8, 2


def filled(batch: int = 3, tokens: int = 25) -> LinearizedCacheLayer:
    """Rows whose token t holds the value t, each with as many real tokens as its index takes away."""
    layer = LinearizedCacheLayer(W, S)
    layer.lazy_initialization(batch, torch.zeros(1), (1, 1), (torch.zeros(batch, 2, 3),))
    lengths = tokens - torch.arange(batch)
    layer.extend(torch.arange(1.0, tokens + 1).view(1, 1, -1, 1).expand(batch, -1, -1, -1), lengths)
    layer.advance(lengths, tokens)
    return layer


@pytest.mark.parametrize("tokens", range(3, 26))
def test_slots_hold_the_sinks_and_the_last_tokens(tokens):
    layer = filled(3, tokens)
    for row in range(3):
        n = tokens - row
        expected = {*range(1, min(S, n) + 1), *range(max(S, n - W) + 1, n + 1)}
        assert set(layer.tensors["tokens"][row].flatten().tolist()) - {0.0} == expected
    before = layer.in_order()[0].flatten().tolist()
    assert before[-min(W, max(tokens - S, 0)) :] == list(range(max(S, tokens - W) + 1, tokens + 1)) or tokens <= S


@pytest.mark.parametrize("cuts", [[25], [1] * 25, [3, 9, 1, 12], [10, 15]])
def test_blocks_of_any_size_fill_the_same_slots(cuts):
    whole = filled(1)
    layer = LinearizedCacheLayer(W, S)
    layer.lazy_initialization(1, torch.zeros(1), (1, 1), (torch.zeros(1, 2, 3),))
    start = 1
    for n in cuts:
        layer.extend(torch.arange(float(start), start + n).view(1, 1, -1, 1), torch.tensor([n]))
        layer.advance(n, n)
        start += n
    assert torch.equal(layer.tensors["tokens"], whole.tensors["tokens"])
    assert layer.get_seq_length() == 25


def test_batch_operations_move_every_tensor():
    layer = filled()
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert layer.tensors["count"].tolist() == [23, 25, 25]
    layer.batch_repeat_interleave(2)
    assert layer.tensors["count"].tolist() == [23, 23, 25, 25, 25, 25]
    layer.batch_select_indices(torch.tensor([0, 5]))
    assert {x.shape[0] for x in layer.tensors.values()} == {2}
    size = layer.nbytes()
    layer.offload()
    layer.prefetch()
    assert layer.nbytes() == size


def test_reset_empties_it_in_place():
    layer = filled()
    addresses = {n: x.data_ptr() for n, x in layer.tensors.items()}
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not any(x.any() for x in layer.tensors.values())
    assert {n: x.data_ptr() for n, x in layer.tensors.items()} == addresses


def test_what_it_cannot_do_it_refuses():
    layer = filled()
    layer.crop(0)
    for refused, says in (
        (lambda: layer.crop(-1), "does not record its past"),
        (lambda: layer.update(None, None), "written by its mixer"),
    ):
        with pytest.raises(RuntimeError, match=says):
            refused()
    assert layer.is_croppable and layer.get_max_length() == -1


def test_it_takes_the_place_of_any_layer_once():
    cache = DynamicCache()
    layer = cache_layer(cache, 3, W, S)
    assert len(cache.layers) == 4 and cache_layer(cache, 3, W, S) is layer
    static = StaticCache(config=tiny_model("llama").config, max_cache_len=40)
    assert cache_layer(static, 0, W, S).static
    used = DynamicCache()
    used.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4), 0)
    with pytest.raises(RuntimeError, match="filled by softmax attention"):
        cache_layer(used, 0, W, S)


def test_a_reset_cache_serves_the_next_prompt():
    model = linearize_(tiny_model("llama"), {"name": "gla", "window": W, "sinks": S})
    first, second = torch.randint(3, 384, (2, 1, 30))
    with torch.no_grad():
        expected = model(second).logits
        past = model(first, use_cache=True).past_key_values
        past.reset()
        got = model(second, past_key_values=past).logits
    # The second prompt meets a used, emptied cache, so it runs as a continuation: fp32 sums in another order.
    assert float((got - expected).abs().max()) < 1e-4


COMPILED = [pytest.param(name, marks=pytest.mark.slow) for name in ("kda", "rwkv7", "gsa", "rg_lru", "aaren")]


@pytest.mark.parametrize("name", ["gla", *COMPILED])
def test_the_decode_step_is_one_graph_for_all_tokens(name):
    """One graph, no second compilation, and what it changes lies where CUDA graphs can find it: `reduce-overhead`."""
    model = linearize_(tiny_model("llama", layers=2), {"name": name, "window": W, "sinks": S})
    x = torch.randint(3, 384, (1, 30))
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = model.generate(x, **greedy)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        token = model(x, past_key_values=cache).logits[:, -1:].argmax(-1)
        lies = addresses(cache)
        # `eager` runs the captured graph as it is: what is asserted is that there is one graph.
        step = torch.compile(model, fullgraph=True, backend="eager")
        out = [token]
        for position in range(30, 41):
            where = torch.tensor([[position]])
            with torch.compiler.set_stance("fail_on_recompile" if position > 30 else "default"):
                token = step(out[-1], past_key_values=cache, position_ids=where).logits[:, -1:].argmax(-1)
            out.append(token)
    assert torch.equal(torch.cat([x, *out], 1), expected)
    assert addresses(cache) == lies
    cache.reset()
    assert addresses(cache) == lies


def addresses(cache: StaticCache) -> list[int]:
    """Of all tensors of a static cache, each of which must be marked as one that stays."""
    held = [x for layer in cache.layers for x in (*layer.tensors.values(), layer.get_seq_length())]
    assert all(hasattr(x, "_dynamo_static_input_type") for x in held)
    return [x.data_ptr() for x in held]


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_layer_beside_softmax_gives_the_masks_of_that(kind) -> None:
    """transformers 5.24 asks the first layer, whatever it is; a mask of its sizes is what the softmax layer gets."""
    model = linearize_(tiny_model(layers=2), {"name": "gla", "window": W, "sinks": S}, layers=[0])
    cache = DynamicCache() if kind is DynamicCache else StaticCache(model.config, max_cache_len=32)
    tokens = torch.randint(3, 50, (1, 12))
    with torch.no_grad():
        for part in tokens.split(6, 1):
            model(part, past_key_values=cache)
    own, softmax = cache.layers
    assert isinstance(own, LinearizedCacheLayer) and own.beside is softmax
    assert own.get_mask_sizes(3) == softmax.get_mask_sizes(3) == ((15, 0) if kind is DynamicCache else (32, 0))
    alone = linearize_(tiny_model(layers=1), {"name": "gla", "window": W, "sinks": S})
    with torch.no_grad():
        cache = alone(tokens, use_cache=True).past_key_values
        alone(tokens[:, :1], past_key_values=cache)
    assert cache.layers[0].get_mask_sizes(3) == (3, 0)
