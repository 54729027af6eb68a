"""Time and memory of a conversion against `cp -r` of the same folder: eval/results/bench-convert.json and .md.

A random bf16 Llama is written shard by shard, copied, converted, converted with hard links, and, at a second shape,
cast to float16. Every run starts with what the one before left on disk removed and written back.

    python scripts/bench_convert.py                       # Llama-3-8B's shape: 16 GB, three times that of free disk
    python scripts/bench_convert.py --shape 160m --cast-shape 160m --out /tmp/bench
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.checkpoint.atomic import check_space
from linearize.checkpoint.shards import INDEX, read_folder, read_header, shard_name, write_index
from linearize.errors import InputError
from linearize.formats import format_bytes

RESULTS = Path(__file__).parent.parent / "eval" / "results" / "bench-convert"
SHARD = 5 << 30
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "160m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12, "vocab_size": 32000},
}  # fmt: skip
# Runs a command and says what it took: seconds, and the largest resident memory of this one child.
MEASURED = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - start, "peak_rss": peak, "code": code}))
"""
# The part of a conversion that the shape decides, without the import of PyTorch, which takes the same for all.
CONVERT = """
import json, re, sys, time
from pathlib import Path
from linearize import recipe
from linearize.convert import convert, plan
from linearize.checkpoint.sources import locate
source, out, dtype, link = sys.argv[1:]
values = {"source": {"id": source}, "convert": {"mixer": {"name": "gla"}, "dtype": dtype}}
wanted, located = recipe.from_dict(values), locate(source)
start = time.perf_counter()
convert(located, wanted, Path(out), link=link == "link")
seconds = time.perf_counter() - start
# Of this program alone: the ru_maxrss of a process begins with what its parent held when it was started.
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps({"seconds": seconds, "peak_rss": peak}))
"""


def write_source(folder: Path, shape: str, shard_bytes: int) -> int:
    """A random bf16 folder, with never more than a shard in memory; returns its bytes."""
    config = AutoConfig.for_model("llama", **SHAPES[shape], dtype="bfloat16", tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    size = sum(2 * torch.Size(each).numel() for each in shapes.values())
    check_space(folder, 3 * size)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # looked for, never read
    shards: list[list[str]] = [[]]
    filled = 0
    for name, each in shapes.items():
        count = 2 * torch.Size(each).numel()
        if filled + count > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += count
    torch.manual_seed(0)
    for number, names in enumerate(shards, 1):
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in names}
        save_file(tensors, folder / shard_name(number, len(shards)), metadata={"format": "pt"})
        del tensors
    if len(shards) > 1:
        files = [folder / shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
        write_index(folder, {name: tensor for file in files for name, tensor in read_header(file).items()})
        assert (folder / INDEX).is_file()
    assert len(read_folder(folder)) == len(shapes)
    return size


def measure(command: list[str], target: Path) -> dict:
    """Run once, after everything was written back; remove what it made."""
    os.sync()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    start = time.perf_counter()
    os.sync()
    written_back = time.perf_counter() - start
    found = json.loads(done.stdout)
    if found.pop("code", 0):
        raise SystemExit(f"{command}: failed")
    shutil.rmtree(target)
    return {**found, "until_on_disk": found["seconds"] + written_back}


def converted(source: Path, target: Path, dtype: str, link: str) -> dict:
    return measure([sys.executable, "-c", CONVERT, str(source), str(target), dtype, link], target)


def best(runs: list[dict]) -> dict:
    """The fastest run, with the largest memory of all."""
    return {**min(runs, key=lambda run: run["seconds"]), "peak_rss": max(run["peak_rss"] for run in runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--cast-shape", choices=SHAPES, default="1b")
    parser.add_argument("--shard-bytes", type=int, default=SHARD)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-convert"), help="scratch, removed at the end")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results, without suffix")
    given = parser.parse_args()
    rows: dict[str, dict] = {}
    source, target = given.folder / "source", given.folder / "target"
    try:
        size = write_source(source, given.shape, given.shard_bytes)
        copy = [sys.executable, "-c", MEASURED, "cp", "-r", str(source), str(target)]
        runs: dict[str, list[dict]] = {"cp -r": [], "convert": [], "convert --link": []}
        for _ in range(given.repeats):  # in turn, so that a disk that slows down slows all
            runs["cp -r"].append(measure(copy, target))
            runs["convert"].append(converted(source, target, "auto", "copy"))
            runs["convert --link"].append(converted(source, target, "auto", "link"))
        for name, each in runs.items():
            rows[name] = {"shape": given.shape, "bytes": size, **best(each)}
        shutil.rmtree(source)
        size = write_source(source, given.cast_shape, given.shard_bytes)
        cast = best([converted(source, target, "float16", "copy") for _ in range(given.repeats)])
        rows["convert --dtype float16"] = {"shape": given.cast_shape, "bytes": size, **cast}
    except InputError as error:
        raise SystemExit(str(error)) from None
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    ratio = rows["convert"]["seconds"] / rows["cp -r"]["seconds"]
    settled = rows["convert"]["until_on_disk"] / rows["cp -r"]["until_on_disk"]
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    result = {
        "machine": machine,
        "repeats": given.repeats,
        "ratio": ratio,
        "ratio_until_on_disk": settled,
        "runs": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"Conversion of random bf16 Llamas on {machine['cores']} cores, best of {given.repeats}; seconds of the work "
        f"itself, then until it is on disk. convert / cp -r = {ratio:.2f}, on disk {settled:.2f}.",
        "",
        "| | shape | size | seconds | on disk | peak memory |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['shape']} | {format_bytes(row['bytes'])} | {row['seconds']:.2f} | "
            f"{row['until_on_disk']:.2f} | {format_bytes(row['peak_rss'])} |"
        )
    text = "\n".join(lines) + "\n"
    given.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
