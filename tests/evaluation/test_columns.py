"""Columns: the same models in any order, and sizes that an architecture keeps under names of its own."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluation import student_of
from helpers.tiny import save_source, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from linearize.checkpoint.sources import relocate
from linearize.conversion import probe
from linearize.errors import InputError
from linearize.evaluation import columns, run, speed
from linearize.evaluation.columns import Models, read_config
from linearize.evaluation.evaluate import evaluate
from linearize.evaluation.suite import BehaviourSpec, RecallSpec, Suite, TextSpec

NAMES = ("source", "window", "converted", "student", "student/window")


@pytest.fixture(scope="module")
def student(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_of(llama_folder, tmp_path_factory.mktemp("columns") / "student")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of a model with a vision tower, whose sizes stand in `text_config`."""
    folder = tmp_path_factory.mktemp("gemma")
    config = probe.shrink(CONFIG_MAPPING["gemma3"]())
    config.text_config.sliding_window, config.image_token_index, config.mm_tokens_per_image = 16, 7, 4
    config.text_config.vocab_size, config.text_config.max_position_embeddings = 384, 512
    config.vision_config.image_size, config.vision_config.patch_size = 32, 16
    assert not hasattr(config, "vocab_size") and not hasattr(config, "max_position_embeddings")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "source")
    tiny_tokenizer().save_pretrained(folder / "source")
    return student_of(folder / "source", folder / "student")


def opener(folder: Path) -> Models:
    config = read_config(folder)
    return Models(folder, config, relocate(config.linearize["source"]), "auto", "cpu", seed=0)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 63)[None], use_cache=False).logits


def test_the_order_of_columns_changes_nothing(student: Path, llama_folder: Path, monkeypatch: Any) -> None:
    """Every column after every other one, and the same one twice; source, window and converted share weights."""
    loads, original = [], Models._load
    monkeypatch.setattr(Models, "_load", lambda self, family: loads.append(family) or original(self, family))
    expected = {}
    for name in NAMES:
        with opener(student).column(name) as model:
            expected[name] = logits(model)
    assert torch.equal(expected["source"], logits(AutoModelForCausalLM.from_pretrained(llama_folder).eval()))
    assert len({round(float(each.sum()), 3) for each in expected.values()}) == len(NAMES)
    models = opener(student)
    loads.clear()
    for name in (*NAMES[2::-1], *(each for pair in itertools.product(NAMES[:3], repeat=2) for each in pair)):
        with models.column(name) as model:
            assert torch.equal(logits(model), expected[name]), name
    assert loads == ["source"]
    for name in ("student/window", "source", "student", "window", "student", "student"):
        with models.column(name) as model:
            assert torch.equal(logits(model), expected[name]), name
    assert loads == ["source", "student", "source", "student", "source", "student"]


def test_a_model_with_a_vision_tower_is_compared(gemma: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river rose in the night, and by the morning the field was under water.\n" * 200)
    suite = Suite(
        name="tiny",
        perplexity=[TextSpec(str(text), 48, 1)],
        behaviour=BehaviourSpec(prompts=1, tokens=2, kl_blocks=1, state=64),
        recall=RecallSpec(["needle"], [2, 40], items=1),
    )
    answer = evaluate(gemma, suite, columns=["source", "window", "student"], out=tmp_path / "r.json", progress=False)
    assert list(answer["columns"]) == ["source", "window", "student"]
    assert answer["columns"]["student"]["recall"][-1]["skipped"] == "the model's context is 512"
    models = opener(gemma)
    with models.column("student") as model:
        assert int(speed.prompt(model, 2000, seed=0).max()) == 383 and speed.learned_positions(model) is None
    # Of an architecture that names its sizes in another way.
    other = student_of(save_source(tmp_path / "gpt2", "gpt2", vocab_size=400), tmp_path / "wide")
    with pytest.raises(InputError, match="has 400 tokens and the student 384.* --against"):
        evaluate(gemma, suite, against=other, progress=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (Suite(name="a", perplexity=[TextSpec("wikitext2_valid", 4096, 1)]), "perplexity: blocks of 4096 tokens"),
        (Suite(name="b", behaviour=BehaviourSpec(state=4096)), "behaviour: the state's text of up to 4096 tokens"),
        (Suite(name="c", recall=RecallSpec(["nedle"], [1])), "recall: unknown task 'nedle'"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(
    kind: str, suite: Suite, message: str, gemma: Path, student: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    if kind == "gpt2":
        folder = student_of(save_source(tmp_path / "source", kind, layers=2), tmp_path / "student")
    else:
        folder = student if kind == "llama" else gemma
    for module, name in ((columns, "open_tokenizer"), (columns, "load"), (run, "identity"), (run, "Work")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("opened something"))
    with pytest.raises(InputError, match=message):
        evaluate(folder, suite, progress=False)
