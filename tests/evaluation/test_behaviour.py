"""What a model does beside its source: every number recomputed by a plain loop, on tiny random models."""

import copy
import gzip
import io
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.evaluation import student_of
from helpers.tiny import save_source, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation import behaviour, continuations, perplexity
from linearize.evaluation import suite as suites
from linearize.evaluation.behaviour import Behaviour
from linearize.evaluation.evaluate import evaluate
from linearize.evaluation.suite import BehaviourSpec, Suite, TextSpec
from linearize.model.branches import branches
from linearize.model.mixers import MIXERS, Geometry, build_config
from linearize.model.modeling import linearize_
from linearize.recipe.resources import package_folder
from linearize.results import file as results_file
from linearize.results.table import lay_out

W, S, TOKENS, PROMPTS, BLOCKS, LENGTH = 16, 2, 10, 6, 2, 48
MIXER = {"name": "gla", "combine": "memory", "window": W, "sinks": S}


@pytest.fixture(scope="module")
def content() -> str:
    packed = (package_folder("eval") / "data" / "wikitext2_valid.txt.gz").read_bytes()
    return gzip.decompress(packed)[:20_000].decode(errors="ignore")


@pytest.fixture(scope="module")
def text(content: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "pages.txt"
    file.write_text(content)
    return str(file)


@pytest.fixture(scope="module")
def suite(text: str) -> Suite:
    spec = BehaviourSpec(prompts=PROMPTS, tokens=TOKENS, kl_blocks=BLOCKS, state=300)
    return Suite(name="tiny", perplexity=[TextSpec(text, LENGTH, BLOCKS + 1)], behaviour=spec)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("behaviour") / "source", layers=2)


@pytest.fixture(scope="module")
def student(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_of(source, tmp_path_factory.mktemp("behaviour") / "student")


@pytest.fixture(scope="module")
def compared(student: Path, suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All six columns; batches of 3, so that four checked and two other continuations make three."""
    out = tmp_path_factory.mktemp("compared") / "results.json"
    answer = evaluate(student, suite, out=out, batch_size=3, progress=False)
    assert results_file.read(out) == answer == json.loads(json.dumps(answer))
    return answer


@pytest.fixture(scope="module")
def entries(compared: dict[str, Any]) -> dict[str, Any]:
    return {name: column["behaviour"] for name, column in compared["columns"].items()}


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def made(content: str, context: int | None = 1024, **spec: Any) -> Behaviour:
    tokenizer = tiny_tokenizer()
    values = {"prompts": PROMPTS, "tokens": TOKENS, "kl_blocks": BLOCKS, "state": 0, **spec}
    blocks = perplexity.cut(content, tokenizer, LENGTH, BLOCKS + 1)
    behaviour.check(BehaviourSpec(**values), len(blocks), context)
    return Behaviour(BehaviourSpec(**values), blocks, content, tokenizer, window=W, batch_size=3, seed=0)


@torch.no_grad()
def plain_greedy(model: PreTrainedModel, prompt: torch.Tensor, tokens: int = TOKENS) -> list[int]:
    """Without cache, batch and padding."""
    ids = prompt.tolist()
    for _ in range(tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# --- every number of the file -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_kl_is_that_of_a_plain_loop(entries: dict[str, Any], student: Path, source: Path, content: str) -> None:
    ids = perplexity.cut(content, tiny_tokenizer(), LENGTH, BLOCKS + 1)[:BLOCKS]
    origin, model = opened(source), opened(student)
    losses = np.zeros((BLOCKS, LENGTH - 1))
    for i, block in enumerate(ids):
        for t in range(1, LENGTH):
            p, q = (m(input_ids=block[None, :t], use_cache=False).logits[0, -1].double() for m in (origin, model))
            p, q = p.softmax(0), q.softmax(0)
            losses[i, t - 1] = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    found = entries["student"]["kl"]
    # The source's logits were kept in half precision: 11 bits of the distance to the largest.
    assert found["value"] == pytest.approx(losses.mean(), rel=2e-4)
    assert found["stderr"] == pytest.approx(losses.mean(1).std(ddof=1) / math.sqrt(BLOCKS), rel=2e-3)
    assert found["tokens"] == losses.size == BLOCKS * (LENGTH - 1)
    assert [(b["start"], b["end"]) for b in found["by_position"]] == [(1, 16), (16, 32), (32, 48)]
    for bucket in found["by_position"]:
        inside = losses[:, bucket["start"] - 1 : bucket["end"] - 1]
        assert bucket["tokens"] == inside.size and bucket["kl"] == pytest.approx(inside.mean(), rel=1e-3)


def test_agreement_and_repetition_are_those_of_plain_loops(
    entries: dict[str, Any], student: Path, source: Path, content: str
) -> None:
    prompts = continuations.beginnings(content, tiny_tokenizer(), PROMPTS, seed=0)
    assert len({len(prompt) for prompt in prompts}) > 1, "rows of one length need no padding"
    origin, model = opened(source), opened(student)
    theirs = [plain_greedy(origin, prompt) for prompt in prompts]
    for name, branch in (("student", "all"), ("student/window", "window"), ("student/memory", "memory")):
        with branches(model, branch):
            ours = [plain_greedy(model, prompt) for prompt in prompts]
        lengths = []
        for a, b in zip(ours, theirs, strict=True):
            n = 0
            while n < TOKENS and a[n] == b[n]:
                n += 1
            lengths.append(n)
        found = entries[name]["agreement"]
        assert found == {"mean": np.mean(lengths), "median": np.median(lengths), "lengths": lengths}
        repeated = {n: [] for n in (2, 3, 4)}
        for row in ours:
            for n, shares in repeated.items():
                grams = [tuple(row[i : i + n]) for i in range(TOKENS - n + 1)]
                shares.append(sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams))
        pairs = [pair for row in ours for pair in zip(row, row[1:], strict=False)]
        assert entries[name]["repetition"] == pytest.approx(
            {
                **{f"rep_{n}": np.mean(shares) for n, shares in repeated.items()},
                "distinct_1": len({token for row in ours for token in row}) / (PROMPTS * TOKENS),
                "distinct_2": len(set(pairs)) / len(pairs),
            }
        )


def test_the_source_is_like_itself_and_the_others_are_not(entries: dict[str, Any]) -> None:
    source, *others = copy.deepcopy(list(entries.values()))
    assert source["agreement"]["lengths"] == [TOKENS] * PROMPTS
    # Only what half precision costs, quadratic in 2^-11 of the distance to the largest logit.
    assert 0 <= source["kl"]["value"] < 1e-5
    assert all(entry["kl"]["value"] > 1e-3 for entry in others)
    assert all(entry["agreement"]["mean"] < TOKENS for entry in others)
    for entry in (source, *others):
        # fp32, sums in another order, logits of up to 10; steps of a batch with padding against one pass without.
        assert entry["cached"].pop("difference") < 1e-4
        assert entry["cached"] == {"checked": behaviour.CHECKED * TOKENS, "equal": behaviour.CHECKED * TOKENS}
    assert entries["student"]["kl"] != entries["student/window"]["kl"]


@torch.no_grad()
def test_the_state_is_that_of_one_pass_over_the_text(entries: dict[str, Any], student: Path, content: str) -> None:
    assert [name for name, entry in entries.items() if entry["state"]] == ["converted", "student", "student/memory"]
    assert entries["source"]["state"] is entries["window"]["state"] is entries["student/window"]["state"] is None
    ids = tiny_tokenizer()(content[:8000], add_special_tokens=False, verbose=False)["input_ids"]
    model = opened(student)
    for found, position in zip(entries["student"]["state"], (64, 128, 256), strict=True):
        past = model(input_ids=torch.tensor([ids[:position]]), use_cache=True).past_key_values
        norms, ranks = [], []
        for layer in past.layers:
            # What gla keeps beside the covariance is the mean key, its last column.
            for matrix in layer.state[0][0][..., :-1].double().numpy():
                norms.append(math.sqrt((matrix**2).sum()))
                values = np.sqrt(np.linalg.eigvalsh(matrix.T @ matrix).clip(0))
                shares = [value / values.sum() for value in values if value > 0]
                ranks.append(math.exp(-sum(share * math.log(share) for share in shares)))
        assert found == {
            "position": position,
            "norm": pytest.approx(np.mean(norms), rel=1e-4),
            # The roots of eigenvalues near 0 are exact to 1e-8 of the largest only.
            "effective_rank": pytest.approx(np.mean(ranks), rel=1e-4),
        }


def test_effective_rank_by_hand() -> None:
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    cases = {
        4.0: torch.eye(4).double(),
        1.0: torch.outer(torch.arange(1.0, 4), torch.arange(1.0, 6)).double(),
        2.0: turned[:, :2] @ turned[:2] * 7,
        0.0: torch.zeros(3, 3),
        math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)): torch.diag(torch.tensor([1.0, 3.0, 0.0])),
    }
    for expected, matrix in cases.items():
        assert float(behaviour.effective_rank(matrix)) == pytest.approx(expected, abs=1e-6)
    vectors = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert behaviour.health([vectors]) == {"norm": 3.0, "effective_rank": None}
    assert behaviour.health([torch.complex(vectors, vectors)])["norm"] == pytest.approx(3 * math.sqrt(2))
    assert behaviour.health([vectors, torch.eye(2)[None]])["effective_rank"] == pytest.approx(2)


def test_repetition_and_agreement_by_hand() -> None:
    found = continuations.repetition([[1, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    assert found == pytest.approx(
        {"rep_2": 3 / 8, "rep_3": 1 / 3, "rep_4": 1 / 4, "distinct_1": 5 / 10, "distinct_2": 5 / 8}
    )
    assert set(continuations.repetition([[7]]).values()) == {0.0, 1.0}
    rows = torch.tensor([[1, 2, 3], [9, 2, 3], [1, 9, 3], [1, 2, 9]])
    assert continuations.agreement(rows, rows[:1].expand(4, -1)) == [3, 0, 1, 2]


@pytest.mark.parametrize("name", [name for name, cls in MIXERS.items() if cls.recurrent])
def test_every_mixer_says_what_its_state_holds(name: str) -> None:
    for combine in MIXERS[name].combines:
        mixer = MIXERS[name](build_config({"name": name, "combine": combine, "window": W}), Geometry(4, 2, 16, 12))
        content = mixer.content(mixer.initial_state(3, torch.device("cpu")))
        assert content.shape[:2] == (3, 2) and content.shape[-1] == 12 and content.ndim in (3, 4)


# --- what generation must not depend on -------------------------------------------------------------------------------


def test_greedy_text_follows_no_settings_of_the_folder(source: Path, content: str) -> None:
    prompts = continuations.beginnings(content, tiny_tokenizer(), 2, seed=3)
    model = opened(source)
    expected = [plain_greedy(model, prompt) for prompt in prompts]
    settings = model.generation_config
    settings.repetition_penalty, settings.do_sample, settings.temperature = 5.0, True, 3.0
    settings.eos_token_id = expected[0][0]
    seen: list[int] = []
    tokens, logits = continuations.greedy(model, prompts, TOKENS, 2, True, seen.append)
    assert tokens.tolist() == expected and logits.argmax(-1).tolist() == expected
    assert model.generation_config is settings and seen == [2] * TOKENS


def test_a_cache_that_decodes_something_else_is_noticed(source: Path, content: str) -> None:
    (prompt,) = continuations.beginnings(content, tiny_tokenizer(), 1, seed=0)
    model = opened(source)
    tokens, logits = (x[0] for x in continuations.greedy(model, [prompt], TOKENS, 2, True, lambda count: None))
    logits[3, 5] += 0.5
    tokens[-1] = (tokens[-1] + 1) % 300
    with torch.no_grad():
        equal, difference = continuations.cached_is_whole(model, prompt, tokens, logits)
    assert equal == TOKENS - 1 and difference == pytest.approx(0.5, abs=1e-4)


def test_beginnings_are_those_of_lines_and_the_same_for_a_seed(content: str) -> None:
    tokenizer = tiny_tokenizer()
    first, again, other = (continuations.beginnings(content, tokenizer, 8, seed) for seed in (1, 1, 2))
    assert [x.tolist() for x in first] == [x.tolist() for x in again] != [x.tolist() for x in other]
    for prompt in first:
        assert continuations.SHORTEST <= len(prompt) <= continuations.LONGEST
        assert f"\n{tokenizer.decode(prompt)[:40]}" in f"\n{content}"
    long = behaviour.document("one two three ", tokenizer, 100)
    assert len(long) == 100 and tokenizer.decode(long).startswith("one two three one two three ")


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_model_measured_as_a_column_of_its_own_is_the_source(source: Path, content: str) -> None:
    model = opened(source)
    steps: list[int] = []
    with closing(made(content, state=128)) as work:
        work.refer(model, steps.append)
        assert sum(steps) == work.steps(refers=True)
        own = work.measure(model, is_source=False)
        assert own["agreement"] == {"mean": TOKENS, "median": TOKENS, "lengths": [TOKENS] * PROMPTS}
        assert own["kl"]["value"] < 1e-5 and own == work.measure(model, is_source=True)
        steps.clear()
        near, *far = work.measure(linearize_(model, MIXER), False, steps.append)["kl"]["by_position"]
    # Source and converted model are the same up to the window, so only later positions can differ.
    assert near["kl"] < 1e-5 and all(bucket["kl"] > 1e-3 for bucket in far)
    assert sum(steps) == work.steps()


def test_columns_that_run_later_or_alone_get_the_same_numbers(
    student: Path, suite: Suite, compared: dict[str, Any], tmp_path: Path
) -> None:
    """Without the source; with a source of an earlier run; and with a control that has to be made again first."""
    options = {"batch_size": 3, "progress": False}
    alone = evaluate(student, suite, out=tmp_path / "a.json", columns=["student"], **options)
    assert list(alone["columns"]) == ["student"]
    out = tmp_path / "b.json"
    evaluate(student, suite, out=out, columns=["source"], **options)
    later = evaluate(student, suite, out=out, columns=["student"], resume=True, **options)
    assert list(later["columns"]) == ["source", "student"]
    half = copy.deepcopy(compared)
    del half["columns"]["window"]["perplexity"], half["columns"]["converted"]["behaviour"]
    half["columns"]["student"].pop("behaviour")
    results_file.write(half, tmp_path / ".c.json.partial")
    resumed = evaluate(student, suite, out=tmp_path / "c.json", resume=True, **options)
    assert list(resumed["columns"]) == list(compared["columns"])
    for answer in (alone, later, resumed):
        for name, column in answer["columns"].items():
            assert column["behaviour"] == compared["columns"][name]["behaviour"], name


def test_the_default_text_takes_the_place_of_a_suite_without_texts(
    student: Path, text: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("linearize.evaluation.work.BLOCK", 32)
    monkeypatch.setattr(suites, "DEFAULT_TEXT", text)
    spec = BehaviourSpec(prompts=1, tokens=2, kl_blocks=1, state=0)
    suite = Suite(name="behaviour", behaviour=spec)
    answer = evaluate(student, suite, columns=["student"], out=tmp_path / "r.json", progress=False)
    found = answer["columns"]["student"]["behaviour"]
    assert found["kl"]["tokens"] == 31 and found["kl"]["stderr"] is None and found["state"] is None
    assert list(answer["environment"]["data"]) == [text]


# --- long blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_long_block_read_in_pieces_is_one_forward_pass(model_type: str, monkeypatch: Any) -> None:
    sizes = {"sliding_window": 24} if model_type == "gemma3_text" else {}
    source = tiny_model(model_type, **sizes)
    ids = torch.randint(3, 300, (2, 201))  # not a multiple of a piece
    for model in (source, linearize_(copy.deepcopy(source), MIXER)):
        whole = perplexity.losses(model, ids)
        assert torch.equal(whole, perplexity.losses(model, ids))
        lengths = []
        handle = model.register_forward_pre_hook(
            lambda _, __, options, to=lengths: to.append(options["input_ids"].shape[1]), with_kwargs=True
        )
        with monkeypatch.context() as patch:
            patch.setattr(perplexity, "PIECE", 40)
            patch.setattr(perplexity, "STRETCH", 16)
            pieces = perplexity.losses(model, ids)
        handle.remove()
        assert lengths == [40, 40, 40, 40, 40, 1] * 2
        assert pieces.shape == whole.shape == (2, 200)
        # fp32, the same sums in another order; losses of up to 10 nats through six layers.
        assert float((pieces - whole).abs().max()) < 1e-4


def test_buckets_reach_32k_tokens() -> None:
    assert perplexity.edges(32768, 64) == [1, *(2**i for i in range(6, 16))]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_said_at_the_start(content: str) -> None:
    for message, options in (
        ("kl_blocks is 5, but the suite's first text has 3 blocks", {"kl_blocks": 5}),
        (r"state's text of up to 2048 tokens do not fit .* 1024; lower behaviour\.state", {"state": 2048}),
        (r"continuations of up to 1128 tokens do not fit .*; lower behaviour\.tokens", {"tokens": 1000}),
        ("500 beginnings were asked for, but only [0-9]+ lines", {"prompts": 500}),
    ):
        with pytest.raises(InputError, match=message):
            made(content, **options)
    assert made(content, context=None, state=2048).positions == [64, 128, 256, 512, 1024, 2048]


def test_numbers_that_are_none_are_refused(source: Path, content: str, monkeypatch: Any) -> None:
    model = opened(source)
    with closing(made(content, state=64, prompts=1)) as work:
        work.refer(model)
        linearize_(model, MIXER)
        with monkeypatch.context() as patch:
            patch.setattr(MIXERS["gla"], "content", lambda self, state: state[0] / 0)
            with pytest.raises(InputError, match="state is not finite after 64 tokens"):
                work.measure(model, is_source=True)
        with torch.no_grad():
            model.lm_head.weight[7] = float("nan")
        with pytest.raises(InputError, match="prediction in greedy text is not a number"):
            work.measure(model, is_source=False)
        with pytest.raises(InputError, match="prediction after 1 tokens is not a number"):
            work.measure(model, is_source=True)


def test_no_room_for_the_source_is_said(source: Path, content: str, monkeypatch: Any) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(behaviour.tempfile, "TemporaryFile", Full)
    with pytest.raises(InputError, match="logits cannot be kept in .*No space left.*; set TMPDIR"):
        made(content).refer(opened(source))


# --- results and table ------------------------------------------------------------------------------------------------


def test_the_table_shows_it_and_a_wrong_file_is_refused(compared: dict[str, Any]) -> None:
    content = copy.deepcopy(compared)
    student = content["columns"]["student"]["behaviour"]
    student["kl"] |= {"value": 0.25, "stderr": 0.0126}
    student["agreement"]["mean"], student["repetition"]["rep_4"] = 7.25, 0.5
    table = lay_out(content, ["source", "student"])
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["KL to the source, nats"] == ["0.000 ± 0.000", "0.250 ± 0.013"]
    assert rows["tokens as the source"] == [f"{TOKENS:.1f}", "7.2"]
    assert rows["repeated 4-grams"][1] == "50.0 %"
    assert not any("Cached" in note for note in table.notes)
    student["cached"] |= {"checked": 40, "equal": 38, "difference": 0.123}
    (note,) = (note for note in lay_out(content).notes if "Cached" in note)
    assert note.endswith("pick different tokens: student at 2 of 40 steps (logits by up to 0.12)")
    student["kl"]["value"], student["state"][0]["norm"] = "low", None
    del student["repetition"]["rep_3"]
    with pytest.raises(InputError) as error:
        results_file.validate(content)
    for problem in ("kl.value: found 'low'", "repetition.rep_3: missing", "state.0.norm: found None"):
        assert f"columns.student.behaviour.{problem}" in str(error.value)
