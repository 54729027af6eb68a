"""What makes a memory used: cut windows are those of a model converted so; the gain is what two forwards say."""

import json

import pytest
import torch
from helpers.tiny import MIXER, tiny_model, tiny_tokenizer
from helpers.training import T, recipe_for
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from linearize.checkpoint.open import is_adapter
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches, windows
from linearize.model.modeling import linearize_
from linearize.recovery import memory
from linearize.recovery.data import blocks
from linearize.recovery.memory import drop_windows, gain, position_weights
from linearize.recovery.monitor import read_log
from linearize.recovery.train import train

W, S = MIXER["window"], MIXER["sinks"]


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


# --- cut windows


@pytest.mark.parametrize("name", ["gla", "gsa", "kda", "rg_lru", "window"])
def test_a_cut_model_is_the_one_converted_so(name):
    mixer = {"name": name, "window": W, "sinks": S}
    model, ids = linearize_(tiny_model(layers=2), mixer), torch.randint(3, 300, (2, 40))
    short = linearize_(tiny_model(layers=2), {**mixer, "window": 3, "sinks": 1})
    for m in (*linearized_modules(model), *linearized_modules(short)):
        if m.mixer.gate is not None:
            m.mixer.gate.data.fill_(0.5)
    whole = logits(model, ids)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with windows(model, 3, 1):
        assert torch.equal(logits(model, ids), logits(short, ids))
        assert torch.equal(logits(model, ids, attention_mask=mask), logits(short, ids, attention_mask=mask))
        greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(model.generate(ids[:, :9], **greedy), short.generate(ids[:, :9], **greedy))
    assert torch.equal(logits(model, ids), whole) and not torch.equal(logits(short, ids), whole)


def test_a_cut_lengthens_nothing_and_ends_with_an_error_too():
    model = linearize_(linearize_(tiny_model(layers=2), MIXER), {**MIXER, "window": 4, "sinks": 0}, [1])
    with pytest.raises(RuntimeError), windows(model, 6, 1):
        assert [(m.mixer.window, m.mixer.sinks) for m in linearized_modules(model)] == [(6, 1), (4, 0)]
        with windows(model, sinks=0):
            assert [(m.mixer.window, m.mixer.sinks) for m in linearized_modules(model)] == [(6, 0), (4, 0)]
        raise RuntimeError
    assert [(m.mixer.window, m.mixer.sinks) for m in linearized_modules(model)] == [(W, S), (4, 0)]
    for window, sinks in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="expected at least 1 and 0"), windows(model, window, sinks):
            pass


def test_draws_depend_on_their_seed_alone_and_reach_all_lengths():
    model = linearize_(tiny_model(layers=1), MIXER)
    mixer = linearized_modules(model)[0].mixer

    def draw(probability, *seed):
        with drop_windows(model, probability, seed):
            return mixer.window, mixer.sinks

    always = [draw(1.0, 0, i, 0) for i in range(200)]
    assert {w for w, _ in always} == set(range(1, W + 1)) and {s for _, s in always} == set(range(S + 1))
    assert always == [draw(1.0, 0, i, 0) for i in range(200)] and always != [draw(1.0, 0, i, 1) for i in range(200)]
    assert {draw(0.0, 0, i, 0) for i in range(50)} == {(W, S)} == {(mixer.window, mixer.sinks)}
    half = [draw(0.5, 0, i, 0) for i in range(400)]
    # Cut in half of the draws, to another length in 7 of 8 and 2 of 3 of these; ± 4 standard deviations.
    assert sum(w < W for w, _ in half) / 400 == pytest.approx(7 / 16, abs=0.1)
    assert sum(s < S for _, s in half) / 400 == pytest.approx(1 / 3, abs=0.1)
    assert sum(w < W and s < S for w, s in half) / 400 == pytest.approx(7 / 48, abs=0.07), "each on its own"


def test_checkpointing_runs_the_same_windows_again(converted, text, tmp_path):
    for name, checkpointing in (("plain", False), ("checkpointing", True)):
        wanted = recipe_for(text, steps=3, window_dropout=0.9, gradient_checkpointing=checkpointing)
        train(converted, wanted, None, tmp_path / name)
    logs = [read_log(tmp_path / name / "train_log.jsonl") for name in ("plain", "checkpointing")]
    for plain, other in zip(*logs, strict=True):
        # fp32: the same operations, repeated.
        assert (other["kl"], other["grad_norm"]) == pytest.approx((plain["kl"], plain["grad_norm"]), rel=1e-5)


# --- what lies beyond the window


def test_beyond_weighs_what_is_predicted_from_where_the_memory_is_seen(converted, text, tmp_path):
    train(converted, recipe_for(text, tokens=T, lm=1.0, beyond=3.0, batch=1, micro_batch=1), None, tmp_path / "out")
    (line,) = read_log(tmp_path / "out" / "train_log.jsonl")
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    ids = blocks(recipe_for(text).data, tiny_tokenizer(), T, 1)[:1]
    student = logits(model, ids)[0, :-1]
    with branches(model, "source"):
        source = logits(model, ids)[0, :-1]
    share = torch.tensor([3.0 if t >= W + S else 1.0 for t in range(T - 1)])
    share /= share.sum()
    lm = F.cross_entropy(student, ids[0, 1:], reduction="none") @ share
    kl = F.kl_div(student.log_softmax(-1), source.softmax(-1), reduction="none").sum(-1) @ share
    # fp32: losses of about 6 nats.
    assert (line["lm"], line["kl"]) == pytest.approx((float(lm), float(kl)), rel=1e-5)


def test_the_gain_is_what_the_window_control_loses_more():
    model, block = linearize_(tiny_model(layers=2), MIXER), torch.randint(3, 300, (T,))
    control = linearize_(tiny_model(layers=2), {"name": "window", "window": W, "sinks": S})

    def loss(model):
        return float(F.cross_entropy(logits(model, block[None])[0, W + S : -1], block[W + S + 1 :]))

    model.train()
    found = gain(model, block)
    # fp32, of about 6 nats.
    assert found["held_loss"] == pytest.approx(loss(model), rel=1e-5)
    assert found["memory_gain"] == pytest.approx(loss(control) - loss(model), abs=1e-5)
    assert abs(found["memory_gain"]) > 1e-3 and model.training
    assert position_weights(model, T, 2.0).tolist() == [1.0] * (W + S) + [2.0] * (T - W - S)


@pytest.mark.parametrize("keep", ["loss", "memory"])
def test_the_best_moment_becomes_the_result(converted, text, tmp_path, keep, monkeypatch):
    offsets = iter([2.0, 0.0, 3.0, 4.0, 5.0])  # the second moment is the best one: real losses differ by less

    def told(*args):
        offset, found = next(offsets), gain(*args)
        real.append(found["held_loss"])
        return {"held_loss": found["held_loss"] + offset, "memory_gain": found["memory_gain"] - offset}

    real = []
    monkeypatch.setattr(memory, "gain", told)
    wanted = recipe_for(text, steps=9, lr=0.1, watch=2, keep=keep, schedule="constant")
    out = train(converted, wanted, None, tmp_path / "out")
    seen = {line["step"]: line for line in read_log(out / "train_log.jsonl") if "memory_gain" in line}
    assert list(seen) == [2, 4, 6, 8, 9] and len({round(loss, 3) for loss in real}) == 5
    assert json.loads((out / "linearize.json").read_text())["training"]["step"] == 4
    data = blocks(wanted.data, tiny_tokenizer(), T, 36, hold=True)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert is_adapter(out) and data.held is not None
    # fp32 adapters as they were: only what peft does when it opens them may differ.
    assert gain(model, data.held)["held_loss"] == pytest.approx(real[1], rel=1e-5)


def test_blocks_within_the_window_are_refused(converted, text, tmp_path):
    for change in ({"beyond": 2.0}, {"watch": 1}):
        with pytest.raises(InputError, match=r"train.distil: beyond and watch .* seq_len 11"):
            train(converted, recipe_for(text, seq_len=W + S + 1, **change), None, tmp_path / "out")
    with pytest.raises(InputError, match="set watch above 0"):
        recipe_for(text, keep="loss")
