"""`linearize doctor`: facts of the machine and of a model; what is wrong is a row, what cannot be opened an error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import save_source
from transformers import AutoTokenizer

import linearize
from linearize.cli import app
from linearize.errors import InputError
from linearize.evaluation.diagnosis import fla_backend, text


def rows(report: dict[str, Any], part: str = "model") -> dict[str, dict[str, str]]:
    return {row["topic"]: row for row in report[part]}


@pytest.fixture
def source(llama_folder: Path, tmp_path: Path) -> Path:
    """A source of its own, to be spoilt."""
    return Path(shutil.copytree(llama_folder, tmp_path / "source"))


def test_of_the_machine() -> None:
    report = linearize.doctor()
    assert report["ok"] and report["model"] == [] and json.loads(json.dumps(report)) == report
    assert report["versions"]["torch"] == str(torch.__version__) and report["linearize"] == linearize.__version__
    assert rows(report, "machine").keys() >= {"system", "device", "kernels", "cache", "hub cache", "autoload"}
    assert all(row["text"] in text(report) for row in report["machine"])


def test_of_models(converted: Path, llama_folder: Path) -> None:
    """Of a linearized folder, what opens it and what a request takes; of a plain one, whether it converts."""
    made = rows(linearize.doctor(converted))
    assert "linearized llama; gla in layers 0-1" in made["model"]["text"]
    assert "export --to source" in made["opens in"]["text"] and "source" in made["cache of a request"]["text"]
    plain = rows(linearize.doctor(llama_folder))
    assert "can be converted" in plain["model"]["text"] and "1,024 tokens" in plain["context"]["text"]
    assert {row["state"] for row in [*made.values(), *plain.values()]} == {"ok"}


def _spoil_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return spoil


def _template(template: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "chat_template.jinja").write_text(template)


def _another_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


WRONG: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "token beyond the embedding": (_another_token, "tokenizer", "warning", "'[PAD]' (384)"),
    "template raises": (_template("{{ raise_exception('no') }}"), "chat template", "warning", "it says: no"),
    "template is none": (_template("{% if %}"), "chat template", "warning", "it says: "),
    "system refused": (
        _template("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"),
        *("chat template", "ok", "renders, but takes no system message"),
    ),
    "another end": (_spoil_json("generation_config.json", eos_token_id=[9999]), "end tokens", "warning", "9999 (no"),
    "no end": (_spoil_json("tokenizer_config.json", eos_token=None), "end tokens", "warning", "training needs one"),
    "damaged settings": (lambda f: (f / "generation_config.json").write_text("{"), "end tokens", "warning", "no JSON"),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"x"), "weights", "broken", "safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights", "broken", "source"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer", "broken", "no usable"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_model_is_a_row(case: str, source: Path) -> None:
    spoil, topic, state, expected = WRONG[case]
    spoil(source)
    report = linearize.doctor(source)
    row = rows(report)[topic]
    assert row["state"] == state and expected in row["text"] and report["ok"] == (state != "broken")


def test_a_template_without_end(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.checkpoint.text.TEMPLATE_SECONDS", 0.2)
    _template("{% for a in range(3000) %}{% for b in range(9000) %}{% endfor %}{% endfor %}")(source)
    assert "does not end" in rows(linearize.doctor(source))["chat template"]["text"]


def test_what_cannot_be_opened(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "absent", tmp_path / "empty", source / "config.json"):
        with pytest.raises(InputError):
            linearize.doctor(name)
    (source / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as ended:
        app(["doctor", str(source)])
    assert ended.value.code == 2 and "(X)  weights" in capsys.readouterr().out


def test_adapters_lead_to_their_base(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(converted)}))
    report = linearize.doctor(tmp_path)
    assert "adapters on converted" in report["model"][0]["text"] and "linearized llama" in report["model"][1]["text"]


@pytest.mark.parametrize(
    ("there", "reason", "backend", "expected", "state"),
    [
        (False, None, None, "need a CUDA device", "ok"),
        (False, None, "fla", "need a CUDA device", "warning"),
        (False, None, "torch", "as LINEARIZE_BACKEND says", "ok"),
        (False, None, "flaa", "allowed: torch or fla", "warning"),
        (True, "no module", None, "slower than they need be: no module", "warning"),
        (True, None, None, "flash-linear-attention, for keys up to 256 wide", "ok"),
    ],
)
def test_kernels(there, reason, backend, expected: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(fla_backend, "missing", lambda: reason)
    monkeypatch.setattr(fla_backend, "unsound", lambda device: None)
    monkeypatch.setenv("LINEARIZE_BACKEND", backend or "")
    row = rows(linearize.doctor(), "machine")["kernels"]
    assert expected in row["text"] and row["state"] == state


def test_kernels_that_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fla_backend, "missing", lambda: None)
    monkeypatch.setattr(fla_backend, "unsound", lambda device: "triton 3.6.0 computes wrong gradients")
    row = rows(linearize.doctor(), "machine")["kernels"]
    assert row["text"].startswith("PyTorch") and "wrong gradients" in row["text"] and row["state"] == "warning"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "file"))
    row = rows(linearize.doctor(), "machine")["cache"]
    assert row["state"] == "warning" and "set LINEARIZE_CACHE" in row["text"]


def test_of_an_architecture_that_does_not_convert(tmp_path: Path) -> None:
    """A warning: the file may still be fine for something else."""
    report = linearize.doctor(save_source(tmp_path / "opt", "opt", ffn_dim=64, word_embed_proj_dim=48))
    assert rows(report)["model"]["state"] in ("ok", "warning") and report["ok"]
