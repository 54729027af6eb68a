"""What each mixer is and costs: counted operations against counts made by hand and by torch."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from helpers.scripts import SCRIPTS
from helpers.tiny import save_source, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from linearize.conversion import costs
from linearize.model import ops
from linearize.model.attention import linearized_modules
from linearize.model.mixers import MIXERS, Geometry, build_config
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes

H, G, K, W, S = 4, 2, 16, 8, 3


def mixer(name: str, **values):
    return MIXERS[name](build_config({"name": name, "window": W, "sinks": S, **values}), Geometry(H, G, K, K))


def test_the_window_by_hand():
    """Scores and values of W + s slots and a softmax; the mask of the slots is one more number each."""
    slots = W + S
    assert costs.step_flops(mixer("window")) == 2 * H * slots * K * 2 + H * slots + slots
    assert costs.attention_flops(Geometry(H, G, K, K), 1000) == 2 * H * 1000 * K * 2 + H * 1000


def test_the_delta_rule_by_hand():
    """Alone, three products: k̂ᵀS, the write, and the read. torch misses the write, which is in place."""
    products = 2 * G * K * K + 2 * G * K * K + 2 * H * K * K
    made = mixer("delta_net", combine="none")
    with FlopCounterMode(display=False) as torchs:
        total = costs.step_flops(made)
    assert torchs.get_total_flops() == products - 2 * G * K * K
    unit = 3 * K + 2
    # k̄ (K), σ and its product with 1 for a token that exists; v − k̂ᵀS and its product with β; the mask of the slots
    assert total == products + H * unit + G * (unit + K + 2 + 2 * K) + W + S


def test_a_channel_wise_recurrence_by_hand():
    """No products at all: what torch's counter would call free costs about a dozen operations per channel."""
    made = mixer("rg_lru", combine="none")
    with FlopCounterMode(display=False) as torchs:
        total = costs.step_flops(made)
    assert torchs.get_total_flops() == 0
    # gate, decay, doubled, expm1, negated, clamped, root, times gate, times v, times present, exp, two of the state
    assert total == 13 * G * K + 2 * H * K + W + S


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("source"))


def test_costs_are_those_of_the_converted_model(source):
    priced = costs.costs(recipes.default(str(source), ["convert.mixer.window=8", "convert.layers=0-3"]))
    assert json.loads(json.dumps(priced)) == priced and priced["layers"] == 4
    assert set(priced["mixers"]) == set(MIXERS) - {"softmax"}
    assert priced["softmax"]["state_bytes"] == 4 * 8192 * 2 * (16 + 16) * 2
    for name in ("gla", "kda"):
        model = linearize_(tiny_model("llama"), {"name": name, "window": 8}, [0, 1, 2, 3])
        mixers = [m.mixer for m in linearized_modules(model)]
        row = priced["mixers"][name]
        assert row["new_weights"] == sum(p.numel() for m in mixers for p in m.parameters())
        assert row["state_bytes"] == sum(m.state_bytes(1, 2) for m in mixers)
    assert all(
        row["flops"] > priced["mixers"]["window"]["flops"] for n, row in priced["mixers"].items() if n != "window"
    )
    grid = costs.costs_table(priced)
    assert grid.row_count == 1 + len(priced["mixers"]) and source.name in str(grid.title)


def test_the_recipes_own_settings_count(source):
    own = ["convert.mixer.name=gla", "convert.mixer.combine=none", "convert.mixer.features=softmax"]
    none = costs.costs(recipes.default(str(source), own))
    # K×V fp32 in two heads of six layers, and the counter of tokens.
    assert none["mixers"]["gla"]["state_bytes"] == 6 * (2 * 16 * 16 * 4 + 8)


def test_every_recurrence_says_what_it_is():
    rows = costs.describe()
    assert list(rows) == list(MIXERS)
    for name, row in rows.items():
        assert row["about"] and row["rule"] and row["state"] and row["backends"][0] == "torch", name
        # Its own, not those of the class that it inherits code from.
        assert {"summary", "rule", "papers", "state"} <= vars(MIXERS[name]).keys(), name
        assert bool(row["papers"]) == (name != "softmax") and "arXiv" not in row["about"] + row["rule"]
    assert "S_t = (I − β_t k̂_t k̂_tᵀ) S_{t-1} + β_t k̂_t v_tᵀ" in rows["delta_net"]["rule"]
    assert rows["kda"]["papers"] == ["2510.26692"]
    assert rows["delta_net"]["state"] == "4·G·K·V bytes"
    assert costs.mixers_table(rows).row_count == len(rows)


@pytest.mark.slow
def test_it_says_so_without_docstrings_too():
    """python -OO strips them."""
    code = "import json; from linearize.conversion import costs; print(json.dumps(costs.describe()))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(costs.describe())), done.stderr


def test_the_evidence_is_that_of_the_committed_results():
    evidence = runpy.run_path(str(SCRIPTS / "mixer_evidence.py"))["evidence"]()
    assert evidence == json.loads(costs.EVIDENCE.read_text()), "run scripts/mixer_evidence.py"
    assert set(evidence) == {name for name, mixer in MIXERS.items() if mixer.recurrent}
    rows = costs.describe()
    assert rows["window"]["evidence"] is None
    assert rows["clusters"]["evidence"]["change"] < -0.2 and evidence["clusters"]["result"].startswith("trained: ")
    cells = dict(zip(rows, costs.mixers_table(rows).columns[3].cells, strict=True))
    assert "-31.6%: 29.98 for 43.80" in cells["clusters"].plain


def test_a_mixer_without_a_result_says_so(monkeypatch, tmp_path):
    (tmp_path / "evidence.json").write_text("{}")
    monkeypatch.setattr(costs, "EVIDENCE", tmp_path / "evidence.json")
    table = costs.mixers_table({name: row for name, row in costs.describe().items() if name in ("gla", "window")})
    assert sorted(cell.plain for cell in table.columns[3].cells) == ["a control", "not measured"]


def test_kernels_are_listed_where_they_run(monkeypatch):
    monkeypatch.setattr(costs, "_kernels_run_here", lambda: True)
    rows = costs.describe()
    assert rows["kda"]["backends"] == ["torch", "fla"]
    assert rows["rg_lru"]["backends"] == rows["rwkv7"]["backends"] == rows["pkda"]["backends"] == ["torch"]
    assert rows["gated_deltanet2"]["backends"] == ["torch", "fla"]
    assert not ops.has_kernels(lambda: torch.zeros(1))
