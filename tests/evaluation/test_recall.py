"""Generated recall tasks: exact lengths, answers that stand in the prompt, and scores equal to greedy decoding."""

import hashlib
import json
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import save_source, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from linearize.checkpoint.sources import locate
from linearize.errors import InputError
from linearize.evaluation import capacity, recall, stories, tasks
from linearize.evaluation import suite as suites
from linearize.evaluation.evaluate import evaluate
from linearize.evaluation.recall import Item
from linearize.evaluation.suite import CapacitySpec, RecallSpec, Suite, TaskSpec
from linearize.model.branches import branches
from linearize.model.modeling import linearize_
from linearize.progress import Bar
from linearize.recipe.resources import package_folder
from linearize.results import file as results_file
from linearize.results.table import lay_out

LENGTHS = (320, 901)
LONGER = {"cwe": (1201, 1502), "fwe": (701, 901)}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: blanks belong to words, and text begins with a token of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    words = [
        *stories.NOUNS,
        *stories.CITIES,
        *(word for part in stories.FILLER for text in part for word in text.split()),
    ]
    alphabet = [chr(code) for code in range(33, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words)] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers() -> list[PreTrainedTokenizerFast]:
    return [tiny_tokenizer(), word_tokenizer()]


# --- a reader that knows nothing but the prompt -----------------------------------------------------------------------


def read(task: str, prompt: str) -> str:
    """The answer, found by a plain program."""
    if task in ("cwe", "fwe"):
        context, question = prompt.split(" Question: ")
        named = re.split(r"They are|often are", question)[1].replace(" and", ",").split(",")
        counts = Counter(context.split()[8 if task == "fwe" else 7 :]).most_common(10)
        return " " + next(word for word, count in counts if f" {word}" not in named and count > 1)
    if task == "nolima":
        city = re.search(r"who lives in ([\w ]+) is$", prompt)
        assert city and prompt.count(city[1]) == 2  # in the question alone
        person = re.search(rf"(\w+) lives next to {stories.LANDMARKS[city[1]]}\.", prompt)
        assert person
        return f" {person[1]}"
    if task == "phonebook":
        return dict(re.findall(r"^(\w+ \w+):( \d{4})$", prompt, re.M))[prompt.splitlines()[-1].removesuffix(":")]
    if task == "multivalue":
        context, question = prompt.split(" Question: ")
        return [f" {code}" for code in re.findall(r"One secret code of \w+ is (\d+)\.", context)][question.count(",")]
    if task in ("needle", "multikey", "multiquery"):
        city = re.search(r"The secret code of (\w+) is$", prompt)
        assert city
        return re.findall(rf"The secret code of {city[1]} is( \d+)\.", prompt)[-1]
    if task == "mqar":
        return dict(re.findall(r"^(\w+ \w+):( \d\d)$", prompt, re.M))[prompt.splitlines()[-1].removesuffix(":")]
    if task == "copy":
        words = re.findall(r"The list of words is: ([a-z ]+)\.", prompt)[-1]
        assert prompt.endswith(f": {words.split()[0]}")
        return words.removeprefix(words.split()[0])
    if task == "variables":
        name = prompt.split()[-2]
        while not name.isdigit():
            name = dict(re.findall(r"\b([A-Z]) = (\w+)\.", prompt))[name]
        return f" {name}"
    rooms: dict[str, str] = {}
    holders: dict[str, str] = {}
    for person, room, taker, thing in re.findall(r"(\w+) went to the (\w+)\.|(\w+) took the (\w+)\.", prompt):
        if room:
            rooms[person] = room
        else:
            holders[thing] = taker
            assert taker in rooms  # nobody takes anything before it is known where
    asked = prompt.split("Where is ")[1].split("?")[0].removeprefix("the ")
    return f" {rooms[holders.get(asked, asked)]}"


@pytest.mark.parametrize("task", recall.TASKS)
def test_items_have_their_length_and_can_be_answered_from_the_prompt(
    task: str, tokenizers: list[PreTrainedTokenizerFast]
) -> None:
    answers = []
    for tokenizer in tokenizers:
        words = {word for part in stories.FILLER for text in part for word in text.split()}
        longest_word = max(len(tokenizer.tokenize(f"\n{word}.")) for word in words)
        for length in LONGER.get(task, LENGTHS):
            for depth in recall.depths(task):
                for twice in (False, True):
                    for item in recall.items(task, tokenizer, length, 0, 3, depth, twice):
                        whole = tokenizer(item.text)["input_ids"]
                        # The first word that does not fit is left out; a merge across its borders may save one more.
                        assert twice or length - longest_word - 2 < len(whole) <= length
                        assert len(whole) <= (2 if twice else 1) * length
                        assert item.prompt[item.context :].strip().startswith(("Question: ", "Again:"))
                        for before, answer in item.steps:
                            prompt, until = (tokenizer(text)["input_ids"] for text in (before, before + answer))
                            # Else its first or last token could not be predicted.
                            assert whole[: len(prompt)] == prompt and whole[: len(until)] == until
                            assert read(task, before) == answer
                        answers.append("".join(answer for _, answer in item.steps))
    # The same items at every length and depth, whatever the tokenizer, and not all the same.
    assert answers == answers[:3] * (len(answers) // 3) and len(set(answers)) > 1


@pytest.mark.parametrize("task", recall.DEEP)
def test_depth_is_where_the_fact_stands(task: str, tokenizers: list[PreTrainedTokenizerFast]) -> None:
    def place(depth: float) -> float:
        (item,) = recall.items(task, tokenizers[0], 1500, 0, 1, depth)
        context = item.prompt[: item.context]
        asked = item.prompt.split()[-2] if task != "phonebook" else item.prompt.splitlines()[-1]
        fact = re.search(rf"The secret code of {asked} is \d+\.|The list of words is: [a-z ]+\.|{asked} \d+", context)
        if task == "nolima":
            city = item.prompt.split(" who lives in ")[1].removesuffix(" is")
            fact = re.search(rf"\w+ lives next to {stories.LANDMARKS[city]}\.", context)
        assert fact
        head = context.index(":" if task == "phonebook" else ".") + 2  # does not count
        before, after = fact.start() - head, len(context) - fact.end()
        return before / (before + after)

    places = [place(depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    # A fact stands between two sentences, of which there are about thirty here.
    assert places == sorted(places)
    assert places == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0], abs=0.05)


def test_the_seed_decides_and_twice_doubles(tokenizers: list[PreTrainedTokenizerFast]) -> None:
    for task in recall.TASKS:
        length = LONGER.get(task, (400,))[0]
        made = recall.items(task, tokenizers[0], length, 0, 3)
        assert made == recall.items(task, tiny_tokenizer(), length, 0, 3)
        assert made[:2] == recall.items(task, tokenizers[0], length, 0, 2)
        assert len({item.prompt for item in made + recall.items(task, tokenizers[0], length, 1, 3)}) == 6
        for once, twice in zip(made, recall.items(task, tokenizers[0], length, 0, 3, twice=True), strict=True):
            lines = task in ("mqar", "phonebook")
            separator = "\n" if lines else " "
            context = once.prompt[: once.prompt.rindex("Again:" if lines else "Question:")]
            assert twice.prompt == context + once.prompt and context.endswith(separator)
            assert twice.answer == once.answer


def test_what_cannot_be_made_is_refused(tokenizers: list[PreTrainedTokenizerFast]) -> None:
    with pytest.raises(InputError, match="unknown task 'needel'. Did you mean 'needle'?"):
        recall.items("needel", tokenizers[0], 400, 0, 1)
    with pytest.raises(InputError, match=r"needs \d+ tokens or more, found 20; use longer prompts"):
        recall.items("needle", tokenizers[0], 20, 0, 1)
    for spec, problem in (
        (RecallSpec(["babbi"], [1]), "unknown task 'babbi'. Did you mean 'babi'?"),
        (RecallSpec([], [1]), "tasks is \\[\\]; expected at least one"),
        (RecallSpec(["copy"], [2, 2]), "multiples is \\[2, 2\\]; expected at least one, each once"),
        (RecallSpec(["copy"], [0]), "multiples is \\[0\\]; expected lengths in windows"),
    ):
        with pytest.raises(InputError, match=f"recall: {problem}"):
            recall.check(spec)


# --- scores -----------------------------------------------------------------------------------------------------------

W, S = 16, 2


def student(layers: int = 2, **changes: Any) -> Any:
    return linearize_(
        tiny_model(layers=layers, **changes), {"name": "gla", "combine": "memory", "window": W, "sinks": S}
    )


def written(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :])


def continued(model: Any, tokenizer: Any, count: int, tokens: int) -> list[Item]:
    """Prompts of different lengths with the answer that a model writes itself, which reads back as the same tokens."""
    found = []
    for number in range(200):
        prompt = recall.items("needle", tokenizer, 160 + 3 * number, number, 1)[0].prompt
        answer = written(model, tokenizer, prompt, tokens)
        whole = tokenizer(prompt + answer)["input_ids"]
        if len(whole) == len(tokenizer(prompt)["input_ids"]) + tokens and "\ufffd" not in answer:
            found.append(Item(prompt, answer))
        if len(found) == count:
            return found
    raise AssertionError("too few continuations that read back")


def test_the_score_is_that_of_greedy_decoding_and_the_memory_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Random models never find a code: here the right answers are what the model with its memory on writes."""
    model = student()
    own = continued(model, tokenizer, 5, 3)
    others = [Item(item.prompt, own[(i + 1) % 5].answer) for i, item in enumerate(own)]
    asked = [*own, *others, *recall.items("copy", tokenizer, 260, 0, 2)]
    for branch in ("all", "window"):
        with branches(model, branch):
            greedy = []
            for item in asked:
                prompt, whole = (tokenizer(text)["input_ids"] for text in (item.prompt, item.prompt + item.answer))
                out = model.generate(
                    torch.tensor([prompt]), max_new_tokens=len(whole) - len(prompt), do_sample=False,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
                greedy.append(float(out[0].tolist() == whole))
            seen: list[int] = []
            assert recall.right(model, tokenizer, asked, 5, seen.append) == greedy
            assert seen == [5, 5, 2]
            assert recall.right(model, tokenizer, asked, 1) == greedy
            if branch == "all":
                assert greedy[:5] == [1.0] * 5 and sum(greedy) < len(greedy)
            else:
                assert sum(greedy[:5]) < 5


def test_several_answers_count_by_their_share(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(layers=1)
    (own,) = continued(model, tokenizer, 1, 2)
    before = own.prompt + own.answer + " Again"
    ids = tokenizer(before, return_tensors="pt")["input_ids"]
    following = tokenizer.decode(model(ids).logits[0, -1].argmax())
    rows = [Item(own.prompt, own.answer, ((" Again", text),)) for text in (following, "%" if following != "%" else "&")]
    assert tokenizer(rows[0].text)["input_ids"][: ids.shape[1]] == ids[0].tolist()
    for size in (1, 2):
        assert recall.right(model, tokenizer, rows, size) == [1.0, 0.5]
    assert recall.summary([1.0, 0.5]) == {"value": 0.75, "stderr": 0.25, "n": 2, "items": [1.0, 0.5]}


def test_old_tasks_ask_what_they_asked() -> None:
    """Numbers measured with them stay comparable: hash of the prompts and answers as of the first version."""
    made = [item for task in recall.TASKS[:6] for item in recall.items(task, word_tokenizer(), 300, 0, 2, 0.5)]
    asked = repr([(item.prompt, item.answer) for item in made])
    assert hashlib.sha256(asked.encode()).hexdigest()[:16] == "7e73b7d521b7bfff"


# --- capacity ---------------------------------------------------------------------------------------------------------


def test_pairs_stand_beyond_the_window_and_are_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    for pairs in (3, 7, 40):
        made = capacity.items(tokenizer, pairs, 50, 0, 3)
        assert made == capacity.items(tokenizer, pairs, 50, 0, 3) and len({item.prompt for item in made}) == 3
        for item in made:
            context = item.prompt[: item.context]
            known = re.findall(r"^(\w+ \w+):( \d\d)$", context, re.M)
            assert len({key for key, _ in known}) == len(known) == pairs
            assert len(item.steps) == min(pairs - 2, 8)
            for before, answer in item.steps:
                assert dict(known)[before.splitlines()[-1].removesuffix(":")] == answer
            behind = context[context.rindex(known[-1][1]) + 3 :]
            assert len(tokenizer(behind)["input_ids"]) >= 50


def test_cells_of_capacity(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "right", lambda m, t, asked, size, advance: advance(len(asked)) or [1.0, 0.5])
    spec, seen = CapacitySpec([20, 5, 100], items=2), []
    sizes = {}
    for model in (tiny_model(layers=1, max_position_embeddings=900), student(1, max_position_embeddings=4096)):
        cells = capacity.measure(model, tokenizer, spec, W, 0, 2, seen.append)
        assert [cell["pairs"] for cell in cells] == [5, 20, 100][: len(cells)]
        assert all((cell["value"], cell["stderr"], cell["n"]) == (0.75, 0.25, 2) for cell in cells)
        sizes[len(cells)] = [cell["cache_bytes"] for cell in cells]
    assert sum(seen) == 2 * capacity.total(spec) == 12
    (grows, _), (same, *others) = sizes[2], sizes[3]  # the source cannot read 100 pairs
    assert grows < sizes[2][1] and others == [same, same]


def test_wrong_numbers_of_pairs() -> None:
    for pairs, problem in (([], "at least one"), ([5, 5], "each once"), ([2], "from 3 to"), ([9999], "from 3 to")):
        with pytest.raises(InputError, match=f"capacity: pairs is .*{problem}"):
            capacity.check(CapacitySpec(pairs))


def test_cells_and_what_does_not_fit(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is right about every second item, by construction."""
    monkeypatch.setattr(recall, "right", lambda m, t, asked, size, advance: advance(len(asked)) or [1.0, 0.0, 1.0, 0.0])
    model, seen = tiny_model(layers=1, max_position_embeddings=512), []
    spec = RecallSpec(["needle", "babi"], [1, 25, 32, 33], items=4)
    cells = recall.measure(model, tokenizer, spec, W, 0, 2, seen.append)
    assert sum(seen) == recall.total(spec) == 4 * 4 * (3 + 1)
    measured = {"value": 0.5, "stderr": pytest.approx((0.25 / 3) ** 0.5), "n": 4, "items": [1.0, 0.0, 1.0, 0.0]}
    assert cells[1:4] == [
        {"task": "needle", "length": 400, "multiple": 25, "depth": depth, **measured} for depth in recall.DEPTHS
    ]
    assert cells[-2] == {"task": "babi", "length": 512, "multiple": 32, "depth": None, **measured}
    empty = {"depth": None, "value": None, "stderr": None, "n": 0, "items": []}
    short = cells[0].pop("skipped")
    assert cells[0] == {"task": "needle", "length": 16, "multiple": 1, **empty}
    assert re.fullmatch(r"needs \d+ tokens or more, found 16; use longer prompts", short)
    assert cells[-1] == {
        "task": "babi", "length": 528, "multiple": 33, **empty, "skipped": "the model's context is 512"
    }  # fmt: skip
    twice = recall.measure(model, tokenizer, RecallSpec(["copy"], [16, 17], items=4, twice=True), W, 0, 2, seen.append)
    assert [cell["n"] for cell in twice] == [4, 4, 4, 0]
    without = recall.measure(model, tokenizer, RecallSpec(["copy"], [5], items=4), None, 0, 2, seen.append)
    assert without[0]["length"] == 5 * recall.WINDOW


def test_broken_weights_are_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(layers=1)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"recall: the model's prediction after \d+ tokens is not a number"):
        recall.right(model, tokenizer, recall.items("needle", tokenizer, 200, 0, 1), 1)


# --- a whole comparison -----------------------------------------------------------------------------------------------


def test_lm_eval_gives_the_same_number(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With answers that the model writes itself, every second one broken: a random model is never right else."""
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    own = continued(model, tokenizer, 4, 2)
    mixed = [item if i % 2 else Item(item.prompt, own[i - 1].answer) for i, item in enumerate(own)]
    original = recall.items
    asked: list[tuple] = []

    def items(*arguments: Any) -> list[Item]:
        asked.append(arguments[:1] + arguments[2:])
        assert original(*arguments)[0].prompt.startswith("Remember the codes")
        return mixed

    monkeypatch.setattr(recall, "items", items)
    (entry,) = tasks.load([TaskSpec("recall_needle")], model=str(llama_folder), seed=3)
    assert asked == [("needle", 1024, 3, 10, depth, False) for depth in recall.DEPTHS]
    score = tasks.run(tasks.Scorer(model, tokenizer, 2, Bar(False)), entry, None, 0)
    assert score["items"] == 3 * recall.right(model, tokenizer, mixed, 2)
    assert score["value"] == 0.5 and score["n"] == 12 and score["chance"] == 0.0


@pytest.mark.parametrize("path", sorted((package_folder("eval") / "tasks").glob("recall_*.yaml")), ids=lambda p: p.stem)
def test_every_recall_task_of_lm_eval_has_the_items_of_the_library(path: Path, llama_folder: Path) -> None:
    from lm_eval.tasks import TaskManager

    lengths = [1300, 1400]
    metadata = {"pretrained": str(llama_folder), "lengths": lengths, "items": 2, "seed": 5, "twice": True}
    manager = TaskManager(include_path=path.parent, include_defaults=False, metadata=metadata)
    task = manager.load([path.stem])["tasks"][path.stem]
    task.build_all_requests()
    name = path.stem.removeprefix("recall_")
    expected = [
        step
        for length in lengths
        for depth in recall.depths(name)
        for item in recall.items(name, tiny_tokenizer(), length, 5, 2, depth, True)
        for step in item.steps
    ]
    assert [instance.args for instance in task.instances] == expected


def test_there_is_an_lm_eval_task_for_each() -> None:
    found = {path.stem for path in (package_folder("eval") / "tasks").glob("recall_*.yaml")}
    assert found == {f"recall_{task}" for task in recall.TASKS}
    with pytest.raises(InputError, match="recall_needle: no tokenizer given"):
        tasks.load([TaskSpec("recall_needle")])


def test_a_comparison_with_recall(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", layers=2)
    model = AutoModelForCausalLM.from_pretrained(source)
    linearize_(
        model, {"name": "gla", "combine": "memory", "window": W, "sinks": S}, source=locate(str(source)).to_dict()
    )
    model.save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    pairs = CapacitySpec([5], items=2)
    suite = Suite(name="r", recall=RecallSpec(["mqar", "copy"], [1, 20], items=2), capacity=pairs)
    out = tmp_path / "r.json"
    names = ["student", "student/window"]
    answer = evaluate(tmp_path / "student", suite, out=out, columns=names[:1], progress=False)
    answer = evaluate(tmp_path / "student", suite, out=out, columns=names, resume=True, progress=False)
    assert results_file.read(out) == answer and list(answer["columns"]) == names
    assert [(cell["pairs"], cell["n"]) for cell in answer["columns"]["student/window"]["capacity"]] == [(5, 2)]
    cells = answer["columns"]["student"]["recall"]
    assert [(cell["task"], cell["length"], cell["depth"], cell["n"]) for cell in cells] == [
        *(("mqar", 16, None, 0), ("mqar", 320, None, 2), ("copy", 16, None, 0)),
        *(("copy", 320, depth, 2) for depth in recall.DEPTHS),
    ]
    with pytest.raises(InputError, match="recall: unknown task 'mqra'"):
        evaluate(tmp_path / "student", Suite(name="r", recall=RecallSpec(["mqra"], [1])), progress=False)


def test_the_table_shows_recall_by_length_and_why_cells_are_empty() -> None:
    def cell(task: str, length: int, value: float | None, **more: Any) -> dict:
        n = 0 if value is None else 2
        return dict(
            task=task, length=length, multiple=length // 64, depth=None, value=value, stderr=None, n=n, items=[], **more
        )

    columns = {
        "source": {
            "recall": [cell("mqar", 64, 1.0), cell("babi", 64, None, skipped="needs 80"), cell("babi", 256, 0.5)]
        },
        "student": {
            "recall": [cell("mqar", 64, 0.5), cell("babi", 64, None, skipped="needs 80"), cell("babi", 256, 0.25)]
        },
        "window": {},
    }
    content = {"schema": 1, "model": "m", "source": "s", "suite": "r", "environment": {}}
    content["columns"] = {name: {"tasks": {}, "seconds": 1.0, **column} for name, column in columns.items()}
    results_file.validate(content)
    table = lay_out(content)
    assert table.rows == [
        ["recall at 1 × window, 64 tokens", "100.0", "50.0", ""],
        ["recall at 4 × window, 256 tokens", "50.0", "25.0", ""],
    ]
    assert table.notes == [
        "recall: right answers in per cent, mean over tasks and depths, 2 items each: mqar, babi",
        "recall: not measured: babi at 64 tokens: needs 80",
    ]
    columns["source"]["recall"].append(cell("needle", 256, 0.25) | {"depth": 0.5, "stderr": 0.1})
    columns["source"]["recall"].append(cell("needle", 256, 0.9) | {"depth": 1.0})
    pairs = [{"pairs": n, "length": 9 * n, "cache_bytes": 2**20 * n, "n": 4, "items": []} for n in (2, 8)]
    columns["source"]["capacity"] = [
        each | {"value": v, "stderr": 0.1} for each, v in zip(pairs, (1, 0.5), strict=True)
    ]
    content["columns"] |= {name: {"tasks": {}, "seconds": 1.0, **column} for name, column in columns.items()}
    results_file.validate(content)
    table = lay_out(content)
    assert table.rows[1:] == [
        ["recall at 4 × window, 256 tokens", "55.0", "25.0", ""],
        ["… beyond the window", "37.5", "25.0", ""],
        ["recalled of 2 pairs", "100.0 ± 10.0", "", ""],
        ["recalled of 8 pairs", "50.0 ± 10.0", "", ""],
        ["… most pairs remembered", "4", "", ""],
    ]
    note = "pairs: right answers in per cent, 4 items each; cache behind the most pairs: source 8.00 MiB"
    assert table.notes[-1] == note
    broken = json.loads(json.dumps(content))
    del broken["columns"]["source"]["recall"][1]["skipped"], broken["columns"]["source"]["recall"][0]["n"]
    with pytest.raises(InputError) as error:
        results_file.validate(broken)
    assert "recall.0.n: missing" in str(error.value) and "recall.1: value: found None, and no `skipped`" in str(
        error.value
    )


# --- chosen positions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def choosing(llama_folder: Path) -> tasks.Scorer:
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    return tasks.Scorer(model, tiny_tokenizer(), 8, Bar(False))


LETTERED = """
task: lettered
custom_dataset: !function items.load
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: ["A", "B", "C", "D"]
metric_list: [{metric: acc}]
"""


def test_always_the_same_letter_is_exposed(choosing: tasks.Scorer, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "lettered.yaml").write_text(LETTERED)
    (tmp_path / "items.py").write_text(
        "import datasets\n"
        "def load(**_):\n"
        "    rows = [{'question': f'Which of {i}?', 'answer': i % 4} for i in range(40)]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    (entry,) = tasks.load([TaskSpec("lettered")], tmp_path)
    monkeypatch.setattr(
        type(choosing),
        "loglikelihood",
        lambda self, requests, **_: [(-float(r.args[1] != " B"), False) for r in requests],
    )
    score = tasks.run(choosing, entry, None, 0)
    assert score["value"] == 0.25 and score["choices"] == {"chosen": [0, 40, 0, 0], "gold": [10, 10, 10, 10]}
    content = {"columns": {"student": {"tasks": {"lettered": score}}}, "environment": {}}
    assert lay_out(content).notes == [
        "lettered (acc), student: choice 2 of 4 is taken in 100.0 % of the items, and right in 25.0 %: its answers "
        "depend little on the question"
    ]
    for chosen, noted in (([20, 10, 10, 0], False), ([21, 10, 9, 0], True)):
        score["choices"]["chosen"] = chosen
        assert bool(lay_out(content).notes) == noted
    for chosen, noted in (([29, 11], False), ([31, 9], True)):
        score["choices"] = {"chosen": chosen, "gold": [20, 20]}
        assert bool(lay_out(content).notes) == noted
    score["choices"] = {"chosen": [19, 0], "gold": [9, 10]}
    assert lay_out(content).notes == []


@pytest.mark.parametrize(("task", "metric"), [("arc_challenge", "acc_norm"), ("winogrande", "acc")])
def test_positions_are_chosen_as_the_metric_chooses(
    choosing: tasks.Scorer, task: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Item by item, from the counts of the first n items and of one more."""

    def scores(self: Any, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [(-float(zlib.crc32(repr(request.args).encode()) % 1000), False) for request in requests]

    monkeypatch.setattr(tasks.Scorer, "loglikelihood", scores)
    (entry,) = tasks.load([TaskSpec(f"embedded_{task}", metric=metric)])
    before: dict[str, Counter[int]] = {"chosen": Counter(), "gold": Counter()}
    agreed = []
    for n in range(1, 13):
        score = tasks.run(choosing, entry, n, 0)
        counts = {kind: Counter(dict(enumerate(score["choices"][kind]))) for kind in before}
        assert all(counts[kind].total() == n for kind in counts)
        agreed.append(float(+(counts["chosen"] - before["chosen"]) == +(counts["gold"] - before["gold"])))
        before = counts
    assert agreed == score["items"] and 0 < sum(agreed) < 12


def test_free_answers_have_no_positions(choosing: tasks.Scorer) -> None:
    (entry,) = tasks.load([TaskSpec("embedded_lambada_openai")])
    assert tasks.run(choosing, entry, 2, 0)["choices"] is None


# --- suites -----------------------------------------------------------------------------------------------------------


def test_the_suites_name_tasks_that_exist() -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    for spec in suites.load("generation").tasks:
        files = folder.glob(f"{spec.task}/*.yaml")
        assert any(f"\ntask: {spec.task}\n" in f"\n{file.read_text()}" for file in files), spec.task
    for suite in ("recall", "full"):
        spec = suites.load(suite).recall
        assert spec is not None and tuple(spec.tasks) == recall.TASKS[:6] and spec.multiples[:5] == [1, 2, 4, 8, 16]
        recall.check(spec)
    whole = suites.load("recall-full")
    assert whole.recall is not None and tuple(whole.recall.tasks) == recall.TASKS and whole.capacity is not None
    recall.check(whole.recall)
    capacity.check(whole.capacity)
    assert suites.load("full").tasks == suites.load("paper").tasks
    assert suites.load("smoke").recall is None
