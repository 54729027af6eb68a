"""Shared fixtures: fixed seeds, no network, tiny random models and a real tokenizer, all made on the spot.

Tests import the helpers by name: ``from conftest import tiny_config, tiny_model, save_source``.
"""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

# Before any import of the Hugging Face libraries: they read these once. A test that talks to a local server clears them
# itself, in a subprocess.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from linearize.modeling import linearize_

torch.set_num_threads(1)

VOCABULARY = 384  # 256 bytes, the special tokens, and some merges: every text can be written in it
TEXT = (
    "The river rose in the night, and by the morning the lower field was under water. "
    "A small boat lay against the wall of the mill; nobody had seen who brought it there. "
    "If the rain goes on for another day, said the miller, we shall have to carry the flour upstairs. "
    "Numbers: 0 1 2 3 4 5 6 7 8 9. Names: Anna, Boris, Chidi, Dolores. What is the name of the miller?\n"
)
MIXER = {"name": "gla", "combine": "memory", "window": 8, "sinks": 2}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


def tiny_config(model_type: str = "llama", layers: int = 6, **changes: Any) -> PreTrainedConfig:
    """A small configuration of any architecture; six layers hold every kind of layer that an architecture alternates.

    Grouped queries (4 heads, 2 of keys and values) and a head width (16) other than hidden size / heads are on purpose:
    both are common in real models and easy to get wrong.
    """
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return AutoConfig.for_model(model_type, **{**sizes, **changes})


def tiny_model(model_type: str = "llama", layers: int = 6, **changes: Any) -> PreTrainedModel:
    """A randomly initialised model of ``tiny_config``, fp32, in evaluation mode, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, layers, **changes))
        # The usual initialisation (0.02) makes attention nearly uniform; wider weights make errors in it visible.
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on one paragraph: writes any text, needs no download."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_source(folder: Path, model_type: str = "llama", layers: int = 6, **changes: Any) -> Path:
    """Write a tiny model with its tokenizer as a complete Hugging Face folder."""
    tiny_model(model_type, layers, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_converted(folder: Path, mixer: dict = MIXER, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny linearized model of two layers with its tokenizer."""
    model = linearize_(tiny_model(layers=2), mixer)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def interruptible(command: list[str], **options: Any) -> subprocess.Popen:
    """A process that SIGINT interrupts, also where a shell started the tests in the background, which ignores it."""
    return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


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
