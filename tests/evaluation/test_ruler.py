"""RULER's tasks of lm-eval that generate their items: by name, without a network, with the model's own tokenizer."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
from helpers.tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linearize.checkpoint.open import open_tokenizer
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
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has one token for each word: lm-eval's generators do not end where words take many."""
    made = tmp_path_factory.mktemp("words") / "model"
    shutil.copytree(llama_folder, made)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict.fromkeys(("unk_token", "pad_token", "eos_token"), "<unk>")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(made)
    return made


def load(task: str, folder: Path, seed: int = 0) -> tasks.Loaded:
    (entry,) = tasks.load([TaskSpec(task)], FOLDER, str(folder), seed)
    return entry


@pytest.mark.slow
@pytest.mark.parametrize("task", OFFLINE)
def test_a_task_runs_by_name(task: str, packages: None, folder: Path) -> None:
    entry, tokenizer = load(task, folder), open_tokenizer(folder)
    for doc in [*entry.tasks[task].test_docs()][:3]:
        assert 2500 < len(tokenizer(doc["input"])["input_ids"]) <= 4096
        assert all(answer in doc["input"] for answer in doc["outputs"])
    model = linearize_(tiny_model(layers=1, max_position_embeddings=8192), {"name": "gla", "window": 16, "sinks": 2})
    score = tasks.run(tasks.Scorer(model.eval(), tokenizer, 2, Bar(False)), entry, 2, 0)
    assert (score["metric"], score["n"], score["chance"], score["value"]) == ("4096", 2, 0.0, 0.0)


@pytest.mark.slow
def test_the_seed_decides_what_is_drawn(packages: None, folder: Path) -> None:
    first, same, other = (load("ruler_vt", folder, seed).tasks["ruler_vt"].test_docs() for seed in (0, 0, 1))
    assert [*first] == [*same] != [*other]


@pytest.mark.parametrize("task", ["niah_single_1", "ruler_cwe"])
def test_a_package_that_is_missing_is_named_with_the_command(
    task: str, packages: None, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(InputError) as error:
        load(task, folder)
    assert str(error.value) == (
        f"tasks: {task!r} needs the package wonderwords, which is not installed; run `pip install 'lm_eval[ruler]'`"
    )


def test_essays_need_a_network(packages: None, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/paul_graham_essays' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        InputError, match="items of 'niah_single_2' could not be loaded .*paul_graham.*check the network"
    ):
        load("niah_single_2", folder)


@pytest.mark.slow
def test_code_beside_the_tokenizer_is_not_run(packages: None, folder: Path, tmp_path: Path) -> None:
    """lm-eval opens it with trust_remote_code=True."""
    strange = tmp_path / "strange"
    shutil.copytree(folder, strange)
    (strange / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    settings = strange / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}})
    )
    load("ruler_fwe", strange)
    assert not (tmp_path / "ran").exists()
