"""States in fewer bits: every mixer decodes with them what it reads at once, within what the bits resolve."""

import pytest
import torch
from helpers.mixers import context
from transformers import DynamicCache

from linearize.errors import InputError
from linearize.model.cache import LinearizedCacheLayer
from linearize.model.mixers import MIXERS, Geometry, build_config, read_config

RECURRENT = [name for name, cls in MIXERS.items() if cls.recurrent]
B, H, G, K, W, S, T = 2, 4, 2, 16, 5, 2, 40
# Of the largest output: rounding to 8 bits after each of 12 steps; to 12 bits; clusters round once, to 8 or to 4.
NEAR = {"bfloat16": 0.06, "int8": 0.03, "int4": 0.3}
SMALLER = {"bfloat16": 0.62, "int8": 0.56, "int4": 0.46}
KEPT = [(name, dtype) for name in RECURRENT for dtype in MIXERS[name].Config.dtypes if dtype != "float32"]


def made(name: str, **values):
    combine = "memory" if "memory" in MIXERS[name].combines else "none"
    # So many clusters that nothing is merged: which pairs are is decided by the last bit.
    sizes = {"clusters": {"clusters": 48, "chunk": 4}}.get(name, {})
    config = build_config({"name": name, "combine": combine, "window": W, "sinks": S, **sizes, **values})
    torch.manual_seed(1)
    mixer = MIXERS[name](config, Geometry(H, G, K, K))
    if mixer.gate is not None:
        mixer.gate.data.fill_(0.5)
    return mixer


@torch.no_grad()
def decoded(mixer, q, k, v):
    """Outputs of steps behind a prefill, and the cache."""
    cache = DynamicCache()
    parts = [mixer(*(x[:, :, :28] for x in (q, k, v)), context(cache=cache))]
    parts += [mixer(*(x[:, :, t : t + 1] for x in (q, k, v)), context(cache=cache)) for t in range(28, T)]
    return torch.cat(parts, 2), cache


@pytest.mark.parametrize(("name", "dtype"), KEPT)
def test_steps_are_near_and_the_cache_is_smaller(name, dtype):
    q, k, v = (torch.randn(B, n, T, K) for n in (H, G, G))
    exact, exact_cache = decoded(made(name), q, k, v)
    mixer = made(name, state_dtype=dtype)
    y, cache = decoded(mixer, q, k, v)
    assert (y - exact).abs().max() <= NEAR[dtype] * exact.abs().max()
    layer, before = cache.layers[0], exact_cache.layers[0]
    assert isinstance(layer, LinearizedCacheLayer)
    assert layer.nbytes() == mixer.state_bytes(B, 4)
    state = sum(x.nbytes for x in layer.state) / sum(x.nbytes for x in before.state)
    assert state < SMALLER[dtype], "most of the state is in fewer bits"


@pytest.mark.parametrize("dtype", ["float32", *NEAR])
def test_clusters_round_alike_in_blocks_and_in_steps(dtype):
    q, k, v = (torch.randn(B, n, T, K) for n in (H, G, G))
    mixer = made("clusters", state_dtype=dtype, clusters=16)
    with torch.no_grad():
        whole = mixer(q, k, v, context())
    torch.testing.assert_close(decoded(mixer, q, k, v)[0], whole, rtol=0, atol=1e-5)  # as every cached form


@torch.no_grad()
def test_what_keys_have_in_common_costs_no_bits():
    q, k, v = (torch.randn(B, n, T, K) for n in (H, G, G))
    exact, rounded = (decoded(made("clusters", state_dtype=dtype), q, k + 20, v)[0] for dtype in ("float32", "int4"))
    assert (rounded - exact).abs().max() <= NEAR["int4"] * exact.abs().max()


def test_what_is_refused_and_what_older_folders_mean():
    with pytest.raises(InputError, match=r"mixer.state_dtype: found 'int4'; expected float32, bfloat16, int8"):
        build_config({"name": "gla", "state_dtype": "int4"})
    with pytest.raises(InputError, match="window has no state; leave it out"):
        build_config({"name": "window", "combine": "none", "state_dtype": "int8"})
    older = {"name": "clusters", "combine": "memory", "window": 64, "sinks": 4, "clusters": 128, "chunk": 16}
    config = read_config(older)
    assert (config.state_dtype, config.mass) == ("float32", 0.0)
