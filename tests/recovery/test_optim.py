"""What is trained and how: methods, optimisers, rates, schedules; the mixers' own weights with each of them."""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from helpers.tiny import TEXT, save_converted, save_source, tiny_model
from helpers.training import losses, recipe_for, weights, without_times
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearize.checkpoint import adapters
from linearize.checkpoint.open import is_adapter, load
from linearize.checkpoint.sources import locate
from linearize.conversion import convert
from linearize.errors import InputError
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recipe import resources
from linearize.recipe.schema import METHODS, OPTIMIZERS, Peft, Stage
from linearize.recovery import loop as training_loop
from linearize.recovery import optim
from linearize.recovery import train as training
from linearize.recovery.merge import merge
from linearize.recovery.train import train

MIXER = {"name": "hedgehog", "combine": "memory", "window": 8, "sinks": 2, "calibrated": True}
# peft 0.21 asks the model for a name that transformers 5.23 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
MIXERS = {f"model.layers.{i}.self_attn.mixer.{name}" for i in (0, 1) for name in ("gate", "query_map", "key_map")}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    return save_converted(tmp_path_factory.mktemp("optim") / "converted", MIXER)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """One sentence again and again, which even a few steps learn by heart."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT[:80] * 40)
    return file


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] % 300).logits


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


# --- methods and optimisers ---


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *((method, "adamw") for method in METHODS),
        *(("lora", optimizer) for optimizer in OPTIMIZERS[1:]),
        (None, "muon"),
    ],
)
def test_every_way_to_train_learns_resumes_to_the_same_bits_and_merges(
    converted, text, tmp_path, monkeypatch, method, optimizer
):
    settings = method and {"method": method, "r": 4, "alpha": 8, "dropout": 0.1 * (method != "full")}
    wanted = recipe_for(text, steps=6, lm=1.0, kl=0.0, lr=1e-2, warmup=0, peft=settings, optimizer=optimizer)
    step, out, whole = training_loop.Loop.step, tmp_path / "out", tmp_path / "whole"

    def stop(loop, number, checkpoint):
        if number == 5:
            raise KeyboardInterrupt
        return step(loop, number, checkpoint)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_loop.Loop, "step", stop)
        train(converted, wanted, None, out)
    train(converted, wanted, None, out, resume=True)
    train(converted, wanted, None, whole)
    lm = losses(whole)[:, 0]
    assert lm[-1] < lm[0] - 0.15
    assert without_times(out / "train_log.jsonl") == without_times(whole / "train_log.jsonl")
    file = "adapter_model.safetensors" if is_adapter(out) else "model.safetensors"
    found, expected = load_file(out / file), load_file(whole / file)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    start, names = load_file(converted / "model.safetensors"), {key.removeprefix("base_model.model.") for key in found}
    assert names >= MIXERS and is_adapter(out) == (method not in (None, "full"))
    changed = load_file((merge(out, tmp_path / "merged") if is_adapter(out) else out) / "model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], changed[name])}
    projections = {f"model.layers.{i}.self_attn.{role}_proj.weight" for i in (0, 1) for role in "qkvo"}
    assert moved == (projections | MIXERS if method else set(start))
    if is_adapter(out):
        expected = logits(opened(tmp_path / "merged"))
        students = [peft.PeftModel.from_pretrained(opened(converted), str(out)).get_base_model(), load(out)[0]]
        if method != "dora":  # transformers 5.23 does not find its magnitudes, so nothing here opens them that way
            students.append(opened(out))
        for student in students:
            # fp32: x W + (x A) B against x (W + A B); logits are about 10.
            torch.testing.assert_close(logits(student), expected, rtol=0, atol=2e-5)


def test_the_source_needs_no_second_copy_beside_adapters_but_one_beside_trained_weights(converted, text, tmp_path):
    expected = losses(train(converted, recipe_for(text, steps=1), None, tmp_path / "lora"))[0, 1]
    for name, settings in (("full", {"method": "full", "roles": ["v"]}), ("all", None)):
        wanted = recipe_for(text, steps=4, peft=settings, lr=1e-3)
        kl = losses(train(converted, wanted, None, tmp_path / name))[:, 1]
        # fp32: before the first step all are the same model.
        assert (kl[0] - expected).abs() < 1e-6 and kl[1] != kl[0]


def test_full_keeps_fp32_masters_of_what_it_trains_and_the_rest_as_it_was(text, tmp_path, monkeypatch):
    folder = save_converted(tmp_path / "converted", MIXER, torch.bfloat16)
    kept, save = {}, adapters.save

    def look(model, *rest):
        kept.update({name: weight.dtype for name, weight in model.named_parameters()})
        save(model, *rest)

    monkeypatch.setattr(adapters, "save", look)
    settings = {"method": "full", "roles": ["q"], "mixer": False}
    train(folder, recipe_for(text, peft=settings, dtype="bfloat16"), None, tmp_path / "out")
    assert all(dtype == (torch.float32 if "q_proj" in name else torch.bfloat16) for name, dtype in kept.items())
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], after[name]) == ("q_proj" not in name) for name in before)
    lora = train(folder, recipe_for(text, steps=1), None, tmp_path / "lora")
    with pytest.raises(InputError, match="merge first"):
        train(lora, recipe_for(text, peft=settings), None, tmp_path / "no")


# --- the mixers' own weights ---


def test_no_roles_trains_the_memory_alone_and_later_stages_go_on_with_it(converted, text, tmp_path):
    one = train(converted, recipe_for(text, steps=8, peft={"roles": []}, lr=1e-2), None, tmp_path / "one")
    assert {name.removeprefix("base_model.model.") for name in weights(one)} == MIXERS
    kl = losses(one)[:, 1]
    assert kl[-1] < kl[0]
    before, after = (load_file(x / "model.safetensors") for x in (converted, merge(one, tmp_path / "merged")))
    assert {name for name in before if not torch.equal(before[name], after[name])} == MIXERS

    two = train(one, recipe_for(text, steps=1, lr=1e-9), None, tmp_path / "two")
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=0, atol=1e-7)
    assert len(weights(two)) > len(weights(one))
    with pytest.raises(InputError, match="other settings than this stage's peft block"):
        train(two, recipe_for(text, peft={"roles": []}), None, tmp_path / "three")


def test_mixers_are_left_alone_when_asked(converted, text, tmp_path):
    settings = {"roles": ["q"], "mixer": False}
    out = train(converted, recipe_for(text, steps=1, peft=settings), None, tmp_path / "out")
    assert not any("mixer" in name for name in weights(out))


def test_nothing_to_train_is_one_paragraph(converted, text, tmp_path):
    bare = save_converted(tmp_path / "bare", {**MIXER, "name": "gla", "calibrated": False})
    with pytest.raises(InputError, match="mixers of this model have no weights of their own"):
        train(bare, recipe_for(text, peft={"roles": []}), None, tmp_path / "out")
    wide = save_converted(tmp_path / "wide", {**MIXER, "window": 64})
    with pytest.raises(InputError, match=r"train.distil.seq_len: blocks of 32 tokens reach nothing that is trained"):
        train(wide, recipe_for(text, peft={"roles": []}), None, tmp_path / "out")
    with pytest.raises(InputError, match=r"peft.method 'miss': .*less than or equal to in_features"):
        train(converted, recipe_for(text, peft={"method": "miss", "r": 1000}), None, tmp_path / "no")


def test_plain_peft_puts_an_adapter_with_mixers_on_a_fresh_conversion(text, tmp_path):
    wanted = recipe_for(text, peft={"r": 4}, lr=1e-2)
    source = locate(str(save_source(tmp_path / "source", layers=2)))
    values = {**recipes.to_dict(wanted), "convert": {"mixer": {**MIXER}}}
    for name in ("first", "again"):
        convert.convert(source, recipes.from_dict(values), tmp_path / name)
    out = train(tmp_path / "first", wanted, None, tmp_path / "out")
    fresh = peft.PeftModel.from_pretrained(opened(tmp_path / "again"), str(out))
    assert torch.equal(logits(fresh), logits(opened(out)))
    assert (logits(fresh) - logits(opened(tmp_path / "again"))).abs().max() > 1e-2


# --- rates ---


def test_groups_have_their_rates_and_only_matrices_decay():
    stage = Stage(lr=1e-3, mixer_lr=1e-2, weight_decay=0.1)
    model = linearize_(tiny_model(layers=2), MIXER)
    names = {weight: name for name, weight in model.named_parameters()}
    groups = optim.groups(model, stage)
    assert sorted(names[weight] for group in groups for weight in group["params"]) == sorted(names.values())
    for group in groups:
        for weight in group["params"]:
            name = names[weight]
            assert group["lr"] == (1e-2 if ".mixer." in name else 1e-3)
            assert group["weight_decay"] == (0.0 if "norm" in name or "gate" in name.split(".") else 0.1)
            assert group["matrices"] == ("_proj" in name)
    assert {group["lr"] for group in optim.groups(model, Stage(lr=1e-3))} == {1e-3}
    adapted = adapters.attach(model, Peft(method="dora"))
    trained = [weight for group in optim.groups(adapted, stage) for weight in group["params"]]
    assert len(trained) == 2 * (4 * 3 + 3)  # layers · (projections · (A, B, magnitudes) + the mixer's)


def test_muon_moves_matrices_by_muon_and_the_rest_by_adamw():
    model, stage = linearize_(tiny_model(layers=2), MIXER), Stage(optimizer="muon", lr=1e-2, schedule="constant")
    optimizer, _ = optim.build(model, stage, 10)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
    optimizer.step()
    for name, weight in model.named_parameters():
        kind = {"momentum_buffer"} if "_proj" in name else {"step", "exp_avg", "exp_avg_sq"}
        assert set(optimizer.state[weight]) == kind, name
        step = weight.detach() - before[name]
        if "_proj" in name:
            # An orthogonal matrix scaled to the size of AdamW's steps, 0.2 lr; Newton-Schulz leaves the values near 1.
            values = torch.linalg.svdvals(step) / (0.2 * 1e-2 * max(step.shape) ** 0.5)
            assert values.max() < 1.3 and values.median() > 0.6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Steps 1 to 10; warmup 2 of them, decay 4: 1 − √(share of the last phase), of 11 with the one after the end.
        ("warmup_stable_decay", [0.5, *[1.0] * 6, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5]),
        # Cosine from the peak to 0.55 of it within 4 steps after the warmup, then constant.
        ("infinite", [0.5, 1.0, *[0.55 + 0.225 * (1 + x) for x in (0.5**0.5, 0, -(0.5**0.5), -1)], *[0.55] * 4]),
    ],
)
def test_schedules(name: str, expected: list[float]):
    stage = Stage(lr=1e-3, mixer_lr=1e-2, schedule=name, warmup=0.2, decay=0.4)
    optimizer, scheduler = optim.build(linearize_(tiny_model(layers=2), MIXER), stage, 10)
    found = []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"] / 1e-3)
        assert optimizer.param_groups[-1]["lr"] == pytest.approx(10 * optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected)


# --- many processes ---


@pytest.mark.parametrize(("way", "optimizer"), [("FSDP", "adafactor"), ("DEEPSPEED", "muon")])
def test_optimisers_that_cannot_work_on_parts_of_weights(converted, text, tmp_path, monkeypatch, way, optimizer):
    monkeypatch.setattr(training.Accelerator, "distributed_type", training_loop.DistributedType(way))
    with pytest.raises(InputError, match=f"optimizer: found {optimizer}; with weights divided by {way} allowed: adamw"):
        train(converted, recipe_for(text, optimizer=optimizer), None, tmp_path / "out")


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.slow
def test_sharded_processes_give_the_weights_of_one(converted, text, tmp_path, processes):
    wanted = recipe_for(text, steps=6, lm=1.0, micro_batch=1)
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(wanted))
    program = Path(__file__).parents[1] / "helpers" / "sharded.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0", "--master_port", "0", str(program)]
    config = recipes.yaml.safe_load((resources.package_folder("recipes") / "accelerate" / "fsdp2.yaml").read_text())
    # As `accelerate launch` hands its configuration on.
    environment = {key.upper(): str(value) for key, value in config["fsdp_config"].items()}
    arguments = ["train", str(converted), "--recipe", "recipe.yaml", "--out", "many"]
    done = subprocess.run(
        [*launcher, *arguments],
        cwd=tmp_path,
        env=os.environ | environment | {"ACCELERATE_USE_FSDP": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    one, many = train(converted, wanted, None, tmp_path / "one"), tmp_path / "many"
    # fp32: gradients are summed in another order.
    torch.testing.assert_close(losses(many), losses(one), rtol=0, atol=1e-4)
    assert weights(many).keys() == weights(one).keys()
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(many)[name], weight, rtol=0, atol=1e-4)
