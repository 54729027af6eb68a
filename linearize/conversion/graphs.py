"""A forward pass as a graph: tokens and all tensors of the cache go in, logits and the same tensors come out.

What is traced is the model itself, by transformers' exporters; nothing of it is written again. A state of zeros is that
of a row that has seen nothing, and every row counts its own tokens, so rows of any length share a batch. Two graphs are
made: `step` reads one token, `prefill` a piece of fixed length.
"""

import contextlib
import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from linearize.checkpoint import text
from linearize.checkpoint.manifest import versions
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.cache import LinearizedCacheLayer
from linearize.model.sizes import text_sizes
from linearize.progress import step_progress

State = dict[str, Tensor]
MANIFEST = "graph.json"
FORMAT = 1
STEPWISE = ("clusters",)
"""Mixers whose prefill looks at its numbers to choose its way, which no graph can: they read by `step` alone."""
SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Settings of generation_config.json that a graph's answers follow."""
LEFT = (
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "stop_strings", "min_new_tokens"),
)
"""Settings that change what is said, and that they do not follow."""


class Piece(nn.Module):
    """A forward pass over some tokens of each row.

    Args:
        model: every layer of which keeps a cache of tensors.

    Attributes:
        state: an empty one of two rows, by names such as ``3.tokens``.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.zeros(2, 2, dtype=torch.int64), past_key_values=cache, use_cache=True)
        self.layers: list[Any] = cache.layers
        self.state = {name: torch.zeros_like(x) for name, x in _tensors(self.layers).items()}

    def forward(self, input_ids: Tensor, state: State) -> dict[str, Any]:
        """Read some tokens.

        Args:
            input_ids: int64 [B, T].
            state: as `self.state`, of B rows.

        Returns:
            logits [B, vocabulary] of what follows the last token, fp32, and the new state.
        """
        cache: Any = DynamicCache()
        cache.layers = [_with_tensors(layer, i, state) for i, layer in enumerate(self.layers)]
        seen = next((x for name, x in state.items() if name.endswith(".count")), None)
        if seen is None:  # a source: all rows are of one length
            seen = torch.full_like(input_ids[:, 0], cache.get_seq_length())
        positions = seen[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        model: Any = self.model
        keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        out = model(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True, **keep)
        return {"logits": out.logits[:, -1].float(), "state": _tensors(cache.layers)}


def _tensors(layers: list[Any]) -> State:
    return {
        f"{index}.{name}": x
        for index, layer in enumerate(layers)
        for name, x in (layer.tensors if isinstance(layer, LinearizedCacheLayer) else vars(layer)).items()
        if isinstance(x, Tensor)
    }


def _with_tensors(layer: Any, index: int, state: State) -> Any:
    """A layer like this one that holds its tensors of a state."""
    own = {name.partition(".")[2]: x.clone() for name, x in state.items() if name.startswith(f"{index}.")}
    made = copy.copy(layer)
    if isinstance(made, LinearizedCacheLayer):
        made.tensors, made.stack = own, None
    else:
        vars(made).update(own)
    return made


def check(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model whose graph would not be the model.

    Raises:
        InputError: a layer's cache grows with the text, or generation_config.json asks for what its answers cannot do.
    """
    modules = linearized_modules(model)
    grown = [m.layer_idx for m in modules if m.softmax_heads or m.mixer.keeps_source_cache]
    depth = text_sizes(model.config).layers
    grown += sorted(set(range(depth)) - {m.layer_idx for m in modules})
    if grown:
        raise InputError(
            f"{folder}: layers {', '.join(map(str, sorted(grown)))} keep softmax attention, whose cache grows with the "
            "text, and a graph has a state of fixed size; convert with --layers all, or run this model in transformers"
        )
    stated = model.generation_config.to_diff_dict() if model.generation_config else {}
    if left := [key for key in LEFT if stated.get(key)]:
        raise InputError(
            f"{folder}/generation_config.json: answers of a graph follow {', '.join(SETTINGS)}, and it asks for "
            f"{', '.join(left)}; take that out of the file"
        )


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, to: str, work: Path, piece: int, quantize: str | None
) -> None:
    """Write the graphs of a model, its tokenizer and a manifest into a folder.

    Args:
        model: fp32, on the CPU.
        tokenizer: of it.
        to: onnx or pt2.
        work: the folder.
        piece: tokens that `prefill` reads at a time.
        quantize: int8, or None.
    """
    traced = Piece(model).eval()
    lengths = {"step": 1}
    if not any(m.mixer.name in STEPWISE for m in linearized_modules(model)):
        lengths["prefill"] = piece
    with step_progress("tracing", len(lengths)) as advance:
        for name, tokens in lengths.items():
            file = work / f"{name}.{to}"
            (_onnx if to == "onnx" else _pt2)(traced, tokens, file, quantize)
            advance()
    if to == "onnx" and len(lengths) > 1:
        _share(work / "step.onnx", work / "prefill.onnx")
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{work}: its tokenizer has no tokenizer.json, and a graph runs with the package tokenizers")
    backend.save(str(work / "tokenizer.json"))
    settings: dict[str, Any] = model.generation_config.to_diff_dict() if model.generation_config else {}
    facts = {
        "format": FORMAT,
        "graph": to,
        "weights": quantize or "float32",
        "piece": lengths.get("prefill"),
        "rows": text.embedding_rows(model),
        "state": {n: {"shape": list(x.shape[1:]), "dtype": str(x.dtype)[6:]} for n, x in traced.state.items()},
        "ends": text.end_tokens(model, tokenizer),
        "settings": {key: settings[key] for key in SETTINGS if settings.get(key) is not None},
        "chat_template": tokenizer.chat_template,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        "source": model.config.linearize["source"],
        "versions": versions(),
    }
    (work / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _sample(piece: Piece, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace with, and which of their sizes may be another: the rows."""
    rows = {0: torch.export.Dim("batch", min=1, max=1 << 16)}
    inputs = {"input_ids": torch.zeros(2, tokens, dtype=torch.int64), "state": dict(piece.state)}
    return inputs, {"input_ids": rows, "state": dict.fromkeys(piece.state, rows)}


def program(piece: Piece, tokens: int) -> Any:
    """The `torch.export` program that reads so many tokens of each row."""
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    inputs, shapes = _sample(piece, tokens)
    with _quiet():
        return DynamoExporter().export(piece, inputs, DynamoConfig(dynamic_shapes=shapes)).program  # type: ignore


def _pt2(piece: Piece, tokens: int, file: Path, quantize: str | None) -> None:
    torch.export.save(program(piece, tokens), str(file))


def _onnx(piece: Piece, tokens: int, file: Path, quantize: str | None) -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.quantizers.quantizer_onnxruntime import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    inputs, shapes = _sample(piece, tokens)
    quantizer = None
    if quantize:
        quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul"], per_channel=True))
    with _quiet():
        config = OnnxConfig(dynamic_shapes=shapes, quantizer=quantizer)
        graph = OnnxExporter().export(piece, inputs, config).program  # type: ignore[arg-type]
        _transposed(graph)
        OnnxExporter.save_program(graph, file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of versions and of what torch will do otherwise; a test compares what comes out."""
    loggers = [logging.getLogger(name) for name in ("transformers.exporters", "torch.onnx", "torch.export", "root")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
