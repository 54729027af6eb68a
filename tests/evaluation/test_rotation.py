"""Options in all rotations: numbers of a plain loop, a scorer that always says A, tasks that cannot rotate."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer

from linearize.errors import InputError
from linearize.evaluation import rotation
from linearize.evaluation import suite as suites
from linearize.evaluation import tasks as lm_eval_tasks
from linearize.evaluation.quiet import quiet
from linearize.evaluation.suite import TaskSpec
from linearize.progress import Bar
from linearize.recipe.resources import package_folder
from linearize.reporting import page
from linearize.results import file as results_file
from linearize.results.table import lay_out

TASK, LIMIT = "lettered_arc_easy", 5


@pytest.fixture(scope="module")
def loaded() -> lm_eval_tasks.Loaded:
    (entry,) = lm_eval_tasks.load([TaskSpec(TASK, metric="acc", label="ARC-e by letter", rotate=True)])
    return entry


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    packed = (package_folder("eval") / "data" / "arc_easy.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]


def score_of(scorer: lm_eval_tasks.Scorer, loaded: lm_eval_tasks.Loaded, limit: int = LIMIT) -> dict[str, Any]:
    with quiet():
        return lm_eval_tasks.run(scorer, loaded, limit, 0)


@torch.no_grad()
def letter_loss(model: Any, prompt: str, letter: str) -> float:
    tokenizer = tiny_tokenizer()
    ids, start = tokenizer(f"{prompt} {letter}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return -float(sum(logits[t - 1, ids[t]] for t in range(start, len(ids))))


def test_every_number_is_that_of_a_plain_loop(loaded: lm_eval_tasks.Loaded, items: list[dict[str, Any]]) -> None:
    model = tiny_model(layers=1)
    score = score_of(lm_eval_tasks.Scorer(model, tiny_tokenizer(), 4, Bar(False)), loaded)
    right, chosen = [], []
    for item in items[:LIMIT]:
        options, place = item["choices"]["text"], item["choices"]["label"].index(item["answerKey"])
        right.append([])
        for by in range(len(options)):
            turned = [options[(i + by) % len(options)] for i in range(len(options))]
            lines = [f"{letter}. {option}" for letter, option in zip("ABCDE", turned, strict=False)]
            prompt = "\n".join([item["question"].strip(), *lines, "Answer:"])
            losses = [letter_loss(model, prompt, letter) for letter, _ in zip("ABCDE", turned, strict=False)]
            chosen.append("ABCDE"[int(np.argmin(losses))])
            right[-1].append(turned[int(np.argmin(losses))] == options[place])
    found = score["rotation"]
    assert score["items"] == [float(scores[0]) for scores in right], "rotation 0 is the task itself"
    assert found["items"] == [np.mean(scores) for scores in right] and found["n"] == LIMIT
    assert found["accuracy"] == pytest.approx(np.mean([np.mean(scores) for scores in right]))
    assert found["stderr"] == pytest.approx(np.std([np.mean(scores) for scores in right], ddof=1) / LIMIT**0.5)
    assert found["consistent"] == np.mean([all(scores) for scores in right])
    assert found["letters"] == {letter: chosen.count(letter) / len(chosen) for letter in found["letters"]}
    assert found["most"] == max(found["letters"].values()) and sum(found["letters"].values()) == pytest.approx(1)
    assert len(chosen) == sum(len(item["choices"]["text"]) for item in items[:LIMIT]) > LIMIT


class AlwaysA(lm_eval_tasks.Scorer):
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(0.0 if request.args[1] == " A" else -1.0, False) for request in requests]


class Knows(lm_eval_tasks.Scorer):
    """Says the letter before which the right option stands in the prompt."""

    right: dict[str, str]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        def told(prompt: str, letter: str) -> bool:
            return f"\n{letter}. {self.right[prompt.splitlines()[0]]}\n" in prompt

        return [(0.0 if told(request.args[0], request.args[1].strip()) else -1.0, False) for request in requests]


def test_always_a_and_always_right(loaded: lm_eval_tasks.Loaded, items: list[dict[str, Any]], tmp_path: Path) -> None:
    arguments = (tiny_model(layers=1), tiny_tokenizer(), 4, Bar(False))
    scores = {"student": score_of(AlwaysA(*arguments), loaded, 24)}
    found, four = scores["student"]["rotation"], all(len(item["choices"]["text"]) == 4 for item in items[:24])
    assert four and found["letters"]["A"] == found["most"] == 1.0 and found["consistent"] == 0.0
    assert found["accuracy"] == 0.25 and set(found["items"]) == {0.25} and found["stderr"] == 0.0

    knows = Knows(*arguments)
    knows.right = {
        item["question"].strip(): item["choices"]["text"][item["choices"]["label"].index(item["answerKey"])]
        for item in items[:24]
    }
    scores["source"] = score_of(knows, loaded, 24)
    found = scores["source"]["rotation"]
    assert found["accuracy"] == found["consistent"] == 1.0
    assert found["letters"] == dict.fromkeys("ABCD", 0.25), "over all rotations every letter is right equally often"

    columns = {name: {"tasks": {TASK: scores[name]}, "seconds": 1.0} for name in ("source", "student")}
    results = {"schema": 1, "complete": True, "model": "m", "source": "s", "suite": "x", "columns": columns}
    results |= {"settings": {}, "environment": {}}
    results |= {"summary": {"average": {}, "recovery": {}, "memory": None, "paired": {}}}
    assert results_file.read(results_file.write(results, tmp_path / "r.json")) == results
    table = lay_out(results)
    assert table.rows[1:4] == [
        ["… mean of all rotations", "100.0 ± 0.0", "25.0 ± 0.0"],
        ["… right in every rotation", "100.0", "0.0"],
        ["… letter taken most often", "A, 25.0 %", "A, 100.0 %"],
    ]
    expected = "student takes A in 100.0 % of all rotations"
    assert [note for note in table.notes if "by letter" in note] == [
        f"ARC-e by letter (acc): answers depend little on the question: {expected}"
    ]
    text = page.render([results])
    assert expected in text and "Tasks answered by a letter, which are no part of the average" in text

    broken = json.loads(json.dumps(results))
    broken["columns"]["student"]["tasks"][TASK]["rotation"] |= {"most": None, "letters": {"A": "all"}}
    with pytest.raises(InputError, match=r"rotation\.letters\.A: found 'all'; .*rotation\.most: found None; "):
        results_file.validate(broken)


def test_few_shot_examples_are_the_same_for_every_model_that_is_asked() -> None:
    (entry,) = lm_eval_tasks.load([TaskSpec("embedded_arc_easy", fewshot=2)], seed=0)
    scorer = AlwaysA(tiny_model(layers=1), tiny_tokenizer(), 4, Bar(False))
    first, again = (score_of(scorer, entry)["prompts"] for _ in range(2))
    assert first == again
    with pytest.raises(InputError, match="cannot be rotated: it takes its examples from the items themselves"):
        lm_eval_tasks.load([TaskSpec(TASK, fewshot=2, rotate=True)])


class Words:
    """A task of MMLU's form by hand."""

    multiple_input = 0

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        lines = [f"{letter}. {option}" for letter, option in zip("ABCD", doc["choices"], strict=True)]
        return "\n".join([doc["question"], *lines, "Answer:"])

    def doc_to_choice(self, doc: dict[str, Any]) -> list[str]:
        return ["A", "B", "C", "D"]

    def doc_to_target(self, doc: dict[str, Any]) -> Any:
        return int(doc["answer"]) - 1 if str(doc["answer"]).isdigit() else doc["answer"]


@pytest.mark.parametrize(("answer", "expected"), [(2, [1, 4, 3]), ("2", ["1", "4", "3"]), ("B", ["A", "D", "C"])])
def test_the_answer_moves_however_it_is_named(answer: Any, expected: list[Any]) -> None:
    doc = {"question": "2 B or not?", "subject": "B", "year": 2, "choices": ["a", "b", "c", "d"], "answer": answer}
    turned = rotation.rotations(Words(), doc)
    assert [each["choices"] for each in turned] == [list("bcda"), list("cdab"), list("dabc")]
    assert [each["answer"] for each in turned] == expected
    assert all({**each, "choices": doc["choices"], "answer": answer} == doc for each in turned), "nothing else changed"
    assert rotation.rotations(Words(), {**doc, "answer": 7}) == []


def test_tasks_without_lettered_options_are_refused_at_once() -> None:
    for task in ("embedded_arc_easy", "embedded_piqa"):
        with pytest.raises(InputError, match=f"{task}: cannot be rotated: it does not show options by letters"):
            lm_eval_tasks.load([TaskSpec(task, rotate=True)])
    with pytest.raises(InputError, match="cannot be rotated: it is no multiple choice"):
        lm_eval_tasks.load([TaskSpec("embedded_lambada_openai", rotate=True)])


def test_rotations_are_asked_for_in_the_long_suites_alone() -> None:
    rotated = {name: [spec.task for spec in suites.load(name).tasks if spec.rotate] for name in suites.names()}
    asked = {name: tasks for name, tasks in rotated.items() if tasks}
    assert asked == {"paper": ["mmlu"], "full": ["mmlu"], "local": [TASK]}
