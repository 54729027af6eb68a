"""A forward pass as a graph: tokens and all tensors of the cache go in, logits and the same tensors come out.

What is traced is the model itself, by transformers' exporters; nothing of it is written again. A state of zeros is that
of a row that has seen nothing, and every row counts its own tokens, so rows of any length share a batch. Two graphs are
made: `step` reads one token, `prefill` a piece of fixed length.
"""

import contextlib
import copy
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from linearize.checkpoint import text
from linearize.checkpoint.manifest import versions
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.cache import LinearizedCacheLayer
from linearize.model.sizes import text_sizes
from linearize.model.transformers_api import CACHE
from linearize.progress import step_progress

State = dict[str, Tensor]
LARGE = 4096
"""Bytes from which a weight lies beside its graph, where two graphs share it."""
COUNT = "count"
"""A layer's tensor that says how many tokens each row has seen."""
MANIFEST = "graph.json"
FORMAT = 1
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
            model(input_ids=torch.zeros(2, 2, dtype=torch.int64), **{CACHE: cache}, use_cache=True)
        self.layers: list[Any] = cache.layers
        # Contiguous, whatever they were made from: else a size that grows is compared with itself in another order.
        self.state = {name: x.new_zeros(x.shape) for name, x in _tensors(self.layers).items()}

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
        seen = _count(state)
        if seen is None:  # a source: all rows are of one length
            seen = torch.full_like(input_ids[:, 0], cache.get_seq_length())
        positions = seen[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        model: Any = self.model
        keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        out = model(input_ids=input_ids, position_ids=positions, **{CACHE: cache}, use_cache=True, **keep)
        return {"logits": out.logits[:, -1].float(), "state": _tensors(cache.layers)}


def _tensors(layers: list[Any]) -> State:
    """All tensors of a cache; of the counts, which are equal in all layers, the first: what follows from it is then
    computed once."""
    counted, named = False, {}
    for index, layer in enumerate(layers):
        linearized = isinstance(layer, LinearizedCacheLayer)
        for name, x in (layer.tensors if linearized else vars(layer)).items():
            if isinstance(x, Tensor) and not (name == COUNT and counted):
                named[f"{index}.{name}"] = x
        counted |= linearized
    return named


def _count(state: State) -> Tensor | None:
    """How many tokens each row of linearized layers has seen, int64 [B]; None without such layers."""
    return next((x for name, x in state.items() if name.endswith(f".{COUNT}")), None)


def _with_tensors(layer: Any, index: int, state: State) -> Any:
    """A layer like this one that holds its tensors of a state."""
    own = {name.partition(".")[2]: x.clone() for name, x in state.items() if name.startswith(f"{index}.")}
    made = copy.copy(layer)
    if isinstance(made, LinearizedCacheLayer):
        count: Any = _count(state)
        made.tensors, made.stack = own | {COUNT: count.clone()}, None
    else:
        vars(made).update(own)
    return made


def keep_unrounded(model: PreTrainedModel) -> None:
    """Have every mixer keep its state in fp32."""
    for module in linearized_modules(model):
        module.mixer.config = replace(module.mixer.config, state_dtype="float32")


def check(model: PreTrainedModel, folder: Path, to: str) -> None:
    """Refuse a model whose graph would not be the model.

    Args:
        model: linearized.
        folder: where it is, for the error.
        to: onnx or pt2.

    Raises:
        InputError: a layer's cache grows with the text, onnxruntime has no operators for the dtype of a state, or
            generation_config.json asks for what its answers cannot do.
    """
    modules = linearized_modules(model)
    rounded = {m.mixer.config.state_dtype for m in modules} - {"float32"}
    if to == "onnx" and rounded:
        raise InputError(
            f"{folder}: its states are kept in {', '.join(sorted(rounded))}, for which onnxruntime lacks operators; "
            "pass --state-dtype float32 to keep them unrounded in the graph, which takes more memory and may change a "
            "word where two were nearly as likely, or export --to pt2"
        )
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
    traced, known = Piece(model).eval(), {}
    lengths = {"step": 1, "prefill": piece}
    with step_progress("tracing", len(lengths)) as advance:
        for name, tokens in lengths.items():
            file = work / f"{name}.{to}"
            if to == "onnx":
                onnx(traced, tokens, file, quantize, known)
            else:
                torch.export.save(program(traced, tokens), str(file))
            advance()
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
    """Inputs to trace with, and which of their sizes may be another: the rows, and what a source has read."""
    # A range of `read` would have to be proven: that 64 (read + 1) is less than 192 (read + 1), which it is not.
    rows, read = torch.export.Dim("batch", min=1, max=1 << 16), torch.export.Dim.AUTO
    shapes = {n: {0: rows, 2: read} if n.endswith((".keys", ".values")) else {0: rows} for n in piece.state}
    inputs = {"input_ids": torch.zeros(2, tokens, dtype=torch.int64), "state": dict(piece.state)}
    return inputs, {"input_ids": {0: rows}, "state": shapes}


def program(piece: Piece, tokens: int) -> Any:
    """The `torch.export` program that reads so many tokens of each row."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    inputs, shapes = _sample(piece, tokens)
    with _quiet(), _stable():
        return DynamoExporter().export(piece, inputs, DynamoConfig(dynamic_shapes=shapes)).program  # type: ignore[arg-type]


def onnx(piece: Piece, tokens: int, file: Path, quantize: str | None, known: dict[str, Any]) -> None:
    """Write the graph that reads so many tokens of each row, with its weights beside it.

    Args:
        piece: what is traced.
        tokens: how many.
        file: to write; weights that no graph before has go to FILE.data.
        quantize: int8, or None.
        known: weights of graphs before by their content, whose files this one names; grows by its own.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.quantizers.quantizer_onnxruntime import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    inputs, shapes = _sample(piece, tokens)
    with _quiet(), _stable():
        config = OnnxConfig(dynamic_shapes=shapes, optimize=False)
        graph: Any = OnnxExporter().export(piece, inputs, config).program  # type: ignore[arg-type]
        _simplify(graph)
        _fold_transposes(graph)
        if quantize:
            how = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gather"], per_channel=True)
            graph = OnnxRuntimeQuantizer(how).quantize(graph, {}, None)  # type: ignore[arg-type]
        _save(graph, file, known)


def _simplify(graph: Any) -> None:
    """Fold constants, and compute once what is the same. What else the exporter would look for, onnxruntime finds as it
    opens the graph; there it takes a quarter of an hour for 30 layers, as it grows with the square of the nodes."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(graph)
    optimizer.fold_constants(graph)
    for simpler in (
        common.IdentityEliminationPass, common.CommonSubexpressionEliminationPass, common.RemoveUnusedNodesPass,
        common.ClearMetadataAndDocStringPass,
    ):  # fmt: skip
        simpler()(graph)


def _fold_transposes(graph: Any) -> None:
    """Store weights as products read them: a quantiser, and a runtime that packs them, look for constants."""
    import onnx_ir

    for node in list(graph.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None:
            continue
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        array = np.ascontiguousarray(weight.const_value.numpy().transpose(order))
        name = f"{weight.name}.transposed"
        folded = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name))
        folded.shape, folded.type = onnx_ir.Shape(array.shape), weight.type
        if name not in graph.graph.initializers:
            graph.graph.initializers[name] = folded
        node.outputs[0].replace_all_uses_with(graph.graph.initializers[name])
        graph.graph.remove(node, safe=True)
    used = {id(x) for node in graph.graph for x in node.inputs}
    for name, value in list(graph.graph.initializers.items()):
        if id(value) not in used:
            del graph.graph.initializers[name]


def _save(graph: Any, file: Path, known: dict[str, Any]) -> None:
    import onnx_ir
    from onnx_ir.external_data import convert_tensors_to_external

    large = [value for value in graph.graph.initializers.values() if value.const_value.nbytes >= LARGE]
    keys = [hashlib.sha256(value.const_value.tobytes()).hexdigest() for value in large]
    new = {key: value.const_value for key, value in zip(keys, large, strict=True) if key not in known}
    if new:
        written = convert_tensors_to_external(list(new.values()), file.parent, f"{file.name}.data")
        known |= dict(zip(new, written, strict=True))
    for key, value in zip(keys, large, strict=True):
        same = known[key]
        value.const_value = onnx_ir.ExternalTensor(
            same.location, same.offset, same.length, value.const_value.dtype,
            shape=value.const_value.shape, name=str(value.name), base_dir=str(file.parent),
        )  # fmt: skip
    onnx_ir.save(graph, str(file))


def _log1p(x: Tensor) -> Tensor:
    return 2 * torch.atanh(x / (2 + x))


STABLE: dict[tuple[Any, str], Any] = {
    (torch, "log1p"): _log1p,
    (torch, "expm1"): lambda x: torch.tanh(x / 2) * (x.exp() + 1),
    (F, "logsigmoid"): lambda x: x.clamp(max=0) - _log1p((-x.abs()).exp()),
}
"""Functions that exporters write as ln(1 + x), e^x − 1 and ln σ(x), and what they are traced as instead: in fp32 the
first two lose small numbers, and onnxruntime's σ is 0 from −18 on, so that the last one is −inf."""


@contextlib.contextmanager
def _stable() -> Iterator[None]:
    """While a model is traced, compute these functions so that every runtime keeps their digits."""
    before = {(module, name): getattr(module, name) for module, name in STABLE}
    try:
        for (module, name), function in STABLE.items():
            setattr(module, name, function)
        yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of versions and of what torch will do otherwise; a test compares what comes out."""
    loggers = [logging.getLogger(name) for name in ("transformers.exporters", "torch.onnx", "torch.export", "root")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # its progress
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
