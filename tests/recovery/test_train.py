"""Training: what a run writes, that it can be divided, interrupted and resumed, and that bad input is one paragraph."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import MIXER, save_converted, tiny_model, tiny_tokenizer
from helpers.training import T, command_line, losses, recipe_for, start, weights, without_times
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearize.checkpoint import adapters
from linearize.checkpoint.manifest import verify
from linearize.checkpoint.open import open_model
from linearize.errors import InputError
from linearize.model import architectures
from linearize.model.branches import branches
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recovery import loop as training_loop
from linearize.recovery import train as training
from linearize.recovery.merge import merge
from linearize.recovery.monitor import read_log
from linearize.recovery.train import train

TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv-backend", "c10d")
TWO += ("--rdzv-endpoint", "localhost:0")
"""Starts two processes."""
GATES = [f"model.layers.{layer}.self_attn.mixer.gate" for layer in (0, 1)]


# --- what a run writes ---


def test_a_stage_writes_adapters_that_open_with_transformers_and_bring_the_student_nearer(converted, text, tmp_path):
    out = tmp_path / "out"
    wanted = recipe_for(text, steps=30, lm=0.5)
    assert train(converted, wanted, "distil", out) == out
    log = read_log(out / "train_log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 31))
    assert set(log[0]) == {"step", "tokens", "lm", "kl", "lr", "grad_norm", "tokens_per_second"}
    assert log[-1]["tokens"] == 30 * 4 * T
    lm, kl = losses(out).T
    assert lm[-5:].mean() < lm[:5].mean() - 0.1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "tokenizer.json", "recipe.yaml", "train_log.jsonl", "tb"} <= names
    assert not {"config.json", "model.safetensors", "README.md", "checkpoints"} & names
    assert recipes.load(out / "recipe.yaml").train == wanted.train
    assert verify(out) == []
    assert list((out / "tb").glob("events*"))

    ids = torch.randint(3, 300, (2, 40))
    student, start = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, converted))
    with torch.no_grad():
        assert (student(ids).logits - start(ids).logits).abs().max() > 1e-3


def test_distillation_brings_the_student_nearer_to_the_source(converted, text, tmp_path):
    train(converted, recipe_for(text, steps=40, lr=3e-3), None, tmp_path / "out")
    kl = losses(tmp_path / "out")[:, 1]
    assert kl[-10:].mean() < 0.9 * kl[:10].mean()


def test_the_source_is_the_student_with_adapters_off(converted, text, tmp_path):
    start = AutoModelForCausalLM.from_pretrained(converted).eval()
    ids = torch.randint(3, 300, (2, 40))
    with torch.no_grad(), branches(start, "source"):
        expected = start(ids).logits
    model = adapters.attach(open_model(converted), recipe_for(text).train[0].peft)
    for name, weight in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    model.train()
    with adapters.as_source(model):
        found = model(ids).logits
    assert torch.equal(found, expected) and not found.requires_grad
    assert model.training and all(w.requires_grad == ("lora" in n) for n, w in model.named_parameters())
    assert (model(ids).logits - expected).abs().max() > 0.1


def test_a_student_equal_to_its_source_has_no_distillation_loss(text, tmp_path):
    folder = save_converted(tmp_path / "converted", {"name": "softmax", "combine": "none"})
    train(folder, recipe_for(text, steps=1), None, tmp_path / "out")
    assert losses(tmp_path / "out")[0, 1].abs() < 1e-6


# --- dividing a step ---


@pytest.mark.parametrize("change", [{"micro_batch": 4}, {"micro_batch": 1}, {"gradient_checkpointing": True}])
def test_how_a_step_is_computed_does_not_change_it(converted, text, tmp_path, change):
    train(converted, recipe_for(text, lm=1.0), None, tmp_path / "plain")
    train(converted, recipe_for(text, lm=1.0, **change), None, tmp_path / "changed")
    # fp32: only the order of additions differs.
    torch.testing.assert_close(losses(tmp_path / "changed"), losses(tmp_path / "plain"), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(text, tmp_path):
    model = linearize_(tiny_model(layers=2), {**MIXER, "calibrated": True})
    # A window as wide as the blocks: the gate of layer 1 gets no gradient.
    linearize_(model, {**MIXER, "calibrated": True, "window": T}, [1]).save_pretrained(tmp_path / "converted")
    tiny_tokenizer().save_pretrained(tmp_path / "converted")
    converted = tmp_path / "converted"
    wanted = recipe_for(text, steps=6, lm=1.0, micro_batch=1)
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(wanted))
    arguments = ("--recipe", tmp_path / "recipe.yaml", "--model", converted, "--out", tmp_path / "two")
    process = start(*arguments, launcher=TWO)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "2 x cpu" in errors
    train(converted, wanted, None, tmp_path / "one")
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-4)
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=0, atol=1e-4)
    moved = [bool(weights(tmp_path / "two")[f"base_model.model.{name}"].any()) for name in GATES]
    assert moved == [True, False]


def test_bf16_keeps_fp32_masters(converted, text, tmp_path, monkeypatch):
    kept = {}
    save = adapters.save

    def keep(model, *rest):
        kept.update({name: weight.dtype for name, weight in model.named_parameters()})
        save(model, *rest)

    monkeypatch.setattr(adapters, "save", keep)
    train(converted, recipe_for(text, lm=1.0), None, tmp_path / "fp32")
    train(converted, recipe_for(text, lm=1.0, dtype="bfloat16"), None, tmp_path / "bf16")
    assert all(dtype == (torch.float32 if "lora" in name else torch.bfloat16) for name, dtype in kept.items())
    # bf16 has 8 bits: the losses agree to about that, relative to their size (6 nats).
    torch.testing.assert_close(losses(tmp_path / "bf16"), losses(tmp_path / "fp32"), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("value", "named"), [(float("nan"), "weight .*layers.1.self_attn.o_proj"), (1e38, "output of .*layers.1.self_attn")]
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    converted, text, tmp_path, monkeypatch, value, named
):
    step, out = training_loop.Loop.step, tmp_path / "out"

    def poison(loop, number, checkpoint):
        if number == 4:
            name = "base_model.model.model.layers.1.self_attn.o_proj.base_layer.weight"
            loop.plain.get_parameter(name).data.fill_(value)
        return step(loop, number, checkpoint)

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=f"step 4 of 6: .*{named}.*step-00000002") as error,
    ):
        patch.setattr(training_loop.Loop, "step", poison)
        train(converted, recipe_for(text, steps=6), None, out)
    assert "\n" not in str(error.value) and not out.exists()
    train(converted, recipe_for(text, steps=6), None, out, resume=True)
    train(converted, recipe_for(text, steps=6), None, tmp_path / "whole")
    assert without_times(out / "train_log.jsonl") == without_times(tmp_path / "whole" / "train_log.jsonl")


# --- folders in, folders out ---


def test_a_second_stage_goes_on_with_the_adapters_of_the_first(converted, text, tmp_path):
    train(converted, recipe_for(text, steps=8, lr=1e-2), None, tmp_path / "one")
    train(tmp_path / "one", recipe_for(text, steps=1, lr=1e-9), None, tmp_path / "two")
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=0, atol=1e-7)
    assert (tmp_path / "two" / "tokenizer.json").exists()
    merge(tmp_path / "two", tmp_path / "merged")
    for change in ({"r": 8, "alpha": 8}, {"r": 4, "alpha": 4}, {"r": 4, "alpha": 8, "roles": ["q"]}):
        with pytest.raises(InputError, match="other settings than this stage's peft block|do not match the model"):
            train(tmp_path / "one", recipe_for(text, peft=change), None, tmp_path / "three")
    with pytest.raises(InputError, match="merge first"):
        train(tmp_path / "one", recipe_for(text, peft=None), None, tmp_path / "three")
    with pytest.raises(InputError, match="no longer the source's"):
        train(tmp_path / "merged", recipe_for(text), None, tmp_path / "three")
    train(tmp_path / "merged", recipe_for(text, steps=1, lm=1.0, kl=0.0), None, tmp_path / "three")


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_training_everything_writes_a_plain_folder_in_the_dtype_it_found(text, tmp_path, kl):
    folder = save_converted(tmp_path / "converted", dtype=torch.bfloat16)
    out = train(folder, recipe_for(text, steps=6, lm=1 - kl, kl=kl, peft=None, lr=1e-3), None, tmp_path / "out")
    before, after = (load_file(place / "model.safetensors") for place in (folder, out))
    assert before.keys() == after.keys() and all(weight.dtype == torch.bfloat16 for weight in after.values())
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert verify(out) == []
    AutoModelForCausalLM.from_pretrained(out)


def test_only_linearized_layers_get_adapters(text, tmp_path):
    model = linearize_(tiny_model(layers=3), MIXER, layers=[1])
    model.save_pretrained(tmp_path / "converted")
    tiny_tokenizer().save_pretrained(tmp_path / "converted")
    train(tmp_path / "converted", recipe_for(text, steps=1), None, tmp_path / "out")
    assert {name.split(".")[4] for name in weights(tmp_path / "out")} == {"1"}


# --- bad input ---


def test_bad_input_is_one_paragraph_and_nothing_is_written(converted, text, tmp_path, llama_folder):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n{"text": "  "}\n')
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a"}\n')
    bare = tmp_path / "bare"
    bare.mkdir()
    out = tmp_path / "out"

    def fails(
        match: str, folder: Path = converted, wanted: recipes.Recipe | None = None, stage: str | None = None
    ) -> None:
        with pytest.raises(InputError, match=match) as error:
            train(folder, wanted or recipe_for(text), stage, out)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("out*"))

    fails("no such folder", tmp_path / "nowhere")
    fails("bare: has no usable tokenizer", bare)
    fails("plain llama model; run `linearize convert`", llama_folder)
    damaged = save_converted(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:1000])
    fails("damaged.*model.safetensors: is not a whole safetensors file", damaged)
    fails("there is no training stage distill. Did you mean 'distil'", stage="distill")
    fails("holds 2 tokens, one block needs 32", wanted=recipe_for(short))
    fails("holds no text", wanted=recipe_for(empty))


def test_an_adapter_that_targets_nothing_is_refused(converted, text, tmp_path, monkeypatch):
    monkeypatch.setitem(architectures.ROLES, "q", ("a_name_of_tomorrow",))
    with pytest.raises(InputError, match="'q' targets no module"):
        train(converted, recipe_for(text), None, tmp_path / "out")


def test_the_command_line_prints_one_paragraph_and_exits_with_2(converted, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(recipe_for(text)))
    words = ["train", converted, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out"]
    changed = "--set", "train.distil.batch=6", "--set", "train.distil.micro_batch=4"
    assert command_line(monkeypatch, *words, *changed) == 2
    assert "micro_batch" in capsys.readouterr().err
    assert command_line(monkeypatch, *words, "--set", f"train.distil.tokens={4 * T}", "--stage", "distil") == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.slow
def test_launched_processes_say_what_is_wrong_once(converted, text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(recipe_for(text, batch=3, micro_batch=3)))
    process = start("--model", converted, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out", launcher=TWO)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 1 and not output, "of the launcher"
    assert errors.count("it must be a multiple of 6") == 1 and "exitcode  : 2" in errors
    assert not list(tmp_path.glob("out*"))


def test_the_batch_must_divide_by_the_processes(converted, text, tmp_path, monkeypatch):
    monkeypatch.setattr(training.Accelerator, "num_processes", 3)
    with pytest.raises(InputError, match=r"train.distil.batch: found 4; with 3 processes .* multiple of 6"):
        train(converted, recipe_for(text), None, tmp_path / "out")
