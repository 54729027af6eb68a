"""Drafted by the student, the text is the source's: token for token, greedy and sampled, whatever is drafted."""

import io
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_source, tiny_model, tiny_tokenizer
from helpers.training import recipe_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import linearize
from linearize.checkpoint.open import load
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.errors import InputError
from linearize.generation import Chat, Lossless, generate
from linearize.generation.lossless import Pace
from linearize.model.branches import branches
from linearize.model.modeling import linearize_

W = 8
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
SAMPLED = {"do_sample": True, "top_k": 6, "temperature": 0.8, "eos_token_id": None, "pad_token_id": 2}


@pytest.fixture(scope="module", params=["gla", "clusters", "window"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return linearize_(tiny_model(layers=4), {"name": request.param, "window": W, "sinks": 2}, layers=[0, 1, 3]).eval()


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def written(model, ids: Tensor, tokens: int = 40, **how) -> list[int]:
    torch.manual_seed(5)
    output = model.generate(ids, max_new_tokens=tokens, return_dict_in_generate=True, **how)
    return output.sequences[0].tolist()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(length=st.integers(1, 4 * W), seed=st.integers(0, 99), always=st.sampled_from([None, 1, 2, 5, 12]))
@pytest.mark.parametrize(
    "how", [pytest.param(GREEDY, id="greedy"), pytest.param(SAMPLED, id="sampled", marks=pytest.mark.slow)]
)
def test_it_writes_what_the_source_writes(model, how: dict, length: int, seed: int, always: int | None) -> None:
    ids, drafting = prompt(length, seed), Lossless(model, always=always)
    with branches(model, "source"):
        expected = written(model, ids, **how)
    assert written(drafting, ids, **how) == expected
    counts = drafting.counts
    assert counts.written == 40 and counts.passes == 40 - counts.kept and counts.kept <= counts.drafted
    assert all(module.branch == "all" for module in drafting._switch._attentions)


def test_drafts_are_kept_and_save_passes(model) -> None:
    """An untrained student with a wide enough window is its source: every draft is kept."""
    same = linearize_(tiny_model(layers=2), {"name": "window", "window": 200, "sinks": 2}).eval()
    drafting = Lossless(same, always=4)
    written(drafting, prompt(20), 41, **GREEDY)
    assert drafting.counts.kept == drafting.counts.drafted and drafting.counts.per_pass > 4


def test_the_same_object_goes_on_from_text_to_text(model) -> None:
    drafting = Lossless(model, always=3)
    for seed in range(4):
        ids = torch.cat([prompt(12), prompt(5, seed)], 1)  # a beginning in common
        with branches(model, "source"):
            expected = written(model, ids, 20, **GREEDY)
        assert written(drafting, ids, 20, **GREEDY) == expected


# --- what is drafted, and when


def test_the_number_of_drafts_follows_costs_and_acceptance() -> None:
    assert Pace(step=0.1, draft=0.1).best() == 0  # the student is no faster
    assert Pace(step=0.1, draft=0.02, accepted=0.8).best() > 2
    assert Pace(step=0.1, draft=0.02, accepted=0.05).best() == 0
    few, many = Pace(step=0.1, draft=0.02, accepted=0.6), Pace(step=0.1, draft=0.02, accepted=0.95)
    assert few.best() < many.best() and few.gain(few.best()) > 1
    assert Pace(step=0.1, draft=0.02, token=0.1).best() < many.best()
    pace = Pace()
    for _ in range(200):
        pace.saw_answer(4, 2)  # the third is refused: two of three that were looked at are kept
    assert pace.accepted == pytest.approx(2 / 3, abs=0.02)


def test_it_stops_drafting_where_that_does_not_pay(model, monkeypatch: pytest.MonkeyPatch) -> None:
    drafting = Lossless(model)
    monkeypatch.setattr(Pace, "saw_pass", lambda self, tokens, seconds: setattr(self, "step", 1.0))
    monkeypatch.setattr(Pace, "saw_draft", lambda self, tokens, seconds: setattr(self, "draft", 2.0))
    written(drafting, prompt(20), 30, **GREEDY)
    assert drafting.counts.drafted == 0 and drafting._read == []  # the student has not even read the text


# --- folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lossless")
    save_source(root / "source", layers=3)
    (root / "text.txt").write_text("Anna brought the boat to the mill. " * 60)
    recipe = recipe_for(root / "text.txt")
    convert(locate(str(root / "source")), recipe, root / "converted")
    linearize.train(root / "converted", root / "adapters")
    linearize.merge(root / "adapters", root / "merged")
    return {name: root / name for name in ("source", "converted", "adapters", "merged")}


@pytest.mark.parametrize("name", ["converted", "adapters", "merged"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_any_folder_writes_what_its_source_writes(folders: dict[str, Path], name: str, temperature: float) -> None:
    text = "Anna brought the boat"
    source = AutoModelForCausalLM.from_pretrained(folders["source"]).eval()
    settings = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    expected = generate(source, text, tokenizer=tiny_tokenizer(), **settings)
    stream = io.StringIO()
    answer = generate(folders[name], text, lossless=True, stream=stream, **settings)
    assert answer.texts == expected.texts and stream.getvalue() == answer.texts[0] + "\n"
    assert answer.new_tokens == expected.new_tokens and answer.tokens_per_pass >= 1 == (expected.tokens_per_pass or 1)
    model, _ = load(folders[name])
    assert (Lossless.of(folders[name], model).source is not None) == (name == "merged")


def test_a_chat_is_drafted_turn_after_turn(folders: dict[str, Path]) -> None:
    source = AutoModelForCausalLM.from_pretrained(folders["source"]).eval()
    model, tokenizer = load(folders["adapters"])
    settings = {"max_new_tokens": 12, "temperature": 0}
    plain = Chat(source, tiny_tokenizer(), **settings)
    drafted = Chat(model, tokenizer, drafting=Lossless(model, always=3), **settings)
    for text in ("Hello", "And then?", "Who?"):
        assert drafted.say(text).texts == plain.say(text).texts


# --- what it refuses


def test_more_than_one_prompt(model) -> None:
    with pytest.raises(InputError, match="lossless: found 2 prompts; one at a time"):
        generate(model, ["a", "b"], tokenizer=tiny_tokenizer(), lossless=True, max_new_tokens=2)


def test_mixers_whose_drafts_cannot_be_taken_back() -> None:
    liger = linearize_(tiny_model(layers=1), {"name": "gla", "combine": "liger", "window": W}).eval()
    with pytest.raises(InputError, match="lossless: the mixers of this model"):
        Lossless(liger)
    with pytest.raises(InputError, match="lossless: llama is no linearized model"):
        Lossless(tiny_model(layers=1))


def test_it_is_measured(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = linearize.bench(folders["adapters"], lossless=True, contexts=[40, 200], steps=12, out=tmp_path / "r.json")
    assert [row["context"] for row in results["rows"]] == [40, 200]
    for row in results["rows"]:
        assert row["same"] and row["tie"] is None
        assert row["ratio"]["lossless"] > 0 and row["per_pass"]["lossless"] >= 1 and row["drafted"]["resumed"] >= 0
    assert (tmp_path / "r.json").exists()
    with pytest.raises(InputError, match="lossless writes one text at a time"):
        linearize.bench(folders["adapters"], lossless=True, batches=[2])
