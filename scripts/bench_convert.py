"""Time and memory of a conversion against `cp -r` of the same folder: eval/results/bench-convert.json and .md.

A random bf16 Llama is written shard by shard, copied, converted, converted with hard links, and, at a second shape,
cast to float16. Before every run, what the one before left on disk is removed and written back.

    python scripts/bench_convert.py                       # Llama-3-8B's shape: 16 GB, three times that of free disk
    python scripts/bench_convert.py --shape 160m --cast-shape 160m --name short
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from bench_common import Cell
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.checkpoint.room import check_space
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.errors import InputError
from linearize.evaluation.clock import PEAK, read_task, status, timed
from linearize.formats import format_bytes
from linearize.recipe import load as recipes

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "160m": (768, 2048, 12, 12, 12, 32000),
    "tiny": (64, 128, 2, 4, 2, 500),
}


def write_source(folder: Path, shape: str, shard_bytes: int) -> int:
    """A random bf16 folder, with never more than a shard in memory; returns its bytes."""
    sizes = dict(zip(SIZES, SHAPES[shape], strict=True))
    config = AutoConfig.for_model("llama", **sizes, dtype="bfloat16", tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    size = sum(tensor.nbytes for tensor in tensors.values())
    check_space(folder, 3 * size)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))  # looked at, and copied
    for file, names in split.filename_to_tensors.items():
        shard = {name: torch.empty(tensors[name].shape, dtype=torch.bfloat16).normal_(std=0.02) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def worker(source: Path, out: Path, dtype: str = "auto", link: bool = False) -> Cell:
    """One conversion without the imports, which take the same for all sizes."""
    wanted = recipes.from_dict({"source": {"id": str(source)}, "convert": {"mixer": {"name": "gla"}, "dtype": dtype}})
    _, seconds = timed(lambda: convert(locate(str(source)), wanted, out, link=link), torch.device("cpu"))
    return {"seconds": seconds, "peak_rss": status(PEAK)}


def once(source: Path, out: Path, way: str, options: dict[str, Any]) -> Cell:
    """One way to fill `out`, with the seconds until it is on disk; the memory of `cp` is a few MiB and not measured."""
    os.sync()
    start = time.perf_counter()
    if way == "cp -r":
        subprocess.run(["cp", "-r", source, out], check=True)
        cell = {"seconds": time.perf_counter() - start, "peak_rss": 0}
    else:
        cell = common.in_own_process(__file__, source=source, out=out, **options)
    start = time.perf_counter()
    os.sync()
    cell["until_on_disk"] = cell["seconds"] + time.perf_counter() - start
    shutil.rmtree(out)
    return cell


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines: the ratios, and a row per way."""
    rows = [
        (name, row["shape"], format_bytes(row["bytes"]), f"{row['seconds']:.2f}", f"{row['until_on_disk']:.2f}",
         format_bytes(row["peak_rss"]) if row["peak_rss"] else "")
        for name, row in results["runs"].items()
    ]  # fmt: skip
    return [
        f"Conversion of random bf16 Llamas on {results['environment']['cores']} cores, best of "
        f"{results['settings']['repeats']}; seconds of the work itself, then until it is on disk. convert / cp -r = "
        f"{results['ratio']:.2f}, on disk {results['ratio_until_on_disk']:.2f}.",
        *common.table(("", "shape", "size", "seconds", "on disk", "peak memory"), rows, left=2),
    ]


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, name="bench-convert")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--cast-shape", choices=SHAPES, default="1b")
    parser.add_argument("--shard-bytes", type=int, default=5 << 30)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", default="runs/bench-convert", help="scratch, removed at the end")
    given = parser.parse_args()
    if given.worker:
        return print(json.dumps(worker(**read_task())))
    ways: dict[str, dict[str, Any]] = {"cp -r": {}, "convert": {}, "convert --link": {"link": True}}
    cast = {"convert --dtype float16": {"dtype": "float16"}}
    results, target = common.begin(given)
    source, out = Path(given.folder) / "source", Path(given.folder) / "target"
    runs: dict[str, Cell] = {}
    try:
        for shape, names in ((given.shape, ways), (given.cast_shape, cast)):
            size = write_source(source, shape, given.shard_bytes)
            for way, options in list(names.items()) * given.repeats:
                cell = once(source, out, way, options)
                if way not in runs or cell["seconds"] < runs[way]["seconds"]:
                    runs[way] = {"shape": shape, "bytes": size, **cell}
            shutil.rmtree(source)
    except InputError as error:
        raise SystemExit(str(error)) from None
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    for name, key in (("ratio", "seconds"), ("ratio_until_on_disk", "until_on_disk")):
        results[name] = runs["convert"][key] / runs["cp -r"][key]
    results["runs"] = runs
    common.save(results, target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
