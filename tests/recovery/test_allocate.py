"""A budget of cache: turned into a number of clusters, and divided over the layers."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_source, tiny_model

import linearize
from linearize.checkpoint.budget import cache_of, sized
from linearize.errors import InputError
from linearize.formats import parse_bytes
from linearize.model.modeling import linearize_
from linearize.recovery.allocate import divide, errors
from linearize.reporting.choices import allocation

CLUSTERS = {"name": "clusters", "combine": "memory", "window": 8, "sinks": 2, "state_dtype": "int8"}


@pytest.mark.parametrize(
    ("text", "count"), [("8MiB", 8 << 20), ("7.5 MiB", 7.5 * 2**20), ("512k", 512 << 10), ("1000", 1000), (4096, 4096)]
)
def test_bytes_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "8 MB of cache", "1e9", True, "9" * 40, "MiB"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(ValueError, match="such as 8MiB"):
        parse_bytes(text)


def test_the_largest_number_that_fits():
    model = linearize_(tiny_model("llama", layers=2), CLUSTERS | {"clusters": 16})
    for budget in (60_000, 61_000, 100_000):
        number = sized(model.config, CLUSTERS, budget)["clusters"]
        sizes = [
            cache_of(model.config, dict.fromkeys(("0", "1"), CLUSTERS | {"clusters": number + more})) for more in (0, 8)
        ]
        assert sizes[0] <= budget < sizes[1] and number % 8 == 0


@pytest.mark.parametrize(
    ("mixer", "cache", "said"),
    [
        (CLUSTERS, 100, r"found 100; window, sinks and the smallest state \(clusters: 16\) of 2 layers take"),
        (CLUSTERS, "1GiB", "more than the source's own cache"),
        (CLUSTERS | {"clusters": 64}, 60_000, "beside convert.mixer.clusters 64: both decide the same"),
        ({"name": "gla"}, 60_000, "the state of gla has a fixed size: leave convert.cache out"),
    ],
    ids=["small", "large", "twice", "fixed"],
)
def test_budgets_that_are_refused(mixer, cache, said):
    model = linearize_(tiny_model("llama", layers=2), CLUSTERS | {"clusters": 16})
    with pytest.raises(InputError, match=said):
        sized(model.config, mixer, cache)


def test_bytes_go_where_they_lower_the_sum_most():
    """By hand: the second layer gains from one step, the first only from two at once, the third from none."""
    costs = {0: [10.0, 9.9, 2.0], 1: [5.0, 1.0, 0.9], 2: [1.0, 1.0, 1.0]}
    assert divide(costs, [16, 32, 48], 3 * 32) == {0: 48, 1: 32, 2: 16}
    assert divide(costs, [16, 32, 48], 3 * 16) == {0: 16, 1: 16, 2: 16}


def test_more_clusters_are_nearer_to_the_source():
    model = linearize_(tiny_model("llama", layers=2), CLUSTERS | {"clusters": 16})
    seen = errors(model, torch.randint(3, 384, (2, 120)), [16, 48, 128])
    for layer in seen.values():
        assert layer[0] > layer[1] > layer[2], "with 128, nothing has been merged but rounded"


def test_a_folder_is_divided_as_it_says(tmp_path: Path):
    source = save_source(tmp_path / "source", layers=3)
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Day {i}: the river rose and nobody minded much. " * 9}) for i in range(20))
    )
    settings = ["convert.mixer.state_dtype=int8", f"data.0.path={tmp_path / 'text.jsonl'}", "eval.suite=smoke"]
    recipe = {"mixer": "clusters", "window": 8, "sinks": 2, "cache": "90KiB"}
    folder = linearize.convert(str(source), tmp_path / "converted", set=settings, **recipe)
    equal = json.loads((folder / "config.json").read_text())["linearize"]["layers"]["0"]["clusters"]
    choice = linearize.allocate(folder, tmp_path / "out", tokens=480, seq_len=120, plot=tmp_path / "picture.png")
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["linearize"]["layers"]
    assert {layer: values["clusters"] for layer, values in layers.items()} == choice["sizes"]
    assert choice["equal"] == equal and choice["kl"][choice["better"]] == min(choice["kl"].values())
    assert all(size <= 90 << 10 for size in choice["cache"].values())
    assert "KL to the source" in allocation(choice) and (tmp_path / "picture.png").stat().st_size > 1000
    model, tokenizer = linearize.load(tmp_path / "out")
    ids = tokenizer("the river rose", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=30, do_sample=False).shape[1] == ids.shape[1] + 30
    with pytest.raises(InputError, match="clusters"):
        linearize.allocate(folder, tokens=480, seq_len=120, cache="1KiB")
