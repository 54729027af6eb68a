"""The delta rule and the diagonal recurrence against other people's: flash-linear-attention's naive functions and
transformers' models.

fla's naive files are loaded by path: importing the package needs triton.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.delta import G, K, inputs
from helpers.mixers import context
from torch import Tensor
from torch.nn import functional as F

from linearize.model.mixers import MIXERS, Geometry, build_config
from linearize.model.ops import delta, diagonal, dplr
from linearize.model.tokens import Tokens

T = 100
# fp32 against fp32, in another order of summation. A wrong formula is off by a per cent at least.
LIMIT = 1e-4


def fla(name: str) -> ModuleType:
    """fla/ops/<name>/naive.py."""
    found = importlib.util.find_spec("fla")
    if found is None or found.origin is None:
        pytest.skip("flash-linear-attention is an extra (`pip install linearize[cuda]`) and is not installed")
    path = Path(found.origin).parent / "ops" / name / "naive.py"
    spec = importlib.util.spec_from_file_location("naive_" + name.replace("/", "_"), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm() / b.norm()) <= LIMIT


def one_group(family: str, decay: str) -> dict[str, Tensor]:
    """Inputs with as many query heads as keys, queries scaled as the oracles do it themselves."""
    x = {n: t for n, t in inputs(family, T, decay).items() if t is not None}
    x["q"] = x["q"][:, :G]
    return x


def scaled(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**x, "q": x["q"] * K**-0.5}


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    """[B, G, T, ·] -> [B, T, G, ·], and back."""
    return [t.transpose(1, 2) for t in tensors]


def test_delta_rule():
    x = one_group("delta", "none")
    expected = fla("delta_rule").delta_rule_recurrence(x["q"], x["k"], x["v"], x["beta"], x["state"])
    assert_equal(delta.chunked(**scaled(x)), expected)


def test_gated_delta_rule():
    x = one_group("delta", "scalar")
    q, k, v, beta, g = tokens_first(x["q"], x["k"], x["v"], x["beta"][..., 0], x["log_decay"][..., 0])
    oracle = fla("gated_delta_rule").naive_recurrent_gated_delta_rule
    y, state = oracle(q, k, v, beta, g, initial_state=x["state"], output_final_state=True)
    assert_equal(delta.chunked(**scaled(x)), (*tokens_first(y), state))


def test_kda():
    x = one_group("delta", "channel")
    q, k, v, g, beta = tokens_first(x["q"], x["k"], x["v"], x["log_decay"], x["beta"][..., 0])
    oracle = fla("kda").naive_recurrent_kda
    y, state = oracle(q, k, v, g, beta, initial_state=x["state"], output_final_state=True)
    assert_equal(delta.chunked(**scaled(x)), (*tokens_first(y), state))


def test_dplr():
    x = one_group("dplr", "channel")
    oracle = fla("generalized_delta_rule/dplr").dplr_recurrence
    expected = oracle(x["q"], x["k"], x["v"], x["a"], x["b"], x["log_decay"], x["state"])
    assert_equal(dplr.chunked(**scaled(x)), expected)


def mixer_parts(name: str) -> tuple[Any, Tokens, list[Tensor], tuple[Tensor, ...]]:
    """A mixer, tokens, their q, k, v and log decay as fla wants them, and the mixer's output with its final state."""
    m = MIXERS[name](build_config({"name": name, "gate_normalizer": 4.0}), Geometry(G, G, K, K))
    k, v, q = torch.randn(3, 2, G, T, K).unbind()
    tokens = Tokens.join(k, v, m.kept_features(k, lambda x: x), torch.ones(2, G, T, 1), m.geometry)
    query, empty = m.query(q, context()), m.initial_state(2, torch.device("cpu"))
    y, _, state = m.scan(query, m.updates(tokens), empty, context())
    return m, tokens, tokens_first(query, delta.unit(k), v, F.logsigmoid(k) / 4), (y, *state)


def test_gated_deltanet2():
    """The mixer is fla's rule for the key √b ∘ k̂; and dplr does what the paper does, which grows without a bound."""
    _, tokens, (q, k, v, g), got = mixer_parts("gated_deltanet2")
    gate = tokens.kept.sigmoid().transpose(1, 2)
    oracle = fla("gdn2").naive_recurrent_gdn2
    y, state = oracle(q, gate.sqrt() * k, v, g, torch.ones_like(k), gate, scale=1.0, output_final_state=True)
    assert_equal(got, (*tokens_first(y), state))
    y, state = oracle(q, k, v, g, gate, gate, scale=1.0, output_final_state=True)
    a = g.exp() * gate * k
    published = dplr.chunked(*tokens_first(q, k, gate * v, a, -k, g))
    assert_equal(published, (*tokens_first(y), state))


def test_pkda():
    _, tokens, (q, k, v, g), got = mixer_parts("pkda")
    mean = tokens.kept.mean(-1).transpose(1, 2)
    y, state, sums = fla("precond_kda").naive_recurrent_precond_kda(
        q, k, v, g, F.logsigmoid(mean) / 64, mean.sigmoid(), mean.sigmoid(), scale=1.0, output_final_state=True
    )
    assert_equal(got, (*tokens_first(y), state, sums))


def test_hgrn():
    x, g, start = torch.randn(2, T, K), F.logsigmoid(torch.randn(2, T, K)), torch.randn(2, K)
    h, state = fla("hgrn").naive_recurrent_hgrn(x, g, start, output_final_state=True)
    got = diagonal.chunked(x[:, None], g[:, None], state=start[:, None])
    assert_equal(got, (h[:, None], state[:, None]))


def test_qwen3_next():
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    x = one_group("delta", "scalar")
    args = tokens_first(x["q"], x["k"], x["v"], x["log_decay"][..., 0], x["beta"][..., 0])
    y, state = qwen.torch_recurrent_gated_delta_rule(*args, initial_state=x["state"], output_final_state=True)
    assert_equal(delta.chunked(**scaled(x)), (*tokens_first(y), state))


def test_recurrent_gemma():
    """The whole RG-LRU module: its gates computed here from its weights, the recurrence by the chunked form."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    heads, width = 2, 16
    module = RecurrentGemmaRglru(RecurrentGemmaConfig(lru_width=width, hidden_size=width, num_attention_heads=heads))
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(2, T, width)
    with torch.no_grad():
        expected = module(x, torch.arange(T).expand(2, T))
        blocks = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        gate = lambda w, b: (blocks @ w + b[:, None]).sigmoid()  # noqa: E731
        enter = gate(module.input_gate_weight, module.input_gate_bias)
        forget = gate(module.recurrent_gate_weight, module.recurrent_gate_bias)
        log_decay = -8 * forget * F.softplus(module.recurrent_param).view(heads, 1, -1)
        size = (1 - (2 * log_decay).exp()).sqrt()
        size[:, :, 0] = 1  # a document starts with the whole of its first input
        h, state = diagonal.chunked(size * enter * blocks, log_decay)
    assert_equal((h.transpose(1, 2).flatten(2), state.flatten(1)), (expected, module.recurrent_states))
