"""Conversion by class surgery: the whole parity table, folders that open, branches that switch."""

import json

import pytest
import torch
from helpers.modeling import LIMIT, S, T, W, can_offload, check_padded_rows, difference, in_pieces, logits, tokens
from helpers.tiny import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.errors import InputError
from linearize.model import architectures
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches
from linearize.model.mixers import MIXERS
from linearize.model.modeling import FORMAT, linearize_
from linearize.model.sizes import state_bytes

MIXTURES = [
    {"name": name, "combine": combine, "window": W, "sinks": S}
    for name, cls in MIXERS.items()
    for combine in cls.combines
]
# Combining is code that all mixers share, and tests/model/mixers/test_registry.py holds every mixer to its part for
# every way to combine; what does not depend on that is asked of one way per mixer, and of all of the Liger-compatible
# one's.
ONCE = [m for m in MIXTURES if m["name"] == "gla" or m["combine"] == MIXERS[m["name"]].combines[0]]


def named(mixture):
    return f"{mixture['name']}-{mixture['combine']}"


@pytest.fixture(params=MIXTURES, ids=named)
def mixture(request):
    return request.param


@pytest.fixture(params=ONCE, ids=named)
def once(request):
    return request.param


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}


def test_unrotated_keys_are_those_of_a_forward_without_rope(monkeypatch):
    """What gates see in every layer, against the source's own forward of that layer with cos = 1 and sin = 0; here with
    angles that YaRN has scaled. tests/model/test_architectures.py does it for every architecture."""
    model, x = tiny_model("llama", rope_parameters=YARN), tokens(1, 12)
    linearize_(model, {"name": "gla", "combine": "none"})
    seen, calls = [], []
    unrotate = architectures.unrotate
    monkeypatch.setattr(architectures, "unrotate", lambda *args: seen.append(unrotate(*args)) or seen[-1])
    for module in linearized_modules(model):
        module.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    logits(model, x, use_cache=False)
    for module, args, kwargs in list(calls):
        cos, sin = kwargs["position_embeddings"]
        seen.clear()
        with torch.no_grad():
            module(*args, **kwargs)
            module(*args, **{**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))})
        key, query, expected_key, expected_query = seen
        assert difference(key, expected_key) < 1e-5 * max(1, float(expected_key.abs().max()))
        assert difference(query, expected_query) < 1e-5 * max(1, float(expected_query.abs().max()))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, T - 1), max_size=4, unique=True).map(sorted))
def test_full_equals_pieces_wherever_it_is_cut(mixture, cuts):
    model, x = converted(mixture), tokens()
    assert difference(in_pieces(model, x, cuts)[0], logits(model, x)) < LIMIT * 10


_CONVERTED = {}


def converted(mixture):
    """One tiny model per mixer for the whole module: examples of a property test share it."""
    key = json.dumps(mixture)
    if key not in _CONVERTED:
        _CONVERTED[key] = linearize_(tiny_model("llama", layers=2), mixture)
    return _CONVERTED[key]


@pytest.mark.parametrize("combine", MIXERS["gla"].combines)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 149), max_size=4, unique=True).map(sorted))
def test_pieces_across_chunks_equal_the_full_forward(combine, cuts):
    """150 tokens: two chunks of 64 and a part of a third have left the window."""
    model, x = converted({"name": "gla", "combine": combine, "window": W, "sinks": S}), tokens(length=150)
    assert difference(in_pieces(model, x, cuts)[0], logits(model, x)) < LIMIT * 10


def test_full_equals_token_by_token(mixture):
    model, x = converted(mixture), tokens()
    assert difference(in_pieces(model, x, list(range(1, T)))[0], logits(model, x)) < LIMIT * 10


def test_padding_changes_nothing(once):
    """Left, right, both, and a row of other length, against each row alone."""
    model = converted(once)
    rows = [tokens(1, n)[0] for n in (40, T, 7, 47)]
    left = [5, 0, T - 7, 11]
    x, mask = torch.full((4, T), 2), torch.zeros(4, T, dtype=torch.long)
    for i, (row, start) in enumerate(zip(rows, left, strict=True)):
        x[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, x, attention_mask=mask, position_ids=positions)
    for i, row in enumerate(rows):
        assert difference(got[i][mask[i].bool()], logits(model, row[None])[0]) < LIMIT * 10


def test_padding_changes_no_gradient(once):
    """A long row and one that never fills the window, in one batch or alone."""
    model = linearize_(tiny_model("llama", layers=2), once)
    rows = [tokens(1, n) for n in (T, 7)]
    x, mask = torch.full((2, T), 2), torch.zeros(2, T, dtype=torch.long)
    for i, row in enumerate(rows):
        x[i, T - row.shape[1] :] = row
        mask[i, T - row.shape[1] :] = 1
    weight = torch.randn(2, T, 384)

    def gradients(losses):
        model.zero_grad()
        sum(losses).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = gradients([(model(r, use_cache=False).logits * weight[i, -r.shape[1] :]).sum() for i, r in enumerate(rows)])
    both = model(x, attention_mask=mask, position_ids=positions, use_cache=False).logits
    together = gradients([(both * weight * mask[..., None]).sum()])
    for name, expected in alone.items():
        assert difference(together[name], expected) < 1e-4 * max(1, float(expected.abs().max())), name


def test_padded_prefill_then_steps(mixture):
    check_padded_rows(converted(mixture), (40, 7), 20)


def test_packed_documents_are_separate_documents(once):
    model = converted(once)
    lengths = [24, 1, 25, 10]
    x = tokens(1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = logits(model, x, position_ids=positions, use_cache=False).split(lengths, 1)
    for part, document in zip(got, x.split(lengths, 1), strict=True):
        assert difference(part, logits(model, document)) < LIMIT * 10


@pytest.mark.parametrize("heads", [[], [1]], ids=["all", "softmax heads"])
def test_a_cache_goes_on_from_the_last_packed_document(heads):
    model = converted({"name": "gla", "window": W, "sinks": S, "softmax_heads": heads})
    lengths, more = [40, 3, 2, 30], tokens(1, 5)
    x = tokens(1, sum(lengths))
    with torch.no_grad():
        packed = model(x, position_ids=torch.cat([torch.arange(n) for n in lengths])[None], use_cache=True)
        alone = model(x[:, -30:], use_cache=True)
        assert difference(packed.logits[:, -30:], alone.logits) < LIMIT * 10
        for t in range(5):
            where = torch.full((1, 1), 30 + t)
            got, expected = (
                model(more[:, t : t + 1], past_key_values=each.past_key_values, position_ids=where).logits
                for each in (packed, alone)
            )
            assert difference(got, expected) < LIMIT * 10


@pytest.mark.parametrize("kept", [[], [2, 5]], ids=["all", "hybrid"])
@pytest.mark.parametrize("combine", MIXERS["gla"].combines)
def test_generation_is_the_same_with_every_cache(combine, kept):
    values = {"name": "gla", "combine": combine, "window": W, "sinks": S}
    model = linearize_(tiny_model("qwen3"), values, [i for i in range(6) if i not in kept])
    x = tokens(2, 30)
    greedy = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = model.generate(x, use_cache=False, **greedy)
    caches = [{"cache_implementation": name} for name in ("static", "dynamic")]
    if not kept and can_offload():  # transformers' own offloaded layers need a GPU
        caches += [{"cache_implementation": name} for name in ("offloaded", "offloaded_static")]
    for how in ({}, *caches, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(x, **how, **greedy), expected), how
    beams = model.generate(x, num_beams=3, **greedy)
    assert torch.equal(model.generate(x, num_beams=3, use_cache=False, **greedy), beams)
    sampled = model.generate(x, num_return_sequences=2, num_beams=2, **greedy)
    assert sampled.shape == (4, 70)


def test_every_mixer_generates_the_same_with_and_without_a_cache(once):
    """Beside softmax layers, with beams, which reorder every state."""
    model = linearize_(tiny_model("qwen3", layers=3), once, [0, 2])
    how = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    x = tokens(2, 22)
    assert torch.equal(model.generate(x, **how), model.generate(x, use_cache=False, **how))


def test_256_greedy_tokens_cached_and_recomputed_are_identical():
    model = converted({"name": "gla", "combine": "memory", "window": W, "sinks": S})
    greedy = {"max_new_tokens": 256, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    x = tokens(1, 10)
    assert torch.equal(model.generate(x, **greedy), model.generate(x, use_cache=False, **greedy))


def test_a_prompt_cache_serves_several_calls():
    import copy

    model = converted({"name": "gla", "combine": "memory", "window": W, "sinks": S})
    prompt, x = tokens(1, 50), tokens(2, 8)
    with torch.no_grad():
        past = model(prompt, use_cache=True).past_key_values
    for question in x:
        whole = torch.cat([prompt, question[None]], 1)
        greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        assert torch.equal(
            model.generate(whole, past_key_values=copy.deepcopy(past), **greedy), model.generate(whole, **greedy)
        )


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"cache_implementation": "paged"}, "continuous batching pages a softmax cache"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires"),
    ],
    ids=["paged", "contrastive"],
)
def test_ways_of_generating_that_cannot_work_are_refused_in_one_sentence(how, says):
    model = converted({"name": "gla", "combine": "memory", "window": W, "sinks": S})
    with pytest.raises(ValueError, match=says):
        model.generate(tokens(1, 9), max_new_tokens=3, pad_token_id=2, **how)


def test_a_batch_can_be_repeated_and_chosen_from_while_decoding():
    """What a caller does who samples several answers to one prompt, and drops some."""
    model = converted({"name": "gla", "combine": "memory", "window": W, "sinks": S})
    x = tokens(2, T)
    expected = logits(model, x)
    _, past = in_pieces(model, x[:, :40], [30, *range(31, 40)])
    past.batch_repeat_interleave(3)
    for t in (40, 41, 42):
        got = logits(model, x[:, t : t + 1].repeat_interleave(3, 0), past_key_values=past)
        assert difference(got, expected[:, t : t + 1].repeat_interleave(3, 0)) < LIMIT * 10
    past.batch_select_indices(torch.tensor([5, 1]))
    for t in (43, 44):
        got = logits(model, x.flip(0)[:, t : t + 1], past_key_values=past)
        assert difference(got, expected.flip(0)[:, t : t + 1]) < LIMIT * 10


def test_cache_size_is_known_and_constant(once):
    model = linearize_(tiny_model("llama", layers=2), once)
    _, past = in_pieces(model, tokens(), [30])
    if once["name"] == "softmax":
        return
    sizes = [layer.nbytes() for layer in past.layers]
    assert sizes == state_bytes(model.config, T, batch=2, dtype_bytes=4)["per_layer"]
    logits(model, tokens(2, 1), past_key_values=past)  # the layers are stacked now
    addresses = [x.data_ptr() for layer in past.layers for x in layer.tensors.values()]
    for token in tokens(2, 30).T:
        logits(model, token[:, None], past_key_values=past)
    assert sizes == [layer.nbytes() for layer in past.layers]
    assert addresses == [x.data_ptr() for layer in past.layers for x in layer.tensors.values()]


def test_save_and_load_are_equal(once, tmp_path):
    model, x = converted(once), tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == "LinearizedForCausalLM"
    assert again.config.linearize == model.config.linearize
    assert torch.equal(logits(again, x), logits(model, x))
    names = {n for n, _ in again.named_parameters()}
    assert names >= {n for n, _ in tiny_model("llama", layers=2).named_parameters()}


def test_branches_switch_and_return():
    source, x = tiny_model("llama"), tokens()
    model = linearize_(tiny_model("llama"), {"name": "gla", "window": W, "sinks": S, "strength": 1.0})
    window = linearize_(tiny_model("llama"), {"name": "window", "window": W, "sinks": S})
    before = logits(model, x)
    with branches(model, "source"):
        assert torch.equal(logits(model, x), logits(source, x))
    with branches(model, "window"):
        assert torch.equal(logits(model, x), logits(window, x))
    with branches(model, "memory"):
        alone = logits(model, x)
    assert difference(alone, before) > 1e-2
    assert difference(logits(window, x), before) > 1e-4
    assert torch.equal(logits(model, x), before)
    with pytest.raises(ValueError, match="expected one of all, source"):
        branches(model, "nonsense").__enter__()
    with pytest.raises(ValueError, match="no linearized layer"):
        branches(source, "all").__enter__()


def test_linearizing_again_replaces_the_mixer():
    model, x = tiny_model("llama"), tokens()
    linearize_(model, {"name": "gla", "window": W})
    linearize_(model, {"name": "window", "window": W, "sinks": S}, [1, 2])
    assert [m.mixer.name for m in linearized_modules(model)] == ["gla", "window", "window", "gla", "gla", "gla"]
    assert [v["name"] for v in model.config.linearize["layers"].values()][1] == "window"
    assert logits(model, x).isfinite().all()


def test_gradient_checkpointing_gives_the_same_gradients(once):
    x = tokens()

    def gradients(checkpointing):
        model = linearize_(tiny_model("llama", layers=2), once)
        model.train()
        if checkpointing:
            # The new name of 5.23; older releases know the other one only.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        model(x, labels=x, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, g in plain.items():
        assert g is not None and g.isfinite().all(), name
        assert torch.equal(g, checkpointed[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_the_naive_form(dtype):
    """Error against fp32 within twice that of the source's own softmax in the same precision, plus 1e-3."""
    model, x = tiny_model("llama"), tokens()
    low = tiny_model("llama").to(dtype)
    scale = float(logits(model, x).abs().max())
    naive = difference(logits(low, x).float(), logits(model, x)) / scale
    mixer = {"name": "gla", "window": W, "sinks": S}
    linearize_(model, mixer)
    linearize_(low, mixer)
    expected = logits(model, x)
    for got in (logits(low, x), in_pieces(low, x, list(range(30, T)))[0]):
        assert difference(got.float(), expected) / scale <= 2 * naive + 1e-3
    steps = difference(in_pieces(low, x, list(range(1, T)))[0].float(), logits(model, x)) / scale
    assert steps <= 2 * naive + 1e-3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": FORMAT + 1}, "upgrade linearize"),
        ({"layers": {"0": {"name": "glaa"}}}, "Did you mean 'gla'"),
        ({"layers": {"0": {"name": "gla", "windw": 3}}}, "windw: unknown key"),
        ({"source": {"model_type": "nope"}}, "does not know"),
        (None, "no complete `linearize` block"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(tmp_path, change, says):
    model = linearize_(tiny_model("llama"), {"name": "gla"})
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if change is None:
        del config["linearize"]
    else:
        config["linearize"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        AutoConfig.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    model = linearize_(tiny_model("llama"), {"name": "gla"})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="missing keys: model.layers.0.self_attn.q_proj.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layers_out_of_range_are_named():
    with pytest.raises(InputError, match="found 6, 40; this model has attention in layers 0 to 5"):
        linearize_(tiny_model("llama"), {"name": "gla"}, [0, 6, 40])
    with pytest.raises(InputError, match="none is left"):
        linearize_(tiny_model("llama"), {"name": "gla"}, [])


def test_an_architecture_with_attention_code_of_its_own_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(InputError, match="'bloom'.*attention interface"):
        linearize_(model, {"name": "gla"})


@pytest.mark.parametrize("branch", ["all", "window", "memory"])
@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "clusters"])
def test_one_branch_alone_decodes_what_it_reads(name, branch):
    """With the window off, what it holds still moves on into the memory."""
    model, x = linearize_(tiny_model("llama", layers=2), {"name": name, "window": 6, "sinks": 2}), torch.arange(3, 63)
    for module in linearized_modules(model):
        if module.mixer.gate is not None and not module.mixer.weighted:
            torch.nn.init.constant_(module.mixer.gate, 0.5)
    with torch.no_grad(), branches(model, branch):
        full = model(x[None], use_cache=False).logits[0]
        past = model(x[None, :30], use_cache=True).past_key_values
        steps = [model(x[None, t : t + 1], past_key_values=past).logits[0] for t in range(30, 60)]
    # fp32, sums in another order.
    torch.testing.assert_close(torch.cat(steps), full[30:], rtol=0, atol=1e-4)
