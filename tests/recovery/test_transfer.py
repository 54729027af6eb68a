"""Transfer: what each layer loses, whose gradients are made, and the stage around it: divided, resumed, stopped."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import MIXER, tiny_model
from helpers.training import T, recipe_for, start, weights, without_times
from safetensors.torch import load_file

from linearize.checkpoint import adapters
from linearize.checkpoint.adapters import as_source
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recipe.schema import Peft
from linearize.recovery import loop as training_loop
from linearize.recovery.merge import merge
from linearize.recovery.monitor import read_log
from linearize.recovery.train import train
from linearize.recovery.transfer import transfer

ONLY = {"transfer": 1.0, "kl": 0.0}


def with_adapters(model, roles=("q", "k", "v", "o"), std=0.1):
    wrapped = adapters.attach(model, Peft(r=4, alpha=8, roles=roles))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=std)
    return wrapped.train()


def run(model, ids, learn=torch.Tensor.backward):
    with transfer(model, model, learn) as errors, as_source(model):
        model(input_ids=ids, use_cache=False)
    return errors


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


# --- the loss


def test_a_layer_equal_to_its_source_loses_nothing():
    model = with_adapters(linearize_(tiny_model(layers=2), {"name": "softmax", "combine": "none"}), std=0.0)
    errors = run(model, torch.randint(3, 300, (2, 30)))
    assert list(errors) == [0, 1] and all(error == 0 for error in errors.values())
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_losses_and_gradients_are_those_of_the_explicit_sum():
    model, ids = with_adapters(linearize_(tiny_model(layers=3), MIXER)), torch.randint(3, 300, (2, 30))
    calls, modules = {}, linearized_modules(model)

    def keep(module, args, kwargs, output):
        calls[module.layer_idx] = args, kwargs, output[0]

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    with as_source(model):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    expected = []
    for module in modules:
        args, kwargs, wanted = calls[module.layer_idx]
        miss = module(*args, **kwargs)[0] - wanted
        expected.append(sum(m.square().mean() / w.square().mean() for m, w in zip(miss, wanted, strict=True)))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    slopes = torch.autograd.grad(sum(expected), list(trained.values()))

    ended = run(model, ids)
    # fp32: sums against means.
    torch.testing.assert_close(torch.stack(list(ended.values())), torch.stack(expected).detach(), rtol=1e-5, atol=0)
    assert min(ended.values()) > 1e-4
    for (name, gradient), slope in zip(gradients(model).items(), slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-6, msg=name)


def test_only_what_is_trained_in_attention_gets_gradients_and_all_is_as_before():
    model = with_adapters(linearize_(tiny_model(layers=3), MIXER, layers=[0, 2]), ("q", "k", "v", "o", "mlp"))
    needed = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert list(run(model, torch.randint(3, 300, (1, 30)))) == [0, 2]
    assert set(gradients(model)) == {name for name in needed if "self_attn" in name}
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == needed
    assert model.training and all(m.training and m.branch == "all" for m in linearized_modules(model))
    assert not any(module._forward_hooks for module in linearized_modules(model))


def test_weights_of_the_mixer_learn_too():
    model = linearize_(tiny_model(layers=2), {**MIXER, "name": "delta_net"}).requires_grad_(False)
    gates = [module.mixer.gate.requires_grad_() for module in linearized_modules(model)]
    run(model, torch.randint(3, 300, (1, 30)))
    assert set(gradients(model)) == {f"model.layers.{i}.self_attn.mixer.gate" for i in range(2)}
    assert all(gate.grad.any() for gate in gates)


def test_a_layer_without_anything_to_learn_is_measured_only():
    model = linearize_(tiny_model(layers=2), MIXER).requires_grad_(False)
    assert all(error > 0 for error in run(model, torch.randint(3, 300, (1, 30))).values())
    assert not gradients(model)


@pytest.mark.parametrize("kind", ["gpt_neox", "phi3", "gemma3_text", "gpt_oss"])
def test_fused_projections_norms_and_sinks_need_nothing_of_their_own(kind):
    model = linearize_(tiny_model(kind), MIXER)
    model = with_adapters(model, ("o",) if kind in ("gpt_neox", "phi3") else ("q", "k", "v", "o"), std=0.0)
    errors = run(model, torch.randint(3, 300, (1, 30)))
    assert len(errors) == len(linearized_modules(model)) and all(0 < error < 10 for error in errors.values())
    assert any(gradient.any() for gradient in gradients(model).values())


# --- the stage


def transfers(folder: Path) -> torch.Tensor:
    return torch.tensor([line["transfer"] for line in read_log(folder / "train_log.jsonl")])


def test_a_stage_brings_each_layer_nearer_and_runs_no_other_loss(converted, text, tmp_path):
    train(converted, recipe_for(text, steps=30, lr=1e-2, **ONLY), None, tmp_path / "out")
    found = transfers(tmp_path / "out")
    assert found[-5:].mean() < 0.9 * found[:5].mean()
    keys = {"step", "tokens", "transfer", "lr", "grad_norm", "tokens_per_second"}
    assert set(read_log(tmp_path / "out" / "train_log.jsonl")[0]) == keys
    with pytest.raises(InputError, match="kl and transfer of train.distil learn from"):
        merged = merge(tmp_path / "out", tmp_path / "merged")
        train(merged, recipe_for(text, **ONLY), None, tmp_path / "again")


def test_how_a_step_is_divided_does_not_change_it(converted, text, tmp_path):
    mixed = {"transfer": 0.5, "kl": 1.0, "lm": 1.0, "beyond": 2.0, "steps": 2}
    train(converted, recipe_for(text, **mixed), None, tmp_path / "plain")
    train(converted, recipe_for(text, **mixed, micro_batch=1, gradient_checkpointing=True), None, tmp_path / "changed")
    for name in ("lm", "kl", "transfer", "grad_norm"):
        found, expected = (
            [line[name] for line in read_log(tmp_path / x / "train_log.jsonl")] for x in ("changed", "plain")
        )
        # fp32: only the order of additions differs.
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(converted, text, tmp_path):
    wanted = recipe_for(text, micro_batch=1, window_dropout=0.7, **ONLY)
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(wanted))
    launcher = (
        "-m torch.distributed.run --nproc_per_node 2 --master_port 0 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    )
    arguments = ("--recipe", tmp_path / "recipe.yaml", "--model", converted, "--out", tmp_path / "two")
    process = start(*arguments, launcher=tuple(launcher.split()))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0 and "2 x cpu" in errors, errors
    train(converted, wanted, None, tmp_path / "one")
    torch.testing.assert_close(transfers(tmp_path / "two"), transfers(tmp_path / "one"), rtol=1e-4, atol=0)
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=0, atol=1e-4)


def test_all_weights_can_learn_and_their_source_stays(converted, text, tmp_path):
    out = train(converted, recipe_for(text, steps=12, lr=1e-2, peft=None, **ONLY), None, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (converted, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("self_attn" in name for name in changed)
    assert transfers(out)[-3:].mean() < transfers(out)[:3].mean()


def test_bf16_agrees_to_its_precision(converted, text, tmp_path):
    for dtype in ("float32", "bfloat16"):
        train(converted, recipe_for(text, dtype=dtype, steps=2, **ONLY), None, tmp_path / dtype)
    # bf16 keeps 8 bits of outputs, of which the loss takes differences.
    torch.testing.assert_close(transfers(tmp_path / "bfloat16"), transfers(tmp_path / "float32"), rtol=2**-4, atol=0)


def stop_at(monkeypatch, last, folder, wanted, out):
    """Train until a step, which is interrupted."""
    step = training_loop.Loop.step

    def stop(loop, number, checkpoint):
        if number == last:
            raise KeyboardInterrupt
        return step(loop, number, checkpoint)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_loop.Loop, "step", stop)
        train(folder, wanted, None, out)


def test_an_interrupted_stage_resumes_to_the_same_bits(converted, text, tmp_path, monkeypatch):
    wanted = recipe_for(
        text, steps=7, transfer=1.0, lr=1e-2, window_dropout=0.7, watch=2, keep="loss",
        peft={"r": 4, "alpha": 8, "dropout": 0.1},
    )  # fmt: skip
    stop_at(monkeypatch, 6, converted, wanted, tmp_path / "resumed")
    assert (tmp_path / "resumed.training" / "best.safetensors").is_file()
    train(converted, wanted, None, tmp_path / "resumed", resume=True)
    train(converted, wanted, None, tmp_path / "whole")
    logs = [without_times(tmp_path / name / "train_log.jsonl") for name in ("resumed", "whole")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0] if "memory_gain" in line] == [2, 4, 6, 7]
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(tmp_path / "resumed").items())


def test_a_draw_of_windows_belongs_to_a_micro_batch(converted, text, tmp_path, monkeypatch):
    wanted = {"window_dropout": 0.5, "steps": 2, "save_every": 1}
    stop_at(monkeypatch, 2, converted, recipe_for(text, **wanted), tmp_path / "out")
    with pytest.raises(InputError, match=r"other settings \(micro_batch\)"):
        train(converted, recipe_for(text, **wanted, micro_batch=1), None, tmp_path / "out", resume=True)


def test_a_loss_that_is_not_finite_names_the_layer(converted, text, tmp_path, monkeypatch):
    step = training_loop.Loop.step

    def poison(loop, number, checkpoint):
        if number == 2:
            next(m for m in loop.plain.modules() if hasattr(m, "mixer") and m.layer_idx == 1).o_proj.weight.data[0] = (
                1e38
            )
        return step(loop, number, checkpoint)

    monkeypatch.setattr(training_loop.Loop, "step", poison)
    with pytest.raises(
        InputError, match=r"step 2 of 4: transfer .*not finite: transfer of layer 1, output of .*layers.1"
    ):
        train(converted, recipe_for(text, **ONLY), None, tmp_path / "out")


def test_a_stage_learns_from_something():
    with pytest.raises(InputError, match="lm, kl and transfer are all 0"):
        recipe_for(Path("x"), kl=0.0)
    assert recipe_for(Path("x"), **ONLY).train[0].seq_len == T
