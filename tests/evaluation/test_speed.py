"""Speed and memory by context: cells that are complete and named as the schema says, bytes by arithmetic, resuming.

Times of tiny models say nothing; what is tested is who was measured, with what cache, and what is kept.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import save_source, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from linearize.checkpoint.sources import load_source, locate, relocate
from linearize.errors import InputError
from linearize.evaluation import clock, speed
from linearize.evaluation.columns import Models, read_config, sharing_copy
from linearize.evaluation.evaluate import bench, evaluate
from linearize.evaluation.suite import SpeedSpec, Suite, TextSpec
from linearize.model.modeling import linearize_
from linearize.model.sizes import state_bytes
from linearize.reporting import terminal
from linearize.results import file as results_file
from linearize.results.table import lay_out

MIXER = {"name": "gla", "combine": "memory", "window": 16, "sinks": 2}
CONTEXTS, BATCHES = [32, 96], [1, 3]
CELL = {"context", "batch", "prefill_seconds", "token_seconds", "low", "high", "peak_bytes", "cache_bytes"}


def converted(source: Path, folder: Path) -> Path:
    located = locate(str(source))
    model, tokenizer = load_source(located)
    linearize_(model, MIXER, source=located.to_dict()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(llama_folder, tmp_path_factory.mktemp("speed") / "student")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Columns, contexts and batches whose peak was asked for; the answer needs no process, which takes seconds."""
    calls = []

    def peak(command: list[str], task: dict[str, Any]) -> dict[str, Any]:
        calls.append((task["column"], task["context"], task["batch"]))
        return {"peak_bytes": 1000 * task["context"]}

    monkeypatch.setattr(speed, "in_process", peak)
    monkeypatch.setattr(speed, "has_peak", lambda: True)
    return calls


def test_cells_are_complete_and_their_bytes_follow_from_the_shapes(student: Path, asked: list) -> None:
    answer = bench(student, contexts=CONTEXTS, batches=BATCHES, steps=4, progress=False)
    results_file.validate(answer)
    assert list(answer["columns"]) == ["source", "window", "student"]
    config = AutoModelForCausalLM.from_pretrained(student).config
    sizes = {}
    for name, column in answer["columns"].items():
        keys = [(cell["context"], cell["batch"]) for cell in column["speed"]]
        assert keys == [(32, 1), (32, 3), (96, 1), (96, 3)] and "speed_left_out" not in column
        for cell in column["speed"]:
            assert set(cell) == CELL and 0 < cell["low"] <= cell["token_seconds"] <= cell["high"]
            assert cell["prefill_seconds"] > 0 and cell["peak_bytes"] == 1000 * cell["context"]
            sizes[name, cell["context"], cell["batch"]] = cell["cache_bytes"]
    # 6 layers, 2 heads of 16 for keys and for values, 4 bytes
    assert sizes["source", 96, 3] == 3 * 96 * 6 * 2 * (16 + 16) * 4 == 9 * sizes["source", 32, 1]
    expected = state_bytes(config, 96, 3, dtype_bytes=4)["linearized"]
    assert sizes["student", 96, 3] == sizes["student", 32, 3] == expected == 3 * sizes["student", 96, 1]
    assert sizes["window", 96, 1] == sizes["window", 32, 1] < sizes["student", 32, 1]
    assert sorted(asked) == sorted((name, c, b) for name in answer["columns"] for c in CONTEXTS for b in BATCHES)


def test_the_cache_is_what_reading_leaves_and_decoding_puts_a_growing_one_back(llama_folder: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    student = linearize_(sharing_copy(source), MIXER)
    assert student.lm_head.weight is source.lm_head.weight and not hasattr(source.config, "linearize")
    for model in (source, student):
        whole, pieces = (DynamicCache(config=model.config) for _ in range(2))
        ids = speed.prompt(model, 50, seed=0)
        with torch.inference_mode():
            difference = speed.prefill(model, whole, ids, 50) - speed.prefill(model, pieces, ids, 7)
        # The same sums in another order, fp32.
        assert difference.abs().max() < 1e-4
        held = speed.cache_bytes(whole)
        assert held == speed.cache_bytes(pieces)
        with torch.inference_mode():
            assert len(speed.decode(model, whole, ids[:, :1], 3)) == 3
        assert speed.cache_bytes(whole) == held
        assert whole.get_seq_length() == (50 if model is source else 54)


def test_a_stretched_cache_is_as_large_as_one_that_has_read_everything() -> None:
    model = tiny_model("gemma3_text", sliding_window=24)
    caches = {}
    for read in (20, 60):
        caches[read] = DynamicCache(config=model.config)
        with torch.inference_mode():
            speed.prefill(model, caches[read], speed.prompt(model, read, seed=0), read)
    speed.stretch(caches[20], 60)
    shapes = [[layer.keys.shape for layer in cache.layers] for cache in caches.values()]
    assert shapes[0] == shapes[1] and len(set(shapes[0])) == 2
    assert caches[20].get_seq_length() == 60 and speed.cache_bytes(caches[20]) == speed.cache_bytes(caches[60])
    with torch.inference_mode():
        speed.decode(model, caches[20], speed.prompt(model, 1, seed=0), 2)
    assert [layer.get_seq_length() for layer in caches[20].layers] == [63] * 6


def test_learned_positions_are_found_and_what_lies_beyond_them_is_left_out(tmp_path: Path, asked: list) -> None:
    assert speed.learned_positions(tiny_model("gpt2", max_position_embeddings=64)) == 64
    opt = tiny_model("opt", ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=48)
    assert speed.learned_positions(opt) == 64
    assert speed.learned_positions(tiny_model("llama", vocab_size=1024)) is None
    source = save_source(tmp_path / "gpt2", "gpt2", max_position_embeddings=64)
    folder = converted(source, tmp_path / "student")
    answer = bench(folder, contexts=[32, 64], steps=3, progress=False)
    for column in answer["columns"].values():
        assert [cell["context"] for cell in column["speed"]] == [32]
        (left,) = column["speed_left_out"]
        assert left["context"] == 64 and "learned positions for 64 tokens" in left["reason"]
    assert ("student", 64, 1) not in asked
    assert any("no source at 64 tokens" in note for note in lay_out(answer).notes)


@pytest.mark.skipif(not clock.has_peak(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.slow
def test_the_peak_is_that_of_a_process_of_its_own_while_it_decodes(student: Path) -> None:
    config = read_config(student)
    models = Models(student, config, relocate(config.linearize["source"]), "auto", "cpu", seed=0)
    peaks = [speed.process_peak(models, name, 4096, 20)["peak_bytes"] for name in ("source", "student")]
    # 126 MB of keys and values against 1 MB; processes without them differ by a few MB.
    sizes = state_bytes(config, 4096, 20, dtype_bytes=4)
    assert peaks[1] > 50e6 and peaks[0] - peaks[1] > 0.8 * (sizes["source_kv"] - sizes["linearized"]) > 90e6


def test_memory_that_does_not_suffice_leaves_a_reason(
    student: Path, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = clock.in_process(["-c", "import os; os.kill(os.getpid(), 9)"], {})
    assert died == {"failed": "killed by signal 9, most likely for lack of memory"}
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        clock.in_process(["-c", "raise SystemExit(3)"], {})
    original = speed.prefill

    def scarce(model: Any, cache: Any, ids: torch.Tensor, piece: int) -> torch.Tensor:
        if len(ids) == 3 and not hasattr(model.config, "linearize"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, cache, ids, piece)

    monkeypatch.setattr(speed, "in_process", lambda _, task: died if task["column"] == "window" else {"peak_bytes": 1})
    monkeypatch.setattr(speed, "prefill", scarce)
    answer = bench(student, contexts=[32], batches=[1, 3], steps=3, progress=False)
    left = {name: column.get("speed_left_out") for name, column in answer["columns"].items()}
    assert left["source"] == [{"context": 32, "batch": 3, "reason": "out of memory"}]
    assert [entry["reason"] for entry in left["window"]] == [died["failed"]] * 2 and left["student"] is None


def test_a_subset_of_columns_and_an_interrupted_run(
    student: Path, asked: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river rose in the night. " * 50)
    suite = Suite(name="speed", perplexity=[TextSpec(str(text), 32, 1)], speed=SpeedSpec(contexts=[32, 64], steps=3))
    options: dict[str, Any] = {"out": tmp_path / "r.json", "progress": False}
    original = speed.interleaved

    def interrupted(models: Any, context: int, *rest: Any) -> Any:
        if context == 64:
            raise KeyboardInterrupt
        return original(models, context, *rest)

    monkeypatch.setattr(speed, "interleaved", interrupted)
    columns = ["source", "converted", "student"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(student, suite, columns=columns, **options)
    partial = results_file.read(tmp_path / ".r.json.partial")
    monkeypatch.setattr(speed, "interleaved", original)
    asked.clear()
    answer = evaluate(student, suite, columns=columns, resume=True, **options)
    assert list(answer["columns"]) == columns and "speed" not in answer["columns"]["converted"]
    assert asked == [("source", 64, 1), ("student", 64, 1)]
    for name in ("source", "student"):
        kept = partial["columns"][name]["speed"]
        assert [cell["context"] for cell in kept] == [32] and answer["columns"][name]["speed"][:1] == kept
    # A complete file grows by a column, measured alone.
    asked.clear()
    more = evaluate(student, suite, columns=["window"], resume=True, **options)
    assert asked == [("window", 32, 1), ("window", 64, 1)] and list(more["columns"])[1] == "window"
    assert more["columns"]["source"] == answer["columns"]["source"]


def test_the_verb(student: Path, asked: list, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import sys

    from linearize import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["linearize", "bench", str(student), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        text = capsys.readouterr()
        return int(ended.value.code or 0), text.out, text.err

    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ("--contexts", "32,64", "--steps", "3")
    code, text, err = run(*options, "--out", str(out), "--plot", str(picture))
    assert code == 0 and str(picture) in err and picture.read_bytes().startswith(b"\x89PNG")
    results = results_file.read(out)
    assert "32 tokens, batch 1" in text and "64 tokens, batch 1" in text and torch.__version__ in text
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    (cache,) = [row for row in rows[rows.index(["64 tokens, batch 1"]) :] if row[0] == "cache"]
    cells = {name: column["speed"][1] for name, column in results["columns"].items()}
    student_bytes, source_bytes = (cells[name]["cache_bytes"] for name in ("student", "source"))
    assert float(cache[4]) == pytest.approx(student_bytes / source_bytes, rel=0.01)  # three digits are shown
    assert all(len(line) <= 100 for line in text.splitlines())
    short = lay_out(results)
    assert short.rows[0][0] == "ms per token at 64" and short.rows[2][1] == f"{source_bytes / 2**20:.1f}"
    assert terminal.speed_panels(results)["batch 1"]["source"][0][0] == 32

    code, text, _ = run(*options, "--json")
    assert code == 0 and set(json.loads(text)["columns"]["student"]["speed"][0]) == CELL
    assert not (student / "results.json").exists()
    for wrong, message in (
        (("--contexts", "1k"), "--contexts 1k: expected whole numbers"),
        (("--contexts", "0"), "contexts: found 0; expected at least 1"),
        (("--steps", "2"), "steps: found 2; expected at least 3"),
        (("--plot", "a.txt"), "a.txt: unknown kind of picture"),
    ):
        code, text, err = run(*wrong)
        assert code == 2 and message in err and not text


def test_predictions_that_are_no_numbers_and_broken_cells(student: Path, tmp_path: Path, asked: list) -> None:
    model = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for file in student.glob("tokenizer*"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="student: the prediction after 32 tokens is not a number"):
        bench(tmp_path / "broken", contexts=[32], steps=3, progress=False)
    column = {"tasks": {}, "seconds": 0.0, "speed": [{"context": 8, "batch": 1, "peak_bytes": 1.5}]}
    content = {"schema": 1, "model": "m", "source": "s", "suite": "x", "environment": {}, "columns": {"source": column}}
    with pytest.raises(InputError, match=r"speed\.0\.peak_bytes: found 1\.5; .*speed\.0\.cache_bytes: missing"):
        results_file.validate(content)


def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("idle"))
    assert clock.timed(lambda: events.append("call") or 7, torch.device("cuda"))[0] == 7
    assert events == ["idle", "call", "idle"]
    clock.timed(lambda: None, torch.device("cpu"))
    assert len(events) == 3
    assert clock.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {"seconds": 3.0, "low": 1.5, "high": 4.5, "samples": 5}
    assert clock.rotated([1, 2, 3], 4) == [2, 3, 1] and clock.rotated([], 1) == []
