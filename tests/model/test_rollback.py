"""Tokens taken back leave no trace: the cache is then what it would be without them."""

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from helpers.tiny import tiny_model
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from linearize.model import cache as caches
from linearize.model import transformers_api
from linearize.model.mixers import MIXERS
from linearize.model.modeling import linearize_

W, S, R = 8, 3, 6
LATE = sorted(name for name in MIXERS if name != "softmax")


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    """Everything in fp64, states too, and so few slots that they are always short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "ROLLBACK", R)
        patch.setattr(Tensor, "float", Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        torch.set_default_dtype(torch.float64)
        try:
            try:
                tiny_model(layers=1).double()(draw(0, 1, 4))
            except RuntimeError as error:
                pytest.skip(f"this transformers has fp32 in a model of fp64: {error}")
            yield
        finally:
            torch.set_default_dtype(torch.float)


def made(name: str, kept: tuple[int, ...] = (), **values) -> PreTrainedModel:
    """A tiny model in fp64, three layers of which the second is softmax; small windows, gates open."""
    combine = "memory" if "memory" in MIXERS[name].combines else "none"
    mixer = {"name": name, "combine": combine, "window": W, "sinks": S, **values}
    if kept:
        mixer["softmax_heads"] = list(kept)
    model = linearize_(tiny_model(layers=3), mixer, layers=[0, 2]).double().eval()
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("gate"):
                value.fill_(0.7)
    return model


@functools.cache
def model_of(name: str, kept: tuple[int, ...] = ()) -> PreTrainedModel:
    return made(name, kept)


@functools.cache
def exact_model_of(name: str) -> PreTrainedModel:
    return made(name, exact=5)


def forward(model: PreTrainedModel, ids: Tensor, cache: DynamicCache, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask).logits


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


def check(model: PreTrainedModel, plan: list[tuple[int, int]], batch: int = 1, when: int = 0, seed: int = 0) -> None:
    """Blocks of tokens, of each of which some last ones are taken back, against one pass over those that stay.

    Args:
        model: in fp64.
        plan: tokens that come, and how many of them go again.
        batch: rows.
        when: before which block recording begins.
        seed: of the tokens.
    """
    cache, kept = recording(model) if when == 0 else DynamicCache(), torch.empty(batch, 0, dtype=torch.int64)
    worst = 0.0
    for number, (new, gone) in enumerate(plan):
        if number == when:
            cache.activate_past_recording()
        ids = draw(seed + number, batch, new)
        ours = forward(model, ids, cache)
        both = torch.cat([kept, ids], 1)
        with torch.no_grad():
            whole = model(both, use_cache=False).logits[:, kept.shape[1] :]
        worst = max(worst, float((ours - whole).abs().max()))
        gone = gone if number >= when else 0
        if number >= when:
            cache.crop(-gone)
        kept = both[:, : both.shape[1] - gone]
        assert cache.get_seq_length() == kept.shape[1]
    assert worst < 1e-10, worst


def recording(model: PreTrainedModel) -> DynamicCache:
    """A cache that records from its first token on."""
    cache = DynamicCache()
    for module in model.modules():
        if hasattr(module, "mixer"):
            caches.cache_layer(cache, module.layer_idx, module.mixer.window, module.mixer.sinks, late=module.mixer.late)
    cache.activate_past_recording()
    return cache


PAIR = st.tuples(st.integers(1, 22), st.integers(0, R)).map(lambda pair: (pair[0], min(pair)))
PLAN = st.lists(PAIR, min_size=1, max_size=9)
SHORT = st.tuples(st.integers(1, 3), st.integers(0, 3)).map(lambda pair: (pair[0], min(pair)))
STEPS = st.lists(SHORT, min_size=8, max_size=20)
ROUNDS = st.lists(st.tuples(st.integers(1, R), st.integers(0, R)), min_size=4, max_size=10)


@pytest.mark.parametrize("name", LATE)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=PLAN | STEPS, when=st.integers(0, 2))
@example(plan=[(40, R), (1, 1), (1, 0), (5, 2), (30, R), (6, 6)], when=0)
@example(plan=[(W + S, R), (1, 1), (1, 1), (R, R), (1, 0), (1, 0)], when=0)
@example(plan=[(5, 0), (4, 4), (20, 3), (1, 0), (1, 1), (7, 5)], when=1)
def test_what_is_taken_back_leaves_no_trace(name: str, plan: list[tuple[int, int]], when: int) -> None:
    check(model_of(name), plan, when=min(when, len(plan) - 1))


@pytest.mark.parametrize("name", ["gla", "clusters", "window"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=PLAN | STEPS, batch=st.integers(1, 3))
def test_with_heads_that_stay_softmax_and_in_batches(name: str, plan: list[tuple[int, int]], batch: int) -> None:
    check(model_of(name, (1,)), plan, batch)


@pytest.mark.parametrize("name", ["gla", "clusters", "gated_deltanet", "window"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.tuples(st.integers(1, R), st.integers(0, R)), min_size=4, max_size=10), start=st.integers(1, 30)
)
def test_single_steps_before_each_decision(name: str, steps: list[tuple[int, int]], start: int) -> None:
    """What a draft does: several tokens one by one, then some of them go."""
    model = model_of(name)
    cache = recording(model)
    kept = draw(1, 1, start)
    forward(model, kept, cache)
    cache.crop(0)
    worst = 0.0
    for number, (many, gone) in enumerate(steps):
        for step in range(many):
            token = draw(100 * number + step, 1, 1)
            ours = forward(model, token, cache)
            kept = torch.cat([kept, token], 1)
            with torch.no_grad():
                whole = model(kept, use_cache=False).logits[:, -1:]
            worst = max(worst, float((ours - whole).abs().max()))
        gone = min(gone, many)
        cache.crop(-gone)
        kept = kept[:, : kept.shape[1] - gone]
    assert worst < 1e-10, worst


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "kda"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=PLAN | STEPS, when=st.integers(0, 2), batch=st.integers(1, 2))
@example(plan=[(40, R), (1, 1), (1, 0), (5, 2), (30, R), (6, 6)], when=0, batch=2)
def test_tokens_that_stay_exact(name: str, plan: list[tuple[int, int]], when: int, batch: int) -> None:
    check(exact_model_of(name), plan, batch, when=min(when, len(plan) - 1))


@pytest.mark.parametrize("name", ["gla", "clusters"])
@pytest.mark.parametrize("padding", [(0, 5), (9, 0), (3, 17)])
def test_rows_of_different_lengths(name: str, padding: tuple[int, int]) -> None:
    """Left padding, also such that a row is shorter than what can be taken back."""
    model, T = model_of(name), 20
    cache = recording(model)
    ids, mask = draw(3, 2, T), torch.ones(2, T, dtype=torch.int64)
    for row, some in enumerate(padding):
        mask[row, :some] = 0
    forward(model, ids, cache, mask)
    cache.crop(-2)
    new = draw(4, 2, 5)
    for column in range(5):
        whole = torch.cat([mask[:, :18], torch.ones(2, column + 1, dtype=torch.int64)], 1)
        ours = forward(model, new[:, column : column + 1], cache, whole)[:, -1]
        for row, some in enumerate(padding):
            alone = torch.cat([ids[row, some:18], new[row, : column + 1]])[None]
            where = torch.arange(some, 18 + column + 1)[None]
            with torch.no_grad():
                expected = model(alone, use_cache=False, position_ids=where).logits[0, -1]
            assert float((ours[row] - expected).abs().max()) < 1e-10


def test_padding_among_what_is_taken_back_was_never_counted() -> None:
    """transformers takes a padding token that a model has written for padding."""
    model, ids = model_of("gla"), draw(3, 1, 20)
    cache, mask = recording(model), torch.ones(1, 20, dtype=torch.int64)
    mask[0, 17] = 0
    forward(model, ids, cache, mask)
    cache.crop(-4)
    ours = forward(model, ids[:, 16:18], cache)
    with torch.no_grad():
        whole = model(ids[:, :18], use_cache=False).logits[:, 16:]
    assert float((ours - whole).abs().max()) < 1e-10


# --- assisted generation, as transformers does it

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def near(model: PreTrainedModel) -> PreTrainedModel:
    """A model that mostly agrees with another: a draft whose tokens are sometimes rejected."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for index, parameter in enumerate(other.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return other


def assisted(how: str, name: str) -> tuple[PreTrainedModel, dict]:
    """The model that generates, and what assists it."""
    student = model_of(name)
    source = tiny_model(layers=3).double().eval()
    return {
        "draft": lambda: (source, {"assistant_model": near(student)}),
        "target": lambda: (student, {"assistant_model": near(source)}),
        "both": lambda: (student, {"assistant_model": near(student)}),
        "lookup": lambda: (student, {}),
        "exit": lambda: (student, {"assistant_early_exit": 2}),
    }[how]()


@pytest.mark.parametrize("name", ["gla", *(pytest.param(x, marks=pytest.mark.slow) for x in ("clusters", "window"))])
@pytest.mark.parametrize("how", ["draft", "target", "both", "lookup", "exit"])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(length=st.integers(1, 3 * W), seed=st.integers(0, 99), drafted=st.integers(1, 3 * R))
def test_assisted_generation_writes_the_same(how: str, name: str, length: int, seed: int, drafted: int) -> None:
    model, assistance = assisted(how, name)
    prompt = draw(seed, 1, length)
    if how == "lookup":  # drafts that are all refused, too: what followed the first time does not follow again
        prompt = torch.cat([prompt, prompt], 1)
        assistance["prompt_lookup_num_tokens"] = drafted
    drafts = {"exit": model}.get(how, assistance.get("assistant_model"))
    if drafts is not None:
        drafts.generation_config.num_assistant_tokens = drafted
        drafts.generation_config.assistant_confidence_threshold = 0.0
    expected = model.generate(prompt, max_new_tokens=3 * W, **GREEDY)
    actual = model.generate(prompt, max_new_tokens=3 * W, **assistance, **GREEDY)
    assert actual.tolist() == expected.tolist()


@pytest.mark.slow
def test_sampling_with_assistance_has_the_distribution_of_the_target() -> None:
    """Chi-square of the second and third token of 1,500 samples against those of the target alone."""
    model, assistance = assisted("target", "gla")
    prompt = draw(7, 1, 14)
    assistance["assistant_model"].generation_config.num_assistant_tokens = 3
    how = {"do_sample": True, "top_k": 6, "eos_token_id": None, "pad_token_id": 2, "max_new_tokens": 4}
    torch.manual_seed(0)
    alone = model.generate(prompt.repeat(6000, 1), **how)[:, 14:]
    both = torch.cat([model.generate(prompt, **assistance, **how)[:, 14:] for _ in range(600)])
    for column in (0, 1, 2):
        tokens = alone[:, column].unique()
        share = torch.stack([(alone[:, column] == token).double().mean() for token in tokens])
        seen = torch.stack([(both[:, column] == token).double().sum() for token in tokens])
        common = share * len(both) >= 5
        expected, seen = share[common] * len(both), seen[common]
        statistic = float(((seen - expected) ** 2 / expected).sum())
        degrees = int(common.sum())
        assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 4, (column, statistic, degrees)


# --- what it costs, and what is refused


def test_a_cache_that_records_has_a_few_more_slots_and_one_that_does_not_has_none() -> None:
    model = model_of("gla")
    plain, more = DynamicCache(), recording(model)
    for cache in (plain, more):
        forward(model, draw(0, 1, 40), cache)
    layers = plain.layers[0], more.layers[0]
    tokens = [layer.tensors["tokens"] for layer in layers]
    assert tokens[0].shape[2] == S + W and tokens[1].shape[2] == S + W + R
    slots = R * tokens[0][0, :, 0].nbytes
    assert layers[1].nbytes() - layers[0].nbytes() == slots + 2 * torch.int64.itemsize + R
    forward(model, draw(1, 1, 4), more)
    state = [x.data_ptr() for x in layers[1].state]
    more.crop(-3)
    forward(model, draw(2, 1, 4), more)
    assert [x.data_ptr() for x in layers[1].state] == state  # nothing was copied


def test_more_than_is_recorded_cannot_be_taken_back() -> None:
    model = model_of("gla")
    cache = recording(model)
    forward(model, draw(0, 1, 40), cache)
    before = copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match=f"the last {R} tokens at most; 7 were to go"):
        cache.layers[0].crop(-7)
    following = draw(5, 1, 2)
    assert torch.equal(forward(model, following, cache), forward(model, following, before))
    plain = DynamicCache()
    forward(model, draw(0, 1, 40), plain)
    plain.layers[0].crop(0)
    with pytest.raises(RuntimeError, match="does not record its past"):
        plain.layers[0].crop(-1)


@pytest.mark.parametrize("combine", ["liger", "none"])
def test_mixers_that_write_at_once_refuse(combine: str) -> None:
    model = linearize_(tiny_model(layers=1), {"name": "gla", "combine": combine, "window": W, "sinks": S}).eval()
    cache = DynamicCache()
    forward(model, draw(0, 1, 5), cache)
    with pytest.raises(RuntimeError, match="writes every token into its state at once"):
        cache.activate_past_recording()
    assert model._is_stateful
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(draw(0, 1, 5), prompt_lookup_num_tokens=2, max_new_tokens=3)


def test_a_static_cache_refuses() -> None:
    model = linearize_(tiny_model(layers=2), {"name": "gla", "window": W, "sinks": S}).eval()
    cache = StaticCache(model.config, max_cache_len=32)
    forward(model, draw(0, 1, 5), cache)
    with pytest.raises(RuntimeError, match="use a dynamic cache"):
        cache.layers[0].activate_past_recording()
    # transformers 5.24 lets static caches be cropped, and so leaves it to the layer to refuse.
    older = (ValueError, "Static cache"), (RuntimeError, "a static linearized cache cannot take tokens back")
    error, said = older[transformers_api.CACHE == "cache"]
    with pytest.raises(error, match=said):
        model.generate(draw(0, 1, 5), prompt_lookup_num_tokens=2, max_new_tokens=3, cache_implementation="static")
