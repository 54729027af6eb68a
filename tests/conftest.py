"""Shared fixtures: fixed seeds, no network, tiny folders made on the spot (helpers/tiny.py)."""

import json
import os
from pathlib import Path

# Before any import of the Hugging Face libraries: they read these once. A test that talks to a local server clears them
# itself, in a subprocess.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LINEARIZE_NO_FSYNC"] = "1"  # a test's folder need not outlive the machine's power

import pytest
import torch
from helpers.tiny import TEXT, save_converted, save_source, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with real weights first: they take minutes, and begun last they would keep one core waiting."""
    items.sort(key=lambda item: not item.path.name.startswith("test_real"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and what sources say of them are shared by the tests of a run, and kept out of the user's cache."""
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path_factory.getbasetemp() / "tokens"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a Hugging Face folder. Shared by the session: tests read it, never write into it."""
    return save_source(tmp_path_factory.mktemp("source") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 (normalised queries and keys, tied embeddings) as a Hugging Face folder; read-only too."""
    return save_source(tmp_path_factory.mktemp("source") / "tiny-qwen3", "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny converted folder of the module that asks."""
    return save_converted(tmp_path_factory.mktemp("model") / "converted")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents to train on, all different."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": TEXT[i % 50 :] + str(i)}) + "\n" for i in range(40)))
    return file
