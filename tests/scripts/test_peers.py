"""The comparison with kvpress, with its presses played by the source: what is asked, counted and compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluation import student_of
from helpers.scripts import SCRIPTS, runner
from helpers.tiny import save_source, tiny_tokenizer
from transformers import AutoModelForCausalLM

from linearize.evaluation import recall


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


def test_an_outcome_is_that_of_greedy_decoding() -> None:
    import peers_kvpress as kvpress

    logits = torch.zeros(5, 10)
    logits[[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]] = 1  # after token i comes i + 3
    item = {"ids": [0, 3, 4, 9, 6], "spans": [[1, 3], [3, 5]]}
    assert kvpress.outcome(logits, item) == {"score": 0.5}
    loss = kvpress.outcome(logits, {"ids": item["ids"]})["loss"]
    one, none = (torch.tensor(9 + torch.e).log() - x for x in (1, 0))
    assert loss == pytest.approx(float((3 * one + none) / 4), rel=1e-5)


def test_a_question_stands_behind_its_context() -> None:
    import peers

    tokenizer = tiny_tokenizer()
    for task in ("needle", "mqar", "multiquery"):
        asked = [*peers.questions(tokenizer, task, 400, 16, 4, 0)]
        assert len(asked) == 4 and {item["depth"] for item in asked} == ({0.0, 0.5} if task == "needle" else {None})
        for item, made in zip(asked, recall.items(task, tokenizer, 400, 0, 2, 0.0), strict=False):
            assert item["context"] + item["ids"] == tokenizer(made.text)["input_ids"]
            answers = [tokenizer.decode(item["ids"][start:end]) for start, end in item["spans"]]
            assert answers == [answer for _, answer in made.steps]
            assert answers[0] not in tokenizer.decode(item["ids"][: item["spans"][0][0]])


def test_everybody_answers_the_same_items_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peers
    import peers_kvpress as kvpress

    source = save_source(tmp_path / "source", layers=2, max_position_embeddings=1024)
    student = student_of(source, tmp_path / "student", window=8)
    plain, started = AutoModelForCausalLM.from_pretrained(source).eval(), []

    @torch.inference_mode()
    def played(python: str, *arguments: str) -> str:
        if not arguments[0].endswith("peers_kvpress.py"):
            return "kvpress 1\n"
        task: dict[str, Any] = json.loads(arguments[1])
        started.append(task)
        lines = []
        for item in json.loads(Path(task["items"]).read_text()):
            logits = plain(torch.tensor([item["context"] + item["ids"]])).logits[0, len(item["context"]) :]
            answer = {"id": item["id"], **kvpress.outcome(logits, item)}
            lines += [answer | {"system": name} for name in ("full cache", "P")]
        Path(task["answers"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return ""

    monkeypatch.setattr(peers, "in_their_environment", played)
    run = runner("peers", tmp_path, monkeypatch)
    options = ["--python", "python", "--lengths", "300", "--items", "4", "--blocks", "3", "--tasks", "needle", "mqar"]
    results = run(student, *options, "--work", tmp_path / "work")
    cells = {(cell["system"], cell["task"]): cell for cell in results["cells"]}
    assert {key: cell["n"] for key, cell in cells.items()} == {
        (system, task): n
        for system in ("full cache", "P", "linearize")
        for task, n in (("needle", 4), ("mqar", 4), (peers.TEXT, 3))
    }
    assert cells["P", peers.TEXT]["value"] == 0 != cells["linearize", peers.TEXT]["value"]
    # 2 layers, 2 heads of 16 for keys and for values, 2 bytes
    assert results["kept"] == started[0]["kept"] == results["bytes"] // (2 * 2 * (16 + 16) * 2)
    (file,) = (tmp_path / "work").glob("linearize-*.jsonl")
    before = file.read_text()
    assert before.count("\n") == 11
    file.write_text("".join(before.splitlines(keepends=True)[:5]))
    assert run(student, *options, "--work", tmp_path / "work", "--only", "ours")["cells"] == results["cells"]
    assert file.read_text() == before and len(started) == 1
    assert "| linearize |" in (tmp_path / "tiny.md").read_text()
