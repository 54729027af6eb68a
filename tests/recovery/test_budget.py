"""What a plan says against what PyTorch counts, on tiny models; that a deep model's is on the line of its layers."""

import json
from dataclasses import asdict

import pytest
import torch
from helpers.tiny import save_source, tiny_model
from helpers.training import command_line

import linearize
from linearize.errors import InputError
from linearize.model.modeling import linearize_
from linearize.model.sizes import state_bytes
from linearize.recipe.schema import Peft, Stage
from linearize.recovery import footprint as counted
from linearize.recovery.footprint import footprint
from linearize.recovery.loop import prepare

STAGE = Stage(seq_len=64, batch=2, tokens=128)
MIXERS = [{"name": "gla", "window": 8, "sinks": 2}, {"name": "clusters", "window": 8, "sinks": 2, "clusters": 32}]


def build(layers: int = 2, mixer: dict = MIXERS[0], **changes):
    return lambda: linearize_(tiny_model(layers=layers, **changes).to("meta"), mixer)


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer["name"])
def test_weights_gradients_and_optimiser_are_counted_to_the_byte(mixer):
    model = linearize_(tiny_model(layers=2), mixer)
    own = sum(weight.nbytes for weight in model.parameters())
    whole = footprint(build(mixer=mixer), Stage(seq_len=64, batch=2, tokens=128, peft=None, kl=0.0, lm=1.0))
    assert whole.weights == own and whole.trained == own / 4
    assert 8 * whole.trained <= whole.optimiser < 8 * whole.trained + 100 * len(list(model.parameters()))
    assert whole.backward > 4 * whole.trained
    adapters = footprint(build(mixer=mixer), STAGE)
    assert own < adapters.weights < 2 * own and adapters.trained < whole.trained
    taught = footprint(build(mixer=mixer), Stage(seq_len=64, batch=2, tokens=128, peft=None))
    assert taught.weights == 2 * own and taught.source > 0 == whole.source


@pytest.mark.parametrize("mixer", [MIXERS[0], pytest.param(MIXERS[1], marks=pytest.mark.slow)], ids=lambda m: m["name"])
def test_a_step_without_values_holds_what_one_with_values_holds(mixer, monkeypatch):
    class Watch(counted._Watch):
        def _of_known(self, func, args, kwargs, given):
            return func(*args, **kwargs)

    monkeypatch.setattr("linearize.model.ops.clusters.PIECE", 64)  # several pieces, and clusters that merge
    stage = Stage(seq_len=192, batch=2, micro_batch=2, tokens=384)
    planned = footprint(build(mixer=mixer), stage)
    student = prepare(linearize_(tiny_model(layers=2), mixer), stage)
    ids = torch.arange(2 * 192).view(2, 192)
    with Watch([ids, *student.parameters(), *student.buffers()]) as watch:
        counted._step(student, student, ids, stage, watch.next, divided=False)
    held = {"saved": watch.saved, "student": watch.peaks["student"], "backward": watch.peaks["backward"]}
    for name, value in held.items():
        assert getattr(planned, name) == pytest.approx(value, rel=1e-3), name


@pytest.mark.slow
def test_a_deep_model_lies_on_the_line_of_its_layers(monkeypatch):
    stretched = footprint(build(layers=9), STAGE)
    monkeypatch.setattr(counted, "_kinds", lambda model: list(range(9)))
    whole = footprint(build(layers=9), STAGE)
    for name, value in asdict(whole).items():
        assert getattr(stretched, name) == pytest.approx(value, rel=0.02), name


def test_what_a_stage_does_shows():
    plain = footprint(build(), STAGE)
    longer = footprint(build(), Stage(seq_len=128, batch=2, tokens=256))
    assert 1.8 < longer.saved / plain.saved < 2.2 and 1.8 < longer.flops / plain.flops < 2.5
    again = Stage(seq_len=64, batch=2, tokens=128, gradient_checkpointing=True)
    recomputed = footprint(build(), again)
    assert recomputed.saved < 0.5 * plain.saved and recomputed.flops > 1.1 * plain.flops
    transfer = Stage(seq_len=64, batch=2, tokens=128, kl=0.0, transfer=1.0, peft=Peft(roles=("q", "k")))
    assert footprint(build(), transfer).source > 0


@pytest.mark.slow
def test_logits_of_a_large_vocabulary_are_never_there_as_a_whole():
    wide = {"vocab_size": 60_000}
    once, pieces = (footprint(build(**wide), Stage(seq_len=1024, batch=1, tokens=1024), way) for way in (True, False))
    assert pieces.student < 0.7 * once.student  # 240 MB of logits, of which a piece is 134 at most


def test_bytes_of_slots_that_can_be_taken_back_are_those_of_a_cache_that_records():
    import torch
    from transformers import DynamicCache

    model = linearize_(tiny_model(layers=2), MIXERS[1])
    sizes = state_bytes(model.config, 100, dtype_bytes=4)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(3, 43)[None], past_key_values=cache)
    assert sum(layer.nbytes() for layer in cache.layers) == sizes["linearized"]
    cache.activate_past_recording()
    assert (
        sum(layer.nbytes() for layer in cache.layers) == sizes["linearized"] + sizes["rollback"] > sizes["linearized"]
    )


def test_a_plan_by_verb(tmp_path, monkeypatch, capsys):
    source = save_source(tmp_path / "source", layers=2)
    small = ["train.distil.seq_len=64", "train.distil.tokens=512", "train.distil.batch=4"]
    made = linearize.plan(source, gpu="l4", gpus=2, set=small)
    assert [row.stage for row in made.rows] == ["convert", "train.distil", "merge", "generate"]
    row = made.rows[1]
    assert row.divided and row.peak > row.weights + row.state and row.seconds and made.needs == []
    assert command_line(monkeypatch, "plan", source, "--gpu", "l4", "--gpus", "2", *(f"--set={s}" for s in small)) == 0
    said = capsys.readouterr().out
    assert "divided" in said and "32K" in said and "more, for tokens that may be taken back" in said
    assert command_line(monkeypatch, "plan", source, "--json", *(f"--set={s}" for s in small)) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["trained"] == row.trained
    for given, message in (
        ({"gpu": "h10"}, "did you mean 'h100'"),
        ({"gpus": 3}, "3 cannot share train.distil.batch 4"),
        ({"gpus": 0}, "found 0"),
    ):
        with pytest.raises(InputError, match=f"(?i){message}"):
            linearize.plan(source, set=small, **given)
