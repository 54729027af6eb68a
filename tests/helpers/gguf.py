"""What tests of several files share about gguf."""

import json
from pathlib import Path
from typing import Any

import gguf
from helpers.tiny import CHAT_TEMPLATE, tiny_tokenizer
from transformers import PreTrainedModel


def write_gguf(path: Path, model: PreTrainedModel, quantized: dict[str, tuple[Any, Any]] | None = None) -> Path:
    """Write a tiny Llama as llama.cpp's converter does: rotary halves interleaved, tokenizer inside; all weights fp32
    but those of `quantized`, name -> (bytes, type)."""
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {entry["id"] for entry in content["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    for add, value in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, config.eos_token_id),
        (writer.add_pad_token_id, config.pad_token_id),
    ):
        add(value)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                halves = tensor.view(heads, 2, config.head_dim // 2, config.hidden_size)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        content, kind = (quantized or {}).get(name, (tensor.contiguous().numpy(), None))
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
