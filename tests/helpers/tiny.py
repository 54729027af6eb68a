"""Tiny random models and a real tokenizer, made on the spot."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from linearize.model.modeling import linearize_

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
