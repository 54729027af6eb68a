"""What every recurrent mixer promises, whatever it computes: mixers/recurrence.py, for each way to combine.

The mixers are taken from the registry; a new one is tested here without a change.
"""

import json
from functools import cache

import pytest
import torch
from helpers.mixers import G, H, K, context
from helpers.tiny import tiny_model
from torch import Tensor

from linearize.model.architectures import role_modules
from linearize.model.attention import linearized_modules
from linearize.model.mixers import MIXERS, Geometry, build_config
from linearize.model.modeling import linearize_
from linearize.model.tokens import Tokens

B, T, W, S = 2, 40, 6, 2
EACH = [(name, combine) for name, cls in MIXERS.items() if cls.recurrent for combine in cls.combines]
SEEN = 23
"""Tokens of the first piece."""

every = pytest.mark.parametrize(("name", "combine"), EACH, ids=[f"{n}-{c}" for n, c in EACH])
recurrent = pytest.mark.parametrize("name", [name for name, cls in MIXERS.items() if cls.recurrent])


def opened(mixer):
    """The same with gates that are not closed."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


@cache
def made(name: str, combine: str):
    config = build_config({"name": name, "combine": combine, "window": W, "sinks": S})
    return opened(MIXERS[name](config, Geometry(H, G, K, K)))


def drawn(mixer, length: int = T) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Reads and writes of tokens some of which do not exist (first ones, last ones, others); and which do."""
    with torch.no_grad():
        exists = (torch.rand(B, 1, length, 1) > 0.3).float()
        exists[0, :, :3], exists[1, :, length - 4 :] = 0, 0
        k, v = torch.randn(B, G, length, K), torch.randn(B, G, length, K)
        kept = mixer.kept_features(k, lambda x: x.float())
        tokens = Tokens.join(k, v, kept, torch.ones(B, G, length, 1), mixer.geometry)
        tokens.x = tokens.x * exists
        return mixer.query(torch.randn(B, H, length, K), context()), mixer.updates(tokens), exists[:, 0, :, 0] > 0


def part(x, start: int, end: int | None = None):
    if isinstance(x, tuple):
        return tuple(part(each, start, end) for each in x)
    return None if x is None else x[:, :, start:end]


def near(a: Tensor, b: Tensor) -> bool:
    # fp32, sums of 40 terms in two orders, relative to the largest.
    a, b = (x.masked_fill(x == float("-inf"), 0) for x in (a, b))
    return float((a - b).abs().max()) <= 2e-5 * max(1.0, float(b.abs().max()))


@every
@torch.no_grad()
def test_pieces_and_steps_are_the_whole(name, combine):
    mixer = made(name, combine)
    read, updates, exists = drawn(mixer)
    empty = mixer.initial_state(B, torch.device("cpu"))
    assert all(x.dtype == torch.float32 and not x.any() for x in empty)
    y, weight, last = mixer.scan(read, updates, empty, context())
    assert (weight is not None) == mixer.weighted
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(last, empty, strict=True))
    joined = y if weight is None else torch.cat([y, weight.unsqueeze(-1)], -1)
    seen = exists.cumsum(1) > 0
    if weight is not None:
        assert torch.equal(weight.isfinite(), seen[:, None].expand_as(weight))
        joined = joined.masked_fill(joined.isinf(), 0)
    real = exists[:, None, :, None].expand_as(joined)

    state = mixer.initial_state(B, torch.device("cpu"))
    first = mixer.scan(part(read, 0, SEEN), part(updates, 0, SEEN), state, context())
    assert not any(x.any() for x in state), "recur writes into the state that it was given"
    second = mixer.scan(part(read, SEEN), part(updates, SEEN), first[2], context())
    pieces = torch.cat([first[0], second[0]], 2)
    assert near(pieces[real[..., :K]], y[real[..., :K]])
    assert all(near(a, b) for a, b in zip(second[2], last, strict=True))

    steps = []
    for t in range(T):
        mixer.update_state(part(updates, t, t + 1), state)
        steps.append(mixer.read_state(part(read, t, t + 1), state, context()))
    assert near(torch.cat(steps, 2)[real], joined[real])
    assert all(near(a, b) for a, b in zip(state, last, strict=True))


@every
@torch.no_grad()
def test_a_token_that_does_not_exist_leaves_the_state_as_it_is(name, combine):
    mixer = made(name, combine)
    read, updates, _ = drawn(mixer)
    width = mixer.kept_features(torch.zeros(1, G, 1, K), lambda x: x)
    width = K + K + 2 + (0 if width is None else width.shape[-1])
    for before in (mixer.initial_state(B, torch.device("cpu")), None):
        if before is None:
            *_, before = mixer.scan(read, updates, mixer.initial_state(B, torch.device("cpu")), context())
        nothing = mixer.updates(Tokens(torch.zeros(B, G, 3, width), mixer.geometry))
        # The log of no tokens is written by the first call.
        mixer.update_state(part(nothing, 0, 1), before)
        state = tuple(x.clone() for x in before)
        mixer.update_state(part(nothing, 0, 1), state)
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
        *_, after = mixer.scan(part(read, 0, 3), nothing, before, context())
        # The expansion keeps means, which a block multiplies by n and divides again: one rounding.
        same = near if getattr(mixer.config, "features", None) == "expansion" else torch.equal
        assert all(same(*pair) for pair in zip(after, before, strict=True))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_keys_at_fifty_are_finite_with_their_gradients(name, combine, dtype):
    mixer = made(name, combine)
    mixer.zero_grad()
    q, k, v = (50 * torch.randn(B, n, T, K).sign() for n in (H, G, G))
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    y = mixer(*inputs, context(lambda x: x.float()))
    assert y.dtype == dtype and y.isfinite().all()
    y.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(("name", "combine"), [e for e in EACH if [*made(*e).parameters()]])
def test_new_weights_get_gradients(name, combine):
    mixer = made(name, combine)
    mixer.zero_grad()
    mixer(*(torch.randn(B, n, T, K) for n in (H, G, G)), context()).square().sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@recurrent
def test_adapters_reach_the_sources_projections_and_nothing_else(name):
    found = {}
    for kind in ("gla", name):
        model = linearize_(tiny_model("llama", layers=1), {"name": kind})
        found[kind] = role_modules(model, ["q", "k", "v", "o", "mlp"])
    assert found[name] == found["gla"] and len(found[name]) == 7
    (module,) = linearized_modules(model)
    new = {n for n, _ in module.mixer.named_parameters()}
    assert {n for n, _ in model.named_parameters() if ".mixer." in n} == {
        f"model.layers.0.self_attn.mixer.{n}" for n in new
    }


@every
def test_configs_survive_json(name, combine):
    config = build_config({"name": name, "combine": combine, "window": 7})
    assert build_config(json.loads(json.dumps(config.to_dict()))) == config


@recurrent
def test_training_in_bf16_gives_the_loss_of_fp32(name):
    """As the training loop does it: frozen weights in bf16, mixers' own in fp32, under autocast."""
    model = linearize_(tiny_model(layers=2), {"name": name, "window": W, "sinks": S})
    x = torch.arange(3, 83).view(2, 40)
    for module in linearized_modules(model):
        opened(module.mixer)
    with torch.no_grad():
        exact = model(x, labels=x).loss
    model.bfloat16()
    for module in linearized_modules(model):
        module.mixer.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels=x).loss
    loss.backward()
    # bf16 has 8 bits; of 6 nats that is 0.05.
    assert float((loss - exact).detach().abs()) < 2**-7 * float(exact)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
