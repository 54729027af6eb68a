"""Wanda: what is worth least goes, row by row or in groups, seen from the text."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_model
from helpers.training import recipe_for

from linearize.checkpoint.manifest import facts_of
from linearize.checkpoint.open import load
from linearize.checkpoint.quantize import linear_layers
from linearize.errors import InputError
from linearize.recovery.prune import least, parse_pattern, prune, prune_


def test_a_large_weight_on_a_silent_input_goes_first() -> None:
    weight = torch.tensor([[9.0, 1.0, -2.0, 3.0], [1.0, -4.0, 3.0, 2.0]])
    norms = torch.tensor([0.01, 1.0, 1.0, 1.0])
    assert least(weight, norms, 0.5, None).tolist() == [[True, True, False, False], [True, False, False, True]]
    assert least(weight, norms, 0.5, 2).tolist() == [[True, False, True, False], [True, False, False, True]]


@pytest.mark.parametrize(("sparsity", "share"), [("0.3", 0.3), ("2:4", 0.5), ("1:4", 0.75)])
def test_every_layer_gets_its_share(sparsity: str, share: float) -> None:
    model = tiny_model(layers=2).eval()
    zeros = prune_(model, torch.randint(4, 300, (2, 40)), *parse_pattern(sparsity))
    assert set(zeros) == set(linear_layers(model)) and "lm_head" not in zeros
    assert all(abs(each - share) < 0.02 for each in zeros.values())
    if ":" in sparsity:
        for layer in linear_layers(model).values():
            assert ((layer.weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 4 * share).all()


def test_it_costs_less_than_by_magnitude_alone() -> None:
    model, other = tiny_model(layers=2).eval(), tiny_model(layers=2).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.randint(4, 300, (4, 60))
    embedding = model.get_input_embeddings().weight.data
    embedding *= torch.linspace(0.01, 3, embedding.shape[1])  # channels that carry very different amounts
    other.get_input_embeddings().weight.data.copy_(embedding)
    with torch.no_grad():
        expected = model(ids).logits
        prune_(model, ids, 0.5)
        for layer in linear_layers(other).values():
            layer.weight.masked_fill_(least(layer.weight, torch.ones(layer.in_features), 0.5, None), 0)
        assert (model(ids).logits - expected).norm() < (other(ids).logits - expected).norm()


def test_a_folder_is_pruned_and_says_what_it_cost(converted: Path, text: Path, tmp_path: Path) -> None:
    out, made = prune(converted, recipe_for(text), tmp_path / "pruned", sparsity="2:4", tokens=256, seq_len=64)
    assert facts_of(out)["pruning"].items() >= made.items()
    assert abs(made["zeros"] - 0.5) < 0.01 and made["loss_before"] != made["loss_after"] > 0
    model, _ = load(out)
    assert all((layer.weight == 0).float().mean() >= 0.49 for layer in linear_layers(model).values())


@pytest.mark.parametrize("sparsity", ["0", "1", "1.0", "4:2", "0:4", "half", "-0.5", "nan"])
def test_what_is_no_sparsity_is_refused(sparsity: str) -> None:
    with pytest.raises(InputError, match="expected a share between 0 and 1, such as 0.5, or N:M"):
        parse_pattern(sparsity)


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="no multiple of 7"):
        prune_(tiny_model(layers=2), torch.randint(4, 300, (1, 8)), 2 / 7, 7)
