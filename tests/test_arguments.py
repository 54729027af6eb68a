"""Arguments of the wrong type: one paragraph that names them, before anything is done."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model

import linearize
from linearize.errors import InputError

WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("convert", ("m",), {"layers": 5}, "layers: found 5"),
    ("convert", (None,), {}, "model: found None"),
    ("convert", ("",), {}, "model: found ''"),
    ("convert", ("m",), {"overwrite": "no"}, "overwrite: found 'no'; expected True or False"),
    ("convert", ("m",), {"set": 5}, "set: found 5"),
    ("convert", ("m",), {"set": "convert.mixer.window=1"}, "expected a list"),
    ("convert", ("m",), {"window": "8"}, "window: found '8'"),
    ("convert", ("m",), {"window": True}, "window: found True"),
    ("convert", ("m",), {"on_plan": 5}, "expected a function"),
    ("bench", ("m",), {"contexts": "abc"}, "contexts: found 'abc'"),
    ("bench", ("m",), {"contexts": [1.5]}, "contexts: found"),
    ("evaluate", ("m",), {"columns": 5}, "columns: found 5"),
    ("evaluate", ("m",), {"columns": []}, "not empty"),
    ("evaluate", ("m",), {"suite": []}, "not empty"),
    ("evaluate", ("m",), {"resume": "yes"}, "resume: found 'yes'"),
    ("train", (None, None), {}, "folder: found None"),
    ("train", ("m", "o"), {"stage": 5}, "stage: found 5"),
    ("train", ("m", "o"), {"flags": "--num_processes"}, "flags: found"),
    ("calibrate", ("m", "o"), {"tokens": 1.5}, "tokens: found 1.5"),
    ("select", ("m",), {"keep": "4"}, "keep: found '4'"),
    ("merge", (None, "o"), {}, "folder: found None"),
    ("report", ([],), {}, "not empty"),
    ("report", ([None],), {}, "files: found [None]"),
    ("check", (5,), {}, "files: found 5"),
    ("inspect", ("a\0b",), {}, "folder: found"),
    ("push", ("m", None), {"dry_run": True}, "repo: found None"),
    ("generate", ("m", []), {}, "prompt: found []"),
    ("generate", ("m", "x"), {"temperature": "hot"}, "temperature: found 'hot'"),
    ("load", ("m",), {"dtype": 5}, "dtype: found 5"),
    ("linearize_", ("m", {"name": "gla"}), {}, "expected a PreTrainedModel"),
    ("build_config", ("gla",), {}, "expected a mapping"),
    ("doctor", (5,), {}, "folder: found 5"),
]


@pytest.mark.parametrize(("verb", "args", "options", "expected"), WRONG)
def test_wrong_types(verb: str, args: tuple[Any, ...], options: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as error:
        getattr(linearize, verb)(*args, **options)
    assert str(error.value).startswith(f"{verb}: ") and expected in str(error.value)


def test_a_mixer_is_a_mapping() -> None:
    with pytest.raises(InputError, match="mixer: found 'gla'; expected a MixerConfig or a mapping"):
        linearize.linearize_(tiny_model(layers=2), "gla")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("repo", ["a b", "", "../x", "a/b/c"])
def test_names_of_repositories(repo: str, converted: Path) -> None:
    with pytest.raises(InputError, match="name of a repository"):
        linearize.push(converted, repo, dry_run=True)


def test_what_stands_for_a_type_is_taken(llama_folder: Path, converted: Path, tmp_path: Path) -> None:
    """Numbers of numpy, iterators, other path classes and dtypes of torch."""
    options: dict[str, Any] = {"window": np.int64(8), "layers": np.array([0, 1]), "overwrite": np.bool_(False)}
    made = linearize.convert(llama_folder, tmp_path / "o", set=iter(["convert.mixer.sinks=2"]), **options)
    assert isinstance(made, Path)
    model, tokenizer = linearize.load(converted, dtype=torch.bfloat16, device=torch.device("cpu"))
    stream = io.StringIO()
    linearize.generate(model, "x", tokenizer=tokenizer, stream=stream, max_new_tokens=1, temperature=0, raw=True)
    assert linearize.convert is linearize.convert


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"mixer": "gla"}, "convert.mixer.name=kda"),
        ({"window": 8}, "convert.mixer.window=9"),
        ({"dtype": "float32"}, "convert.dtype=bfloat16"),
    ],
)
def test_a_flag_and_an_override_do_not_contradict(options: dict[str, Any], change: str, llama_folder: Path) -> None:
    with pytest.raises(InputError, match="one key is given two values"):
        linearize.convert(llama_folder, "o", set=[change], dry_run=True, **options)
