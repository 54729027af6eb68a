"""Heads that stay softmax: they are the source's, the others the mixer's, and every way to run a model agrees."""

import json

import pytest
import torch
from helpers.modeling import LIMIT, can_offload, check_padded_rows, difference, in_pieces, logits, tokens
from helpers.oracles import naive_window_attention
from helpers.tiny import tiny_model
from transformers import AutoModelForCausalLM, StaticCache

from linearize.checkpoint.describe import cache_sizes
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches
from linearize.model.mixers import MIXERS, build_config
from linearize.model.modeling import linearize_
from linearize.model.ops import causal
from linearize.model.sizes import state_bytes
from linearize.recovery.calibrate import fit

W, S, T = 12, 2, 44
GLA = {"name": "gla", "window": W, "sinks": S}
KEPT = {**GLA, "softmax_heads": [1]}
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
NAMES = [name for name in MIXERS if name != "softmax"]
_MODELS = {}


def kept(name: str = "gla"):
    """Layer 0 keeps its first key/value head, layer 1 its second; shared by all tests, which do not change it."""
    if name not in _MODELS:
        model = linearize_(tiny_model("llama", layers=2), {**GLA, "name": name, "softmax_heads": [0]}, [0])
        _MODELS[name] = linearize_(model, {**GLA, "name": name, "softmax_heads": [1]}, [1])
    return _MODELS[name]


@pytest.mark.parametrize("elements", [1, 2**22])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_causal_attention_is_the_whole_window(monkeypatch, elements, softcap):
    monkeypatch.setattr(causal, "ELEMENTS", elements)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    for extra in (None, torch.randn(4)):
        given = {"scaling": 0.4, "softcap": softcap, "extra": extra}
        expected, _ = naive_window_attention(q, k, v, window=9, sinks=0, **given)
        torch.testing.assert_close(causal.causal_attention(q, k, v, seen=0, **given), expected)
        # Rows with 5 and 3 tokens before four new ones; slots behind those of the second hold anything.
        new = torch.stack([q[0, :, 5:9], q[1, :, 3:7]])
        found = causal.causal_attention(new, k, v, seen=torch.tensor([5, 3]), **given)
        torch.testing.assert_close(found, torch.stack([expected[0, :, 5:9], expected[1, :, 3:7]]))


@pytest.mark.parametrize("name", NAMES)
def test_each_head_is_the_sources_or_the_mixers(name):
    """What the layer hands to its output projection, head by head; with the source's attention and the whole mixer."""
    x = tokens(2, T)

    def outputs(values, branch="all"):
        torch.manual_seed(0)
        model = linearize_(tiny_model("llama", layers=1), values)
        seen = []
        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with branches(model, branch):
            logits(model, x, use_cache=False)
        return seen[0].unflatten(-1, (2, -1))  # [B, T, key/value heads, ·]

    plain = {**GLA, "name": name}
    source, mixer = outputs(plain, "source"), outputs(plain)
    for g in (0, 1):
        found = outputs({**plain, "softmax_heads": [g]})
        # fp32: other kernels for fewer heads.
        torch.testing.assert_close(found[:, :, g], source[:, :, g], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[:, :, 1 - g], mixer[:, :, 1 - g], rtol=1e-5, atol=1e-5)
    if name == "gla":  # clusters are the source until they merge
        assert difference(source, mixer) > 1e-3


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "llama"])
def test_soft_caps_and_extra_logits_are_the_sources(model_type):
    """A window as wide as the text: both kinds of heads are the source's."""
    x = tokens(2, T)
    source, model = tiny_model(model_type), tiny_model(model_type)
    linearize_(model, {**GLA, "window": T, "softmax_heads": [0]})
    expected = logits(source, x, use_cache=False)
    scale = float(expected.abs().max())
    for found in (logits(model, x, use_cache=False), in_pieces(model, x, [20, *range(30, T)])[0]):
        assert difference(found, expected) < LIMIT * max(1, scale)


@pytest.mark.parametrize("name", NAMES)
def test_full_pieces_and_single_tokens_agree(name):
    model, x = kept(name), tokens(2, T)
    expected = logits(model, x)
    for cuts in ([5, 21], [9, *range(16, T)]):
        assert difference(in_pieces(model, x, cuts)[0], expected) < LIMIT * 10


def test_padding_and_packing_change_nothing():
    model = kept()
    check_padded_rows(model, (20, 7), 12)

    lengths = [24, 1, 25, 10]
    x = tokens(1, 60)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(x, position_ids=positions)
        where = torch.arange(10, 16)[None]
        after = model(x[:, :6], position_ids=where, past_key_values=packed.past_key_values).logits
    for part, document in zip(packed.logits.split(lengths, 1), x.split(lengths, 1), strict=True):
        assert difference(part, logits(model, document)) < LIMIT * 10
    # What goes on is the last document.
    expected = logits(model, torch.cat([x[:, -10:], x[:, :6]], 1))[:, 10:]
    assert difference(after, expected) < LIMIT * 10
    with pytest.raises(ValueError, match="packed documents can only start"), torch.no_grad():
        model(x, position_ids=positions, past_key_values=packed.past_key_values)


def test_generation_beams_and_batches():
    model, x = kept(), tokens(2, 20)
    expected = model.generate(x, use_cache=False, **GREEDY)
    for how in (
        {},
        {"cache_implementation": "dynamic"},
        *([{"cache_implementation": "offloaded"}] if can_offload() else []),
        {"prefill_chunk_size": 7},
    ):
        assert torch.equal(model.generate(x, **how, **GREEDY), expected), how
    beams = model.generate(x, num_beams=3, **GREEDY)
    assert torch.equal(model.generate(x, num_beams=3, use_cache=False, **GREEDY), beams)

    x = tokens(2, T)
    expected = logits(model, x)
    _, past = in_pieces(model, x[:, :30], [25, *range(26, 30)])
    past.batch_repeat_interleave(3)
    got = logits(model, x[:, 30:31].repeat_interleave(3, 0), past_key_values=past)
    assert difference(got, expected[:, 30:31].repeat_interleave(3, 0)) < LIMIT * 10
    past.batch_select_indices(torch.tensor([5, 1]))
    for t in (31, 32):
        got = logits(model, x.flip(0)[:, t : t + 1], past_key_values=past)
        assert difference(got, expected.flip(0)[:, t : t + 1]) < LIMIT * 10
    past.reset()
    assert difference(logits(model, x, past_key_values=past), expected) < LIMIT * 10


def test_a_static_cache_is_refused_in_one_sentence():
    model = kept()
    says = "heads that stay softmax, whose cache grows with the text, so a static cache cannot hold it"
    with pytest.raises(RuntimeError, match=says):
        model.generate(tokens(1, 9), cache_implementation="static", **GREEDY)
    with pytest.raises(RuntimeError, match=says):
        logits(model, tokens(1, 9), past_key_values=StaticCache(config=model.config, max_cache_len=40))


def test_bytes_of_the_cache_grow_by_the_kept_heads_alone():
    model, x = kept(), tokens(2, T)
    _, past = in_pieces(model, x[:, :30], [20])
    for t in range(30, T + 1):
        assert [layer.nbytes() for layer in past.layers] == state_bytes(model.config, t, 2, 4)["per_layer"]
        if t < T:
            logits(model, x[:, t : t + 1], past_key_values=past)
    growth = cache_sizes(model.config)["bytes_per_token"]
    assert growth["linearized"] * 2 == growth["source_kv"]  # one of two heads
    whole = linearize_(tiny_model("llama", layers=2), GLA).config
    fixed = [layer - 44 * 2 * 16 * 4 * 2 for layer in state_bytes(model.config, T, 2, 4)["per_layer"]]
    # Slots and state of half as many heads, and the same counter.
    assert all(2 * (a - 16) == b - 16 for a, b in zip(fixed, state_bytes(whole, T, 2, 4)["per_layer"], strict=True))


def test_save_load_gradients_and_calibration(tmp_path):
    model, x = linearize_(tiny_model("llama", layers=2), {**KEPT, "calibrated": True}), tokens(2, T)
    fit(model, x)
    assert [m.mixer.gate.shape for m in linearized_modules(model)] == [(2,), (2,)]
    assert all(m.mixer.gate.detach().abs().max() > 0 for m in linearized_modules(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.linearize == model.config.linearize
    assert json.loads((tmp_path / "config.json").read_text())["linearize"]["layers"]["0"]["softmax_heads"] == [1]
    assert torch.equal(logits(again, x), logits(model, x))
    again.train()
    again(x, labels=x, use_cache=False).loss.backward()
    plain = {n: p.grad.clone() for n, p in again.named_parameters()}
    again.zero_grad()
    again(x, labels=x, use_cache=True).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in again.parameters())
    assert all(torch.equal(p.grad, plain[n]) for n, p in again.named_parameters())


def test_alike_layers_are_stacked_whatever_heads_they_keep():
    model = kept()
    _, past = in_pieces(model, tokens(2, 22), [20, 21])
    assert past.layers[0].stack is past.layers[1].stack is not None


def test_settings_that_cannot_be_are_named():
    assert build_config(KEPT).to_dict()["softmax_heads"] == [1] and build_config({**GLA, "softmax_heads": []})
    assert "softmax_heads" not in build_config(GLA).to_dict()
    for value, says in (
        ([1, 0], r"found \[1, 0\]; expected different indices, ascending"),
        ([-1], "expected different indices"),
        ("0", "expected a list of whole numbers"),
        ([0.5], "expected a list of whole numbers"),
    ):
        with pytest.raises(InputError, match=says):
            build_config({**GLA, "softmax_heads": value})
    with pytest.raises(InputError, match="all heads stay softmax here"):
        build_config({"name": "softmax", "softmax_heads": [0]})
    for value in ([2], [0, 1]):
        with pytest.raises(InputError, match="the layer has 2 key/value heads, so indices from 0 to 1"):
            linearize_(tiny_model("llama", layers=2), {**GLA, "softmax_heads": value})
    with pytest.raises(InputError, match="slides a window"):
        linearize_(tiny_model("mistral", layers=2, sliding_window=8), KEPT)
