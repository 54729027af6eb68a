"""Recipes: every shipped one is valid, what is left out has a default, and every problem of a file is named at once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny import TEXT, save_source
from transformers import AutoModelForCausalLM

from linearize.errors import InputError
from linearize.recipe import load as recipes
from linearize.recipe import resources, templates
from linearize.recipe.schema import Source, parse_layers

MINIMAL = {"source": {"id": "org/model"}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PHI = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": [1.0] * 6,
       "long_factor": [2.0] * 6, "original_max_position_embeddings": 512}  # fmt: skip
SHAPES = {
    "meta-llama/Llama-3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "meta-llama/Meta-Llama-3": ("llama", {}),
    "HuggingFaceTB/SmolLM2": ("llama", {"tie_word_embeddings": True}),
    "HuggingFaceTB/SmolLM3": ("smollm3", {"tie_word_embeddings": True}),
    "mistralai/Mistral-7B": ("mistral", {"sliding_window": 4096}),
    "Qwen/Qwen2.5": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen/Qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "google/gemma-3": ("gemma3_text", {"layers": 6, "tie_word_embeddings": True}),
    "microsoft/Phi-4-mini": ("phi3", {"rope_parameters": PHI, "tie_word_embeddings": True}),
}
"""How the id of a source begins -> its architecture, and what its configuration has beside sizes."""


def shape_of(name: str) -> tuple[str, dict]:
    source = recipes.load(name).source.id
    return next(shape for start, shape in SHAPES.items() if source.startswith(start))


def rehearsed() -> list:
    """One recipe of each file, device and architecture; all but the first of a file and device take too long here."""
    seen, chosen = set(), []
    for name in recipes.names():
        if recipes.load(name).status != "run":
            file, changes, _ = templates.find(name)
            kind = file, *(key for key in changes if key != "source.id")
            marks = [pytest.mark.slow] if kind in seen else []
            if (*kind, shape_of(name)[0]) not in seen:
                chosen.append(pytest.param(name, marks=marks))
            seen |= {kind, (*kind, shape_of(name)[0])}
    return chosen


def problems(values: dict, overrides=()) -> list[str]:
    with pytest.raises(InputError) as caught:
        recipes.from_dict(values, overrides, where="mine.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", templates.shipped())
def test_shipped_recipe_is_valid(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name, "the name a user types; the file must not carry another"
    assert recipe.description and recipe.train
    assert recipes.from_dict(recipes.to_dict(recipe)) == recipe
    results = resources.package_folder("eval") / "results"
    if recipe.status == "run":
        assert list(results.glob(f"{name}*.json")), "a recipe that says it was run must have its results committed"


@pytest.mark.parametrize("name", rehearsed())
def test_a_recipe_that_was_not_run_works_on_a_small_model_of_its_architecture(name: str, tmp_path: Path, monkeypatch):
    """Convert, two steps of each stage, merge, generate: with the recipe's own settings but for sizes."""
    from linearize.checkpoint.sources import locate
    from linearize.conversion.convert import convert
    from linearize.recovery.merge import merge
    from linearize.recovery.train import train

    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    model_type, changes = shape_of(name)
    # Four query heads to one of keys and values, head width × heads = hidden size: as all these sources have it.
    changes = {"layers": 2, "hidden_size": 64, "num_key_value_heads": 1, **changes}
    source = save_source(tmp_path / "source", model_type, **changes)
    small = {"source.id": str(source), "data.0.path": str(text)}
    for number, stage in enumerate(recipes.load(name).train):
        sizes = {"tokens": 4 * 128, "seq_len": 128, "batch": 2, "micro_batch": min(2, stage.micro_batch)}
        small |= {f"train.{number}.{key}": value for key, value in sizes.items()}
    wanted = recipes.load(name, small)
    converted = folder = convert(locate(str(source)), wanted, tmp_path / "converted")
    for stage in wanted.train:
        folder = train(folder, wanted, stage.name, tmp_path / stage.name)
        lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        # A random model of 384 tokens: ln 384 = 6 nats, more as its logits spread; a NaN stops the run.
        assert len(lines) == 2 and all(0 < line["lm" if stage.lm else "kl"] < 30 for line in lines)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (converted, merge(folder, tmp_path / "merged"))
    )
    assert all(
        layer["name"] == wanted.convert.mixer["name"] and layer["combine"] == wanted.convert.mixer["combine"]
        for layer in after.config.linearize["layers"].values()
    )
    weights = after.state_dict()
    changed = {key.split(".")[-2] for key, value in before.state_dict().items() if not torch.equal(value, weights[key])}
    roles = {role for stage in wanted.train for role in stage.peft.roles}
    assert changed == {"qkv_proj" if model_type == "phi3" and role != "o" else f"{role}_proj" for role in roles}
    assert after.generate(torch.arange(3, 90)[None], max_new_tokens=3, do_sample=False, eos_token_id=-1).shape[1] == 90


def test_the_models_of_the_readme_have_recipes() -> None:
    assert set(recipes.names()) >= {"smollm2-135m", "llama-3.2-1b", "llama-3-8b", "mistral-7b", "qwen3-8b"}
    assert not {"small", "4b", "8b"} & set(recipes.names())


def test_a_template_serves_its_models_and_others(tmp_path: Path) -> None:
    base, small = recipes.load("llama-3.1-8b"), recipes.load("llama-3.1-8b-24gb")
    assert base.source.id == "meta-llama/Llama-3.1-8B" == small.source.id and small.name == "llama-3.1-8b-24gb"
    assert base.train[0].seq_len == 2 * small.train[0].seq_len and base.convert == small.convert
    assert recipes.resolve("org/other-8B", recipe="8b") == replace(recipes.load("8b"), source=Source("org/other-8B"))
    assert recipes.resolve("llama-3.1-8b", ["convert.mixer.name=gla"]).convert.mixer["name"] == "gla"
    file = tmp_path / "mine.yaml"
    file.write_text(templates.find("8b").path.read_text())
    assert replace(recipes.load(file), name="8b") == recipes.load("8b")
    file.write_text("source: {id: org/model}\nmodels: 3\n")
    with pytest.raises(InputError, match="models: unknown key"):
        recipes.load(file)


def test_yaml_round_trip(tmp_path: Path) -> None:
    made = recipes.load("smollm2-135m", {"convert.layers": {"keep": [3, 1]}, "train.distil.peft": None})
    file = tmp_path / "other-stem.yaml"
    file.write_text(recipes.to_yaml(made))
    assert recipes.load(file) == made
    assert made.train[0].peft is None and made.convert.layers == {"keep": [1, 3]}


def test_defaults_for_a_bare_model() -> None:
    recipe = recipes.resolve("org/model")
    assert recipe.source.id == "org/model" and recipe.convert.mixer == recipes.DEFAULT_MIXER and recipe.train
    assert recipes.run_folder(recipe) == Path("runs/model")


@pytest.mark.parametrize(
    ("model", "name"),
    # Several recipes have these sources; a baseline or variant is never what a model gets unasked.
    [("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"), ("meta-llama/Meta-Llama-3-8B", "llama-3-8b")],
)
def test_the_id_of_a_shipped_source_finds_its_recipe(model: str, name: str) -> None:
    assert recipes.resolve(model) == recipes.load(name)


def test_a_default_is_declared_where_several_recipes_share_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is found by the whole id of the source, whatever the names of the recipes."""
    sources = [templates.source_of(name) for name in recipes.names() if len(templates.find(name).changes) < 2]
    assert {source for source in sources if sources.count(source) > 1} == set(recipes.DEFAULTS)
    assert all(recipes.load(name).source.id == source for source, name in recipes.DEFAULTS.items())
    assert recipes.default("meta-llama/meta-llama-3-8b").name == recipes.default("8B").name == ""
    monkeypatch.setattr(
        recipes, "source_of", {**dict.fromkeys(recipes.names(), ""), "qwen3-8b": "org/mistral-7b-qwen3-8b"}.get
    )
    monkeypatch.setattr(recipes, "load", lambda name, overrides: name)
    assert recipes.default("org/mistral-7b-qwen3-8b") == "qwen3-8b"


def test_recipe_of_another_model() -> None:
    recipe = recipes.resolve("folder/llama", ["train.distil.lr=0.1"], recipe="llama-3-8b")
    assert recipe.source == Source("folder/llama")
    assert replace(recipe, source=recipes.load("llama-3-8b").source) == recipes.load("llama-3-8b", ["train.0.lr=0.1"])


def test_overrides_by_number_name_and_into_defaults() -> None:
    recipe = recipes.from_dict(
        MINIMAL,
        [
            "convert.mixer.window=128",
            "convert.layers=0-2,7",
            "convert.dtype=bfloat16",
            "train.distil.peft.r=4",
            "train.0.lr=1e-3",
            "data.0.weight=2",
        ],
    )
    assert recipe.convert.mixer == {**recipes.DEFAULT_MIXER, "window": 128}
    assert recipe.convert.layers == [0, 1, 2, 7] and recipe.convert.dtype == "bfloat16"
    peft = recipe.train[0].peft
    assert peft is not None and (peft.r, recipe.train[0].lr, recipe.data[0].weight) == (4, 1e-3, 2.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", "all"),
        (3, [3]),
        ([2, 0, 2], [0, 2]),
        ("0-2,5", [0, 1, 2, 5]),
        ("keep:20,23", {"keep": [20, 23]}),
        ({"keep": "4-5"}, {"keep": [4, 5]}),
    ],
)
def test_ways_to_name_layers(given, expected) -> None:
    assert parse_layers(given) == expected


@pytest.mark.parametrize("given", ["", "none", [], [-1], "3-", {"kept": [1]}, {"keep": []}, True, [True], 1.5, None])
def test_layers_that_make_no_sense(given) -> None:
    (line,) = problems({**MINIMAL, "convert": {"layers": given}})
    assert line.startswith("mine.yaml: convert.layers: found ")


def test_every_problem_at_once() -> None:
    found = problems(
        {
            "source": {"idd": "x"},
            "convrt": 1,
            "status": "done",
            "convert": {"mixer": {"name": "glaa"}, "dtype": "fp32"},
            "data": [{"path": 3}],
            "train": [
                {"name": "A b", "lr": -1, "batchs": 3, "peft": {"rank": 1, "roles": ["q", "z"]}},
                {"lm": 0, "kl": 0, "batch": 3, "micro_batch": 2, "tokens": 5},
            ],
        }
    )
    keys = {line.removeprefix("mine.yaml: ").split(": ")[0] for line in found}
    assert keys == {
        "source.id",
        "source.idd",
        "convrt",
        "status",
        "convert.mixer.name",
        "convert.dtype",
        "data.0.path",
        "train.0.name",
        "train.0.lr",
        "train.0.batchs",
        "train.0.peft.rank",
        "train.0.peft.roles.1",
        "train.1",
    }
    text = "\n".join(found)
    assert "Did you mean 'convert'?" in text and "Did you mean 'gla'" in text and "Did you mean 'batch'" in text
    assert "found -1; input should be greater than 0" in text
    assert "3 is not a multiple of micro_batch 2; tokens 5 is less than one step" in text


def test_problems_of_the_mixer_are_reported_when_the_rest_is_fine() -> None:
    (line,) = problems({**MINIMAL, "convert": {"mixer": {"name": "gla", "windw": 3, "sinks": -1}}})
    assert "windw" in line and "Did you mean 'window'" in line and "sinks" in line


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({**MINIMAL, "train": [{"name": "a"}, {"name": "a"}]}, "two stages share a name"),
        ({**MINIMAL, "data": []}, "training needs at least one"),
        ({}, "source: missing"),
        ({"source": "org/model"}, "found 'org/model'"),
        ({**MINIMAL, "convert": 3}, "found 3"),
    ],
)
def test_wrong_shapes(values: dict, expected: str) -> None:
    assert expected in "\n".join(problems(values))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("peft.method", "lorra", "found 'lorra'; did you mean 'lora'"),
        ("optimizer", "adamm", "found 'adamm'; did you mean 'adamw'"),
        ("schedule", "infinit", "found 'infinit'; did you mean 'infinite'"),
        ("peft", {"roles": [], "mixer": False}, "nothing is trained"),
        ("mixer_lr", 0, "found 0; input should be greater than 0"),
        ("decay", 2, "found 2; input should be less than or equal to 1"),
    ],
)
def test_wrong_ways_to_train(key: str, value, expected: str) -> None:
    (line,) = problems(MINIMAL, {f"train.distil.{key}": value})
    assert line.startswith(f"mine.yaml: train.0.{key}: ") and expected in line


def test_phases_of_a_schedule_must_fit() -> None:
    (line,) = problems(MINIMAL, {"train.0.schedule": "infinite", "train.0.warmup": 0.5, "train.0.decay": 0.6})
    assert "together more than all steps" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.foo.lr=1", "there is no entry 'foo'. Available: 0, distil"),
        ("train.distil.lr.x=1", "train.distil.lr holds 0.0005, which has no keys below it"),
        ("train.distil.lr", "expected KEY=VALUE"),
        ("convert.mixr.window=2", "convert.mixr: unknown key. Did you mean 'mixer'?"),
        ("convert.mixer.window=[2", "not valid YAML"),
    ],
)
def test_wrong_overrides(override: str, expected: str) -> None:
    assert expected in "\n".join(problems(MINIMAL, [override]))


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown recipe 'lama-3-8b'. Did you mean 'llama-3-8b'"):
        recipes.load("lama-3-8b")


@pytest.mark.parametrize(
    ("text", "expected"), [("- 1", "found list"), ("a: [", "not valid YAML"), ("\x00", "not valid")]
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=expected):
        recipes.load(file)
    with pytest.raises(InputError, match="no such recipe file"):
        recipes.load(tmp_path / "absent.yaml")


def test_another_mixer_keeps_what_it_knows_and_takes_settings_of_its_own() -> None:
    mine = ["convert.mixer.window=32", "convert.mixer.gate_normalizer=8.0"]
    gla = recipes.load("smollm2-135m", mine)
    window = recipes.from_dict(recipes.to_dict(gla), ["convert.mixer.name=window"])
    assert window.convert.mixer["name"] == "window" and window.convert.mixer["window"] == 32
    assert "gate_normalizer" not in window.convert.mixer
    clusters = recipes.load("smollm2-135m", ["convert.mixer.clusters=96", "convert.mixer.name=clusters"])
    assert clusters.convert.mixer["clusters"] == 96 and clusters.convert.mixer["window"] == 64
    same = recipes.load("smollm2-135m", ["convert.mixer.name=gla", *mine])
    assert same.convert == gla.convert
    with pytest.raises(InputError, match="unknown mixer 'windo'. Did you mean 'window'"):
        recipes.load("smollm2-135m", ["convert.mixer.name=windo"])
    with pytest.raises(InputError, match="gate_normalizer: unknown key"):
        recipes.load("smollm2-135m", [*mine, "convert.mixer.name=window"])


def test_a_mixer_of_the_defaults_has_their_size_and_keeps_it_to_itself() -> None:
    chosen = {"clusters": 704, "state_dtype": "int4"}
    assert recipes.load("smollm2-135m", ["convert.mixer.name=clusters"]).convert.mixer.items() >= chosen.items()
    gla = recipes.load("smollm2-135m-best", ["convert.mixer.name=gla"]).convert.mixer
    assert gla["name"] == "gla" and not gla.keys() & chosen.keys()


def test_a_budget_of_cache_takes_the_place_of_a_size_that_nobody_gave_beside_it() -> None:
    for recipe in (
        recipes.load("smollm2-135m-best", ["convert.cache=4MiB"]),
        recipes.resolve("org/model", ["convert.cache=4MiB"]),
        recipes.with_flags("smollm2-135m", None, "clusters", {"convert.cache": "4MiB"}, []),
        recipes.from_dict({**MINIMAL, "convert": {"cache": "4MiB"}}),
    ):
        assert recipe.convert.cache == "4MiB" and "clusters" not in recipe.convert.mixer
        assert recipe.convert.mixer["state_dtype"] == "int4"
    both = ["convert.mixer.clusters=96"]
    for recipe in (
        recipes.load("smollm2-135m-best", ["convert.cache=4MiB", *both]),
        recipes.with_flags("smollm2-135m-best", None, None, {"convert.cache": "4MiB"}, both),
    ):
        assert recipe.convert.mixer["clusters"] == 96, "refused where it is converted: both decide the same"


def test_stage_by_name() -> None:
    recipe = recipes.load("smollm2-135m")
    assert recipe.stage() is recipe.train[0] and recipe.stage(recipe.train[0].name) is recipe.train[0]
    with pytest.raises(InputError, match="no training stage distill"):
        recipe.stage("distill")
    with pytest.raises(InputError, match="no training stage at all"):
        replace(recipe, train=()).stage()


@pytest.mark.parametrize(("name", "block"), [("fsdp2", "fsdp_config"), ("deepspeed_zero3", "deepspeed_config")])
def test_accelerate_config_is_understood(name: str, block: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = resources.package_folder("recipes") / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == 8 and config.mixed_precision == "no"
    assert config.fsdp_config.get("fsdp_version") == 2 or config.deepspeed_config["zero_stage"] == 3
    known = vars(launch_command_parser().parse_args(["-m", "linearize.cli"]))
    # accelerate passes unknown keys of these blocks over in silence: a misspelt one would change nothing.
    assert set(yaml.safe_load(file.read_text())[block]) <= set(known)
