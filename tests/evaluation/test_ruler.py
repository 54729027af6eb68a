"""RULER's tasks of lm-eval that generate their items: by name, without a network, with the model's own tokenizer."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
from helpers.tiny import tiny_model, tiny_tokenizer

from linearize.errors import InputError
from linearize.evaluation import tasks
from linearize.evaluation.suite import TaskSpec
from linearize.model.modeling import linearize_
from linearize.progress import Bar

FOLDER = Path(lm_eval.tasks.__file__).parent / "ruler"  # spares the index of all tasks
OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
FIRST, SECOND = ("bcdfglmnprst", "aeiou")


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lm-eval's extra `ruler` brings: words, and no data of nltk, which only essays need."""
    words = [f"{a}{b}{c}{d}" for a in FIRST for b in SECOND for c in FIRST for d in SECOND]
    parts = {"noun": words[::3], "adjective": words[1::3], "verb": words[2::3]}
    known = {**parts, **{f"{name}s": part for name, part in parts.items()}}
    module: Any = ModuleType("wonderwords")
    module.RandomWord = lambda: SimpleNamespace(_categories=known)
    monkeypatch.setitem(sys.modules, "wonderwords", module)
    monkeypatch.setattr("nltk.download", lambda *_: False)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ruler.prepare_niah", raising=False)


def load(task: str, folder: Path, seed: int = 0) -> tasks.Loaded:
    (entry,) = tasks.load([TaskSpec(task)], FOLDER, str(folder), seed)
    return entry


@pytest.mark.slow
@pytest.mark.parametrize("task", OFFLINE)
def test_a_task_runs_by_name(task: str, packages: None, llama_folder: Path) -> None:
    entry = load(task, llama_folder)
    docs: list[Any] = [*entry.tasks[task].test_docs()]
    assert [doc["input"] for doc in docs] == [doc["input"] for doc in load(task, llama_folder).tasks[task].test_docs()]
    assert docs[0]["input"] != next(iter(load(task, llama_folder, 1).tasks[task].test_docs()))["input"]
    for doc in docs[:3]:
        assert len(tiny_tokenizer()(doc["input"])["input_ids"]) > 2500
        assert all(answer in doc["input"] for answer in doc["outputs"])
    model = linearize_(tiny_model(layers=1, max_position_embeddings=8192), {"name": "gla", "window": 16, "sinks": 2})
    score = tasks.run(tasks.Scorer(model.eval(), tiny_tokenizer(), 2, Bar(False)), entry, 2, 0)
    assert (score["metric"], score["n"], score["chance"]) == ("4096", 2, 0.0)
    assert score["items"] is not None and score["value"] == sum(score["items"]) / 2 and 0 <= score["value"] <= 1


@pytest.mark.parametrize("task", ["niah_single_1", "ruler_cwe"])
def test_a_package_that_is_missing_is_named_with_the_command(
    task: str, packages: None, monkeypatch: pytest.MonkeyPatch, llama_folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(InputError) as error:
        load(task, llama_folder)
    assert str(error.value) == (
        f"tasks: {task!r} needs the package wonderwords, which is not installed; run `pip install 'lm_eval[ruler]'`"
    )


def test_essays_need_a_network(packages: None, monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/paul_graham_essays' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        InputError, match="items of 'niah_single_2' could not be loaded .*paul_graham.*check the network"
    ):
        load("niah_single_2", llama_folder)


def test_code_beside_the_tokenizer_is_not_run(packages: None, llama_folder: Path, tmp_path: Path) -> None:
    """lm-eval opens it with trust_remote_code=True."""
    folder = tmp_path / "strange"
    shutil.copytree(llama_folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    settings = folder / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}})
    )
    load("ruler_fwe", folder)
    assert not (tmp_path / "ran").exists()
