"""Decoding, prefill and cache by context length on a GPU, in the shapes of real models: the source, the window control
and linearized models with the same random weights, in bf16.

    python scripts/gpu_decode.py                                             # one H100: about six minutes
    python scripts/gpu_decode.py --shapes tiny --contexts 64 256 --device cpu    # whether it runs

Two ways to decode. *eager*: token by token from Python, as `generate` does unless it compiles; all models by turns in
one process (`linearize bench`). *graph*: one step captured as a CUDA graph and replayed, which is what servers do and
what the GPU itself needs: no time of Python is in it. The source decodes behind a `DynamicCache` of exactly the context
(flash attention) and behind a `StaticCache` (a masked read of the whole buffer).

Writes eval/results/gpu-decode.json after every cell, and a table (.md) beside it at the end.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import bench_common as common
import torch
from bench_common import Cell, Claim
from rehearse import SHAPES as LLAMA_SHAPES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, StaticCache
from transformers.initialization import no_init_weights

from linearize.evaluation.caches import cache_bytes
from linearize.evaluation.clock import no_memory
from linearize.evaluation.speed import interleaved, prefill, prompt
from linearize.formats import format_bytes
from linearize.model.modeling import linearize_

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "smollm2-135m": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "max_position_embeddings": 131072, "tie_word_embeddings": True},
    **LLAMA_SHAPES,
}  # fmt: skip
MIXERS: dict[str, dict[str, Any]] = {
    "window": {"name": "window", "window": 64, "sinks": 4},
    "gla": {"name": "gla", "combine": "memory", "window": 64, "sinks": 4},
    "clusters": {"name": "clusters", "combine": "memory", "window": 64, "sinks": 4},
    "clusters, 464 in int8": {"name": "clusters", "combine": "memory", "window": 64, "sinks": 4, "clusters": 464,
                              "state_dtype": "int8"},
}  # fmt: skip
REPLAYS = 20
GRAPH = "graph"
STATIC = "source, static cache"


def build(shape: str, device: str) -> dict[str, Any]:
    """The source and its linearized twins, which hold the same tensors."""
    made: dict[str, Any] = {}
    for name in ("source", *MIXERS):
        with torch.device(device), no_init_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape]), dtype=torch.bfloat16)
        if not made:
            for key, weight in model.named_parameters():
                torch.nn.init.ones_(weight) if "norm" in key else torch.nn.init.normal_(weight, std=0.02)
        for own, weight in zip(model.parameters(), made["source"].parameters() if made else (), strict=False):
            own.data = weight.data
        made[name] = (linearize_(model, MIXERS[name]) or model if name in MIXERS else model).eval()
    return made


def captured(step: Callable[[], Any], device: str) -> list[float]:
    """Seconds of `REPLAYS` replays of a step captured as a CUDA graph; without a GPU, of calls."""
    if device == "cpu":
        return common.interleaved({"step": step}, 3)["step"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph, seconds = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        step()
    for _ in range(REPLAYS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return seconds[2:]


@torch.inference_mode()
def graph_cell(model: Any, cache: Cache, ids: Tensor, device: str, filled: int) -> Cell:
    """Seconds of a token behind a context, decoded by replaying a graph; `filled` tokens are read first."""
    prefill(model, cache, ids[:, :filled], filled)
    token, position = ids[:, :1], torch.full((1, 1), ids.shape[1], device=ids.device)

    def step() -> Tensor:
        return model(token, past_key_values=cache, position_ids=position, use_cache=True).logits.argmax(-1)

    seconds = captured(step, device)
    return {
        "token_seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds),
        "cache_bytes": cache_bytes(cache), "batch": len(ids),
    }  # fmt: skip


def measured(given: argparse.Namespace) -> Iterator[Cell]:
    """Every shape, batch and context, eager and as graphs."""
    for shape in given.shapes:
        models = build(shape, given.device)
        for model in models.values():  # kernels compile at their first call
            with torch.inference_mode():
                prefill(model, DynamicCache(config=model.config), prompt(model, 1024, given.seed), 1024)
        for batch, context in ((b, c) for b in given.batches for c in given.contexts if b * c <= given.most):
            where = {"shape": shape, "batch": batch, "context": context}
            cells, failed = interleaved(models, context, batch, given.steps, given.seed)
            yield from (where | {"kind": name, "way": "eager", **cell} for name, cell in cells.items())
            yield from (where | {"kind": name, "way": "eager", "failed": why} for name, why in failed.items())
            ids = prompt(models["source"], context, given.seed).expand(batch, -1)
            for name in (*models, STATIC):
                model = models.get(name, models["source"])
                cache: Cache = DynamicCache(config=model.config)
                if name == STATIC:
                    cache = StaticCache(config=model.config, max_cache_len=context + 64)
                    # What is in its buffer does not change its time; a linearized cache is as large after any context.
                filled = context if name == "source" else min(context, 1024)
                try:
                    cell = graph_cell(model, cache, ids, given.device, filled)
                except Exception as error:  # one that cannot be captured is a result too
                    cell = {"failed": "out of memory" if no_memory(error) else repr(error)[:300]}
                yield where | {"kind": name, "way": GRAPH, **cell}
                del cache
                if given.device != "cpu":
                    torch.cuda.empty_cache()
        del models


def claims(cells: list[Cell]) -> list[Claim]:
    """A token behind 32K and 128K, as the GPU needs it, over the source's."""
    made = []
    for cell in cells:
        if cell["kind"] != "source" and cell["batch"] == 1 and cell["context"] in (32768, 131072):
            same = {key: cell[key] for key in ("shape", "way", "batch", "context")}
            name = f"{cell['shape']}, {cell['kind']}, {cell['way']}: token behind {cell['context']:,} over the source's"
            made += common.ratio(
                cells, name, "≤ 1", "token_seconds", {"kind": cell["kind"]}, {"kind": "source"}, **same
            )
    return made


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines of the tables."""
    machine, cells = results["environment"], results["cells"]
    lines = [
        f"Random weights in bf16, window 64, 4 sinks: {machine['device']}, commit "
        f"{machine['commit']}. Milliseconds a token from Python (eager) and as a CUDA graph; prefill in one pass, "
        "none where kernels compiled in it.",
    ]
    for shape, batch in dict.fromkeys((c["shape"], c["batch"]) for c in cells):
        rows = []
        here = [c for c in cells if (c["shape"], c["batch"]) == (shape, batch)]
        for context, kind in dict.fromkeys((c["context"], c["kind"]) for c in here):
            same = {"context": context, "kind": kind}
            one = [common.find(here, "token_seconds", way=way, **same) for way in ("eager", GRAPH)]
            first = common.find(here, "prefill_seconds", **same)
            size = common.find(here, "cache_bytes", **same)
            rows.append((kind, f"{context:,}", *(common.shown(x, ".2f", 1e3) for x in one),
                         common.shown(first, ".0f", 1e3), format_bytes(int(size)) if size else "failed"))  # fmt: skip
        lines += ["", f"{shape}, batch {batch}:"]
        lines += common.table(("", "context", "eager, ms", "graph, ms", "prefill, ms", "cache"), rows)
    return lines


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, name="gpu-decode")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2-135m", "llama-3.1-8b"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768, 131072])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--most", type=int, default=131072, help="tokens of all rows together (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    results, target = common.begin(given, given.device)
    common.collect(results, measured(given), claims, target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
