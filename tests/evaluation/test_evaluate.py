"""The comparison: every number recomputed another way, columns that are what they say, interruptions, bad input.

The tasks and texts are the embedded ones, cut short; the models are random: only agreement is tested, never quality.
"""

import gzip
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.evaluation import MIXER, S, W, student_of
from helpers.tiny import save_source, tiny_model, tiny_tokenizer
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation import perplexity, run
from linearize.evaluation import suite as suites
from linearize.evaluation import tasks as lm_eval_tasks
from linearize.evaluation.evaluate import evaluate
from linearize.evaluation.suite import Suite, TaskSpec, TextSpec
from linearize.evaluation.work import Options
from linearize.model.branches import branches
from linearize.model.modeling import linearize_
from linearize.recipe.resources import package_folder
from linearize.reporting import terminal
from linearize.results import file as results_file
from linearize.results import summary as statistics
from linearize.results.schema import COLUMNS

LIMIT = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the first pages of the embedded text: the whole of it takes a byte-level tokenizer seconds."""
    content = gzip.decompress((package_folder("eval") / "data" / "wikitext2_valid.txt.gz").read_bytes())
    file = tmp_path_factory.mktemp("text") / "pages.txt.gz"
    file.write_bytes(gzip.compress(content[:20_000].decode(errors="ignore").encode()))
    return str(file)


@pytest.fixture(scope="module")
def both(text: str) -> Suite:
    """Tasks and texts."""
    tasks = [TaskSpec("embedded_arc_easy", label="ARC-e"), TaskSpec("embedded_lambada_openai", metric="perplexity")]
    return Suite(name="tiny", tasks=tasks, perplexity=[TextSpec(text, 64, 2), TextSpec(text, 100, 2)])


@pytest.fixture(scope="module")
def text_only(text: str) -> Suite:
    return Suite(name="text", perplexity=[TextSpec(text, 64, 2)])


@pytest.fixture(scope="module")
def student(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_of(llama_folder, tmp_path_factory.mktemp("evaluate") / "student")


@pytest.fixture(scope="module")
def compared(student: Path, both: Suite, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All six columns of one run."""
    out = tmp_path_factory.mktemp("compared") / "results.json"
    answer = evaluate(student, both, out=out, limit=LIMIT, progress=False)
    assert results_file.read(out) == answer == json.loads(json.dumps(answer))
    assert list(out.parent.iterdir()) == [out]
    return answer


@pytest.fixture(scope="module")
def official() -> Callable[..., Any]:
    """`TaskManager` that reads lm-eval's own 14,000 tasks only once for all tests."""
    made: dict[str, Any] = {}

    def manager(include_path: Any = None, include_defaults: bool = True, metadata: Any = None) -> Any:
        key = str((include_path, include_defaults))
        if key not in made:
            made[key] = TASK_MANAGER(include_path=include_path, include_defaults=include_defaults, metadata=metadata)
        return made[key]

    return manager


TASK_MANAGER = lm_eval_tasks.TaskManager


# --- perplexity -------------------------------------------------------------------------------------------------------


def plain_loss(model: PreTrainedModel, ids: list[int], position: int) -> float:
    """-log p of the token at a position given the tokens before it, from a forward pass over those alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:position]]), use_cache=False).logits[0, -1].double()
    return float(torch.logsumexp(logits, 0) - logits[ids[position]])


def test_perplexity_buckets_equal_a_plain_loop(compared: dict[str, Any], student: Path, text: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    content = gzip.decompress(Path(text).read_bytes()).decode()
    ids = tiny_tokenizer()(content, add_special_tokens=False, verbose=False)["input_ids"]
    entry = compared["columns"]["student"]["perplexity"]
    assert [run["length"] for run in entry["texts"]] == [64, 100]
    for found in entry["texts"]:
        length, blocks = found["length"], found["blocks"]
        pieces = len(ids) // length
        starts = [(i * pieces // blocks) * length for i in range(blocks)]
        losses = [[plain_loss(model, ids[s : s + length], t) for t in range(1, length)] for s in starts]
        assert found["tokens"] == blocks * (length - 1)
        assert found["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
        ends = [bucket["end"] for bucket in found["by_position"]]
        assert ends == [16, 32, 64] + ([100] if length == 100 else [])
        for i, bucket in enumerate(found["by_position"]):
            inside = [row[t - 1] for row in losses for t in range(bucket["start"], bucket["end"])]
            assert bucket["tokens"] == len(inside)
            assert bucket["ppl"] == pytest.approx(math.exp(np.mean(inside)), rel=1e-5)
            means = [np.mean(row[bucket["start"] - 1 : bucket["end"] - 1]) for row in losses]
            assert [row[i] for row in found["losses"]] == pytest.approx(means, rel=1e-5)
    assert entry["value"] == entry["texts"][0]["value"] and entry["by_position"] == entry["texts"][1]["by_position"]


def test_blocks_are_spread_and_start_with_the_beginning_of_sequence_token_where_the_tokenizer_adds_one() -> None:
    tokenizer = tiny_tokenizer()
    text = "".join(chr(97 + i % 26) for i in range(260))
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = perplexity.cut(text, tokenizer, 20, 3)
    count = len(plain) // 20
    assert blocks.tolist() == [plain[i * count // 3 * 20 :][:20] for i in range(3)]

    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    count = len(plain) // 19
    expected = [[0, *plain[i * count // 3 * 19 :][:19]] for i in range(3)]
    assert perplexity.cut(text, tokenizer, 20, 3).tolist() == expected


@pytest.mark.parametrize(
    ("length", "window", "expected"),
    [
        (512, 64, [1, 64, 128, 256, 512]),
        (300, 64, [1, 64, 128, 256, 300]),
        (64, 64, [1, 64]),
        (32, 64, [1, 32]),
        (8, 1, [1, 2, 4, 8]),
        (200, None, [1, 64, 128, 200]),
    ],
)
def test_edges(length: int, window: int | None, expected: list[int]) -> None:
    assert perplexity.edges(length, window) == expected


# --- columns ----------------------------------------------------------------------------------------------------------


def value_of(model: PreTrainedModel, text: str) -> float:
    ids = perplexity.cut(suites.read_text(text)[0], tiny_tokenizer(), 64, 2)
    with torch.no_grad():
        return math.exp(model(input_ids=ids, labels=ids, use_cache=False).loss)


def test_each_column_is_the_model_that_it_says(
    compared: dict[str, Any], llama_folder: Path, student: Path, text: str
) -> None:
    """Against transformers' own loss, on models made here one by one."""

    def source() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(llama_folder).eval()

    trained = AutoModelForCausalLM.from_pretrained(student).eval()
    found = {name: column["perplexity"]["value"] for name, column in compared["columns"].items()}
    assert list(found) == [name for name in COLUMNS if name != "other"]
    assert found["source"] == pytest.approx(value_of(source(), text), rel=1e-5)
    window = linearize_(source(), {"name": "window", "window": W, "sinks": S})
    assert found["window"] == pytest.approx(value_of(window, text), rel=1e-5)
    assert found["converted"] == pytest.approx(value_of(linearize_(source(), MIXER), text), rel=1e-5)
    assert found["student"] == pytest.approx(value_of(trained, text), rel=1e-5)
    # Memory off: the student's own weights under the window control.
    alone = linearize_(
        AutoModelForCausalLM.from_pretrained(student).eval(), {"name": "window", "window": W, "sinks": S}
    )
    assert found["student/window"] == pytest.approx(value_of(alone, text), rel=1e-5)
    with branches(trained, "memory"):
        assert found["student/memory"] == pytest.approx(value_of(trained, text), rel=1e-5)
    assert len({round(value, 6) for value in found.values()}) == 6


def test_branches_switch_off_only_the_other_path(llama_folder: Path) -> None:
    """One layer, so that tokens reach later ones only through that layer's attention: by window or by memory."""
    config = tiny_model("llama", layers=1)
    model = linearize_(config, MIXER)
    T = 60
    ids = torch.randint(3, 300, (1, T))
    before, inside, sink = T - 1 - W - 5, T - 1 - 3, 0  # seen by the last token through: memory, window, sinks

    def last(branch: str, changed: int | None = None) -> torch.Tensor:
        other = ids.clone()
        if changed is not None:
            other[0, changed] = (other[0, changed] + 7) % 300
        with torch.no_grad(), branches(model, branch):
            return model(input_ids=other, use_cache=False).logits[0, -1]

    for branch, seen, unseen in (("window", (inside, sink), (before,)), ("memory", (before,), (inside, sink))):
        for position in unseen:
            assert torch.equal(last(branch), last(branch, position)), (branch, position)
        for position in seen:
            assert not torch.allclose(last(branch), last(branch, position), atol=1e-4), (branch, position)
    for position in (before, inside, sink):
        assert not torch.allclose(last("all"), last("all", position), atol=1e-4)


def test_prompts_are_the_same_in_all_columns(compared: dict[str, Any]) -> None:
    for task in ("embedded_arc_easy", "embedded_lambada_openai"):
        scores = [column["tasks"][task] for column in compared["columns"].values()]
        assert len({score["prompts"] for score in scores}) == 1 and {score["n"] for score in scores} == {LIMIT}
    assert compared["columns"]["student"]["tasks"]["embedded_arc_easy"]["chance"] == pytest.approx(0.25, abs=0.02)
    assert compared["columns"]["student"]["tasks"]["embedded_lambada_openai"]["chance"] is None


def test_the_environment_says_what_is_needed_to_repeat_the_run(
    compared: dict[str, Any], student: Path, text: str
) -> None:
    environment, settings = compared["environment"], compared["settings"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["seed"] == 0 and environment["threads"] == torch.get_num_threads()
    assert set(environment["data"]) == {text, "arc_easy.jsonl.gz", "lambada_openai.jsonl.gz"}
    assert all(len(digest) == 64 for digest in environment["data"].values())
    assert (settings["window"], settings["sinks"], settings["limit"], settings["dtype"]) == (W, S, LIMIT, "float32")
    assert len(settings["weights"]) == 64 and str(student.parent) not in json.dumps(settings)


def test_an_adapter_folder_is_evaluated_on_its_model(
    student: Path, text: str, text_only: Suite, tmp_path: Path
) -> None:
    from linearize.checkpoint import adapters
    from linearize.checkpoint.open import open_model
    from linearize.recipe.schema import Peft

    wrapped = adapters.attach(open_model(student), Peft(r=2, roles=["q", "v"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    trained = {name: weight.detach() for name, weight in wrapped.named_parameters() if weight.requires_grad}
    adapters.save(wrapped, trained, student, tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    answer = evaluate(tmp_path / "adapter", text_only, columns=["student", "student/window"], progress=False)
    adapted = answer["columns"]["student"]["perplexity"]["value"]
    assert adapted == pytest.approx(value_of(wrapped.eval(), text), rel=1e-5)
    assert adapted != pytest.approx(value_of(open_model(student).eval(), text), rel=1e-3)


# --- lm-eval ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_equal_those_of_the_lm_eval_command(compared: dict[str, Any], student: Path, tmp_path: Path) -> None:
    """The plain command, which never imports linearize, on the folder itself."""
    command = [
        *("--model", "hf", "--model_args", f"pretrained={student}", "--device", "cpu", "--batch_size", "8"),
        *("--include_path", str(package_folder("eval") / "tasks"), "--limit", str(LIMIT), "--seed", "0"),
        *("--tasks", "embedded_arc_easy,embedded_lambada_openai", "--output_path", str(tmp_path)),
    ]
    script = Path(sys.executable).with_name("lm_eval")
    environment = {**os.environ, "DISABLE_MULTIPROC": "1"}
    ended = subprocess.run([str(script), *command], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    theirs = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    ours = compared["columns"]["student"]["tasks"]
    assert ours["embedded_arc_easy"]["value"] == theirs["embedded_arc_easy"]["acc,none"]
    assert ours["embedded_arc_easy"]["stderr"] == theirs["embedded_arc_easy"]["acc_stderr,none"]
    assert ours["embedded_lambada_openai"]["value"] == theirs["embedded_lambada_openai"]["perplexity,none"]


@pytest.mark.parametrize(
    "path", sorted((package_folder("eval") / "tasks").glob("embedded_*.yaml")), ids=lambda path: path.stem
)
def test_embedded_tasks_ask_what_the_official_ones_ask(path: Path) -> None:
    """Whatever shapes a prompt or a score is the official task's, and every item can be read."""
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    name = path.stem.removeprefix("embedded_")
    official = next(
        file
        for file in Path(tasks.__file__).parent.glob("*/*.yaml")
        if file.stem == name or f"\ntask: {name}\n" in f"\n{file.read_text()}"
    )
    ours, theirs = load_yaml(path, resolve_func=True), load_yaml(official, resolve_func=True, recursive=True)
    shaping = {
        *("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "process_docs", "num_fewshot"),
        *("description", "target_delimiter", "generation_kwargs", "filter_list", "repeats"),
    }
    for key in shaping:
        if callable(ours.get(key)):
            assert ours[key].__code__.co_code == theirs[key].__code__.co_code
        else:
            assert ours.get(key) == theirs.get(key), key
    assert {entry["metric"] for entry in ours["metric_list"]} == {entry["metric"] for entry in theirs["metric_list"]}
    (loaded,) = lm_eval_tasks.load([TaskSpec(path.stem)])
    assert loaded.embedded is not None and len(loaded.item.eval_docs) > 500
    loaded.item.build_all_requests(limit=3)
    assert len(loaded.item.instances) >= 3


@pytest.mark.slow
def test_an_official_task_from_local_files_few_shot(
    student: Path, official: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the data set's name in the working directory takes the Hub's place."""
    import datasets

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", official)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "baber" / "piqa"
    local.mkdir(parents=True)
    items = gzip.decompress((package_folder("eval") / "data" / "piqa.jsonl.gz").read_bytes()).decode().splitlines()
    (local / "validation.jsonl").write_text("\n".join(items[:LIMIT]))
    (local / "train.jsonl").write_text("\n".join(items[LIMIT:40]))
    suite = Suite(name="official", tasks=[TaskSpec("piqa", fewshot=1), TaskSpec("embedded_piqa", metric="acc")])
    answer = evaluate(student, suite, out=tmp_path / "r.json", limit=LIMIT, columns=["student"], progress=False)
    tasks = answer["columns"]["student"]["tasks"]
    assert tasks["piqa"]["n"] == LIMIT and tasks["piqa"]["prompts"] != tasks["embedded_piqa"]["prompts"]


def test_unknown_tasks_and_items_out_of_reach(official: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", official)
    with pytest.raises(InputError, match=r"no 'arc_eesy' \(nearest: arc_easy, .* Suites: embedded, full,"):
        lm_eval_tasks.load([TaskSpec("arc_eesy")])
    with pytest.raises(InputError, match=r"items of 'winogrande' could not be loaded .*HF_HUB_OFFLINE"):
        lm_eval_tasks.load([TaskSpec("winogrande")])


GENERATED = """
task: {name}
custom_dataset: !function items.load
dataset_kwargs: {{count: {count}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{target}"
doc_to_choice: ["the", " mill", " was"]
{extra}
metadata: {{version: 1.0}}
"""
ITEMS = """
import datasets

def load(count, **_):
    return {"test": datasets.Dataset.from_list([{"text": f"The river {i}", "answer": i % 3} for i in range(count)])}
"""


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A user's own tasks: a group of two of different size, one that generates, one that scores whole texts."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "items.py").write_text(ITEMS)
    mean = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
    match = (
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "generation_kwargs: {until: ['x'], max_gen_toks: 4, do_sample: false}"
    )
    rolling = "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]"
    for name, kind, target, count, extra in (
        ("mine_small", "multiple_choice", "{{answer}}", 3, mean),
        ("mine_large", "multiple_choice", "{{answer}}", 9, mean),
        ("mine_generated", "generate_until", "nothing", 3, match),
        ("mine_rolling", "loglikelihood_rolling", "{{text}}", 3, rolling),
    ):
        text = GENERATED.format(name=name, kind=kind, target=target, count=count, extra=extra)
        if kind != "multiple_choice":
            text = "\n".join(line for line in text.splitlines() if not line.startswith("doc_to_choice"))
        (folder / f"{name}.yaml").write_text(text)
    (folder / "mine.yaml").write_text(
        "group: mine\ntask: [mine_small, mine_large]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (folder / "loose.yaml").write_text("group: loose\ntask: [mine_small, mine_large]\n")
    return folder


def test_groups_generation_and_whole_texts_from_a_folder_of_ones_own(
    student: Path, own_tasks: Path, tmp_path: Path
) -> None:
    def scores(*tasks: str) -> dict[str, Any]:
        answer = evaluate(
            student, list(tasks), out=tmp_path / "r.json", columns=["student"], include_path=own_tasks, progress=False
        )
        return answer["columns"]["student"]["tasks"]

    together = scores("mine", "mine_generated", "mine_rolling")
    assert list(together) == ["mine", "mine_generated", "mine_rolling"]
    apart = scores("loose")
    assert list(apart) == ["mine_small", "mine_large"]
    group = together["mine"]
    assert group["n"] == 12 and group["chance"] == pytest.approx(1 / 3)
    assert group["items"] == apart["mine_small"]["items"] + apart["mine_large"]["items"]
    assert group["value"] == pytest.approx(np.mean(group["items"]))
    assert together["mine_generated"]["chance"] == 0.0 and together["mine_generated"]["value"] == 0.0
    assert together["mine_rolling"]["chance"] is None and together["mine_rolling"]["items"] is None
    assert not together["mine_rolling"]["higher_is_better"]

    with pytest.raises(InputError, match="mine_small has no metric 'bleu'. Available: acc"):
        lm_eval_tasks.load([TaskSpec("mine", metric="bleu")], own_tasks)
    with pytest.raises(InputError, match="mine_small would run twice"):
        lm_eval_tasks.load([TaskSpec("mine_small"), TaskSpec("loose")], own_tasks)
    with pytest.raises(InputError, match="no such folder; --include-path"):
        lm_eval_tasks.load([TaskSpec("mine")], own_tasks / "nowhere")


# --- statistics -------------------------------------------------------------------------------------------------------


def test_summary_by_hand() -> None:
    def tasks(a: float, b: float) -> dict[str, Any]:
        common = {"stderr": 0.03, "higher_is_better": True}
        return {
            "arc": {**common, "value": a, "chance": 0.25, "items": None},
            "piqa": {**common, "value": b, "chance": 0.5, "items": None},
            "mmlu": {**common, "value": 0.9, "chance": 0.25, "items": None},
            "lambada": {**common, "value": 12.0, "chance": None, "items": None},
        }

    columns = {"source": {"tasks": tasks(0.65, 0.75)}, "student": {"tasks": tasks(0.45, 0.70)}}
    summary = statistics.summarize(columns, window=64)
    assert summary["average"]["source"] == {
        "value": pytest.approx(0.7),
        "stderr": pytest.approx(0.03 / 2**0.5),
        "tasks": 2,
    }
    # chance (0.25 + 0.5) / 2 = 0.375; (0.575 - 0.375) / (0.7 - 0.375)
    assert summary["recovery"] == {
        "student": {"raw": pytest.approx(0.575 / 0.7), "chance_corrected": pytest.approx(0.2 / 0.325)}
    }
    assert summary["memory"] is None and summary["paired"] == {"source": {"tasks": {}}}
    guessing = {"source": {"tasks": tasks(0.27, 0.51)}, "student": {"tasks": tasks(0.3, 0.5)}}
    assert statistics.summarize(guessing, 64)["recovery"]["student"]["chance_corrected"] is None
    assert statistics.recovery(0.5, 0.25, 0.25) is None
    assert statistics.summarize({"student": {"tasks": {}}}, None) == {
        "average": {},
        "recovery": {},
        "memory": None,
        "paired": {},
    }


def test_paired_intervals_have_the_width_that_theory_gives() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(0.1, 1.0, 400), rng.normal(0.3, 2.0, 900)]
    found = statistics.bootstrap(groups, seed=1)
    assert found["difference"] == pytest.approx(np.mean([group.mean() for group in groups]))
    error = math.sqrt(sum(group.var() / len(group) for group in groups)) / 2
    for bound, sign in (("low", -1), ("high", 1)):
        # The bound itself is known to about 3 % of the standard error with 2,000 resamples.
        assert found[bound] == pytest.approx(found["difference"] + sign * 1.96 * error, abs=0.15 * error)
    assert found == statistics.bootstrap(groups, seed=1) != statistics.bootstrap(groups, seed=2)


def test_every_number_of_the_summary_follows_from_the_columns(compared: dict[str, Any]) -> None:
    columns, summary = compared["columns"], compared["summary"]
    for name, entry in summary["average"].items():
        assert entry["value"] == pytest.approx(np.mean(columns[name]["tasks"]["embedded_arc_easy"]["items"]))
    for control, pair in summary["paired"].items():
        mine, theirs = (columns[name]["tasks"]["embedded_arc_easy"]["items"] for name in ("student", control))
        expected = np.mean(np.array(mine) - np.array(theirs))
        assert pair["average"]["difference"] == pytest.approx(expected)
        assert pair["tasks"]["embedded_arc_easy"]["low"] <= expected <= pair["tasks"]["embedded_arc_easy"]["high"]
        values = [math.log(columns[name]["perplexity"]["value"]) for name in ("student", control)]
        assert pair["loss"]["difference"] == pytest.approx(values[0] - values[1], abs=1e-6)
    assert set(summary["paired"]) == set(columns) - {"student"}
    memory = summary["memory"]
    for key, name in (("with", "student"), ("without", "student/window")):
        beyond = columns[name]["perplexity"]["by_position"][1:]
        loss = sum(math.log(bucket["ppl"]) * bucket["tokens"] for bucket in beyond) / sum(b["tokens"] for b in beyond)
        assert memory[key] == pytest.approx(math.exp(loss), rel=1e-6)
    assert memory["loss"] == pytest.approx(math.log(memory["without"] / memory["with"]), abs=1e-6)
    assert memory["start"] == W and memory["low"] <= memory["loss"] <= memory["high"]


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_what_is_finished(
    student: Path, both: Suite, compared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, original = tmp_path / "results.json", [], lm_eval_tasks.run

    def interrupted(scorer: Any, entry: Any, limit: Any, seed: Any) -> Any:
        calls.append(entry.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(scorer, entry, limit, seed)

    monkeypatch.setattr(lm_eval_tasks, "run", interrupted)
    names = ["source", "window", "student"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(student, both, out=out, limit=LIMIT, columns=names, progress=False)
    assert not out.exists()
    partial = results_file.read(tmp_path / ".results.json.partial")
    assert not partial["complete"] and list(partial["columns"]["window"]["tasks"]) == ["embedded_arc_easy"]

    with pytest.raises(InputError, match=r"other settings \(limit\).*leave out --resume"):
        evaluate(student, both, out=out, limit=LIMIT + 1, columns=names, resume=True, progress=False)
    answer = evaluate(student, both, out=out, limit=LIMIT, columns=names, resume=True, progress=False)
    assert calls[4:] == ["embedded_lambada_openai", "embedded_arc_easy", "embedded_lambada_openai"]
    for name in names:
        for part in ("tasks", "perplexity"):
            assert answer["columns"][name][part] == compared["columns"][name][part]

    # A complete file can grow by columns; half a column that nobody asks for again is no part of it.
    calls.append("next")
    more = evaluate(student, both, out=out, limit=LIMIT, columns=["converted"], resume=True, progress=False)
    assert calls[8:] == ["embedded_arc_easy", "embedded_lambada_openai"]
    assert list(more["columns"]) == ["source", "window", "converted", "student"] and results_file.read(out) == more


# --- what the user sees -----------------------------------------------------------------------------------------------


def test_the_terminal_shows_a_line_per_column_and_the_table(
    student: Path, both: Suite, compared: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate(student, both, out=tmp_path / "r.json", limit=2, columns="source,student")
    seen = capfd.readouterr()
    assert seen.out == "" and [line.split(":")[0] for line in seen.err.splitlines()] == ["source", "student"]
    terminal.show(compared)
    seen = capfd.readouterr()
    assert seen.err == "" and "ARC-e (acc)" in seen.out and "What the memory adds" in seen.out
    console = Console(width=60, record=True, file=io.StringIO())
    terminal.show(compared, console)
    assert all(len(line) <= 60 for line in console.export_text().splitlines())


def test_where_six_columns_just_fit_spaces_go_and_no_digit() -> None:
    results = results_file.read(Path(__file__).parents[2] / "eval" / "results" / "report-smollm2-135m.json")
    results["columns"]["student/memory"] = results["columns"]["student/window"]
    for width in (100, 150):
        console = Console(width=width, record=True, file=io.StringIO())
        terminal.show(results, console)
        text = console.export_text()
        assert all(len(line) <= width for line in text.splitlines()) and (" ± " in text) == (width == 150)
        for task in ("embedded_piqa", "embedded_lambada_openai"):
            for column in results["columns"].values():
                value, error = (100 * column["tasks"][task][key] for key in ("value", "stderr"))
                assert f"{value:.1f}±{error:.1f}" in text.replace(" ± ", "±")


@pytest.mark.parametrize("name", suites.names())
def test_shipped_suites_are_valid(name: str) -> None:
    suite = suites.load(name)
    assert suite.name == name and suite.description
    for spec in suite.perplexity:
        assert suites.read_text(spec.text)[0]


def test_suites_are_named_by_name_file_or_tasks(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("tasks: [{task: arc_easy, fewshot: 5}]\nlimit: 3\n")
    assert suites.load(str(file)) == Suite(name="own", tasks=[TaskSpec("arc_easy", fewshot=5)], limit=3)
    assert (
        suites.load("arc_easy, piqa").tasks
        == [TaskSpec("arc_easy"), TaskSpec("piqa")]
        == suites.load(["arc_easy", "piqa"]).tasks
    )
    assert suites.read_text(str(file)) == (file.read_text(), suites.read_text(str(file))[1])


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("tasks: [", ["cannot be read as YAML"]),
        ("[]", ["holds no mapping"]),
        ("limit: 3", ["has neither tasks, perplexity, recall, capacity, behaviour nor speed"]),
        ("columns: [studnet]\ntasks: [{task: a}]", ["unknown column 'studnet'. Did you mean 'student'"]),
        ("taks: 1\nlimit: 0\ntasks: [{metric: acc}]", ["taks: ", "limit: ", "tasks.0.task: "]),
    ],
)
def test_a_wrong_suite_file_names_all_its_problems(text: str, problems: list[str], tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        suites.load(tmp_path / "s.yaml")
    for problem in problems:
        assert f"s.yaml: {problem}" in str(error.value)


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(folder: Path | str, suite: Any = "smoke", **options: Any) -> str:
    with pytest.raises(InputError) as error:
        evaluate(folder, suite, **{"progress": False, **options})
    return str(error.value)


def test_bad_arguments(student: Path, llama_folder: Path, tmp_path: Path) -> None:
    assert "unknown suite 'smok'. Did you mean 'smoke'?" in refused(student, "smok")
    assert "cannot be read as YAML" in refused(student, tmp_path / "none.yaml")
    assert "unknown column 'converter'. Did you mean 'converted'?" in refused(student, columns=["converter"])
    assert "limit: found 0; expected at least 1" in refused(student, limit=0)
    assert "batch_size: found 0" in refused(student, batch_size=0)
    assert "dtype: 'floaty' is none" in refused(student, ["embedded_piqa"], dtype="floaty")
    assert "give a folder" in refused(tmp_path)
    assert "is a plain llama, not a linearized model" in refused(llama_folder)
    unknown = Suite(name="text", perplexity=[TextSpec("wikitext", 64, 1)])
    assert "unknown text 'wikitext'. Did you mean 'wikitext2_valid'?" in refused(student, unknown)
    assert "do not fit the model's context of 1024" in refused(
        student, Suite(name="text", perplexity=[TextSpec("wikitext2_valid", 2048, 1)])
    )
    assert "were asked for; use fewer or shorter blocks" in refused(
        student, Suite(name="text", perplexity=[TextSpec("wikitext2_valid", 1000, 10**6)])
    )
    assert not (student / "results.json").exists()


def test_another_student_is_measured_with_the_same_prompts(
    student: Path, llama_folder: Path, both: Suite, text_only: Suite, tmp_path: Path
) -> None:
    out, against = tmp_path / "results.json", student_of(llama_folder, tmp_path / "other", window=8)
    options = {"out": out, "limit": 2, "progress": False}
    alone = evaluate(against, both, columns=["student"], **{**options, "out": tmp_path / "alone.json"})
    before = evaluate(student, both, columns=["source", "student"], **options)
    # A finished file grows by the new column.
    answer = evaluate(student, both, columns=["student"], against=str(against), resume=True, **options)
    assert list(answer["columns"]) == ["source", "student", "other"] and results_file.read(out) == answer
    other, mine = answer["columns"]["other"], alone["columns"]["student"]
    assert other["model"] == str(against) and other["weights"] == alone["settings"]["weights"]
    assert other["tasks"] == mine["tasks"] and other["perplexity"]["value"] == mine["perplexity"]["value"]
    # Its buckets are the student's, whatever its own window is.
    assert [bucket["end"] for bucket in other["perplexity"]["by_position"]] == [16, 32, 64, 100]
    assert answer["columns"]["student"] == before["columns"]["student"]
    pair = answer["summary"]["paired"]["other"]
    values = [math.log(answer["columns"][name]["perplexity"]["value"]) for name in ("student", "other")]
    assert pair["loss"]["difference"] == pytest.approx(values[0] - values[1], abs=1e-6)
    assert set(pair["tasks"]) == {"embedded_arc_easy"}

    again = evaluate(student, both, columns=["student"], resume=True, **options)
    assert again["columns"]["other"] == other, "kept without being named again"
    message = refused(student, both, columns=["student"], against=str(student), resume=True, **options)
    assert "its column other was measured on another model" in message and str(against) in message
    assert "no other student; name one by --against" in refused(student, text_only, columns=["other"])
    assert "is a plain llama" in refused(student, text_only, against=str(llama_folder))
    larger = student_of(save_source(tmp_path / "larger", vocab_size=400), tmp_path / "wide")
    assert "--against takes a model of the same source" in refused(student, text_only, against=str(larger))


def test_what_pruning_cost_is_in_the_results(student: Path, text_only: Suite, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "pruned")
    pruning = {"sparsity": "2:4", "zeros": 0.5, "loss_before": 3.1, "loss_after": 3.6}
    (tmp_path / "pruned" / "linearize.json").write_text(json.dumps({"pruning": pruning | {"layers": 7}}))
    answer = evaluate(tmp_path / "pruned", text_only, columns=["student"], progress=False)
    assert answer["pruning"] == pruning
    results_file.validate(answer)


def test_a_source_that_does_not_belong_to_the_student(student: Path, text_only: Suite, tmp_path: Path) -> None:
    larger = save_source(tmp_path / "larger", vocab_size=400)
    assert "has 400 tokens and the student 384" in refused(student, text_only, source=str(larger))
    other = save_source(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = (vocabulary[letter] for letter in "ab")
    vocabulary |= {"a": b, "b": a}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizers that differ (for instance in [('a', " in refused(student, text_only, source=str(other))


def test_a_model_whose_numbers_are_broken(
    llama_folder: Path, own_tasks: Path, text_only: Suite, tmp_path: Path
) -> None:
    folder = student_of(llama_folder, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    expected = "prediction after 1 tokens is not a number"
    assert expected in refused(folder, text_only, columns=["student"])
    assert expected in refused(folder, ["mine_generated"], columns=["student"], include_path=own_tasks)
    (entry,) = lm_eval_tasks.load([TaskSpec("mine_small")], own_tasks)
    from linearize.progress import Bar

    with pytest.raises(InputError, match="the log-likelihood of '.*' is nan; the model's weights are damaged"):
        lm_eval_tasks.run(lm_eval_tasks.Scorer(model.eval(), tiny_tokenizer(), 4, Bar(False)), entry, None, 0)


def test_columns_that_a_model_cannot_have(
    llama_folder: Path, text_only: Suite, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = student_of(llama_folder, tmp_path / "window", name="window", combine="none")
    assert "student/window: the model has no memory; leave them out" in refused(folder, columns=["student/window"])
    answer = evaluate(folder, text_only)
    assert list(answer["columns"]) == ["source", "window", "converted", "student"]
    assert answer["settings"]["window"] == W
    assert "without student/window, student/memory: the model has no memory" in capfd.readouterr().err
    assert results_file.read(folder / "results.json") == answer

    alone = student_of(llama_folder, tmp_path / "alone", combine="none")
    assert "layers with one branch only" in refused(alone, columns=["student/memory"])
    answer = evaluate(alone, text_only, columns=["student"], progress=False)
    assert answer["settings"]["window"] is None


def test_the_run_writes_nothing_without_a_place(
    student: Path, text_only: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a model on the Hub."""
    monkeypatch.setattr(results_file, "write", lambda *_: pytest.fail("wrote a file"))
    answer = run.run(Options(str(student), text_only, columns=["student"], resume=True, progress=False))
    assert answer["complete"]
