"""vLLM's plugin on a real model: eval/results/check-vllm.json and .md.

Prompts of 5 to 3,000 tokens at once: greedy text and log-probabilities against `generate`, one prompt at a time; the
same with chunked prefill, and where all requests lose their pages again and again. Then requests of one length at once,
of the converted model and its source: how many vLLM admits into one cache space, and how fast it reads and writes.

    bash scripts/check_vllm.sh runs/clusters runs/gla runs/hybrid SOURCE
"""

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from bench_common import Cell, Claim
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import linearize

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": str(Path(__file__).parents[1]),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "together": {"max_num_batched_tokens": 8192},
    "chunked": {"max_num_batched_tokens": 256},
    "preempted": {"max_num_batched_tokens": 2048},
}
TIE = 1e-3
"""Difference of the two largest logits below which either token is right."""


def by_vllm(python: str, space: int, **task: Any) -> Any:
    """A task of scripts/vllm_worker.py.

    Args:
        python: of the environment with vLLM.
        space: GiB for pages.
        **task: see there.
    """
    environment = os.environ | ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": str(space)}
    command = [python, str(Path(__file__).with_name("vllm_worker.py"))]
    done = subprocess.run(command, input=json.dumps(task), env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"vLLM: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def prompts(folder: str, count: int, longest: int, seed: int) -> list[list[int]]:
    """Pieces of the validation text, of lengths spread evenly in their logarithm, in any order."""
    draw = random.Random(seed)
    ids = AutoTokenizer.from_pretrained(folder)(common.validation_text()[:400_000])["input_ids"]
    lengths = [round(5 * (longest / 5) ** (i / max(count - 1, 1))) for i in range(count)]
    draw.shuffle(lengths)
    return [ids[(start := draw.randrange(len(ids) - n)) : start + n] for n in lengths]


@torch.no_grad()
def by_generate(folder: str, given: list[list[int]], new: int) -> list[dict[str, Any]]:
    """What transformers writes, one prompt at a time, with log-probabilities and how near the second token was."""
    model, _ = linearize.load(folder, dtype=torch.float32)
    found = []
    for ids in given:
        out: Any = model.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        logits = torch.cat(out.logits).float()
        best = logits.topk(2).values
        tokens = out.sequences[0, len(ids) :]
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        gaps = (best[:, 0] - best[:, 1]).tolist()
        found.append({"tokens": tokens.tolist(), "logprobs": logprobs.tolist(), "gaps": gaps})
    return found


def compared(expected: list[dict[str, Any]], got: dict[str, Any]) -> Cell:
    """How many texts are equal, where not how near a tie, and the largest difference of log-probabilities before."""
    equal, ties, worst = 0, [], 0.0
    for want, tokens, logprobs in zip(expected, got["tokens"], got["logprobs"], strict=True):
        n = next((i for i, (a, b) in enumerate(zip(want["tokens"], tokens, strict=True)) if a != b), len(tokens))
        equal += n == len(tokens)
        if n < len(tokens):
            ties.append(want["gaps"][n])
        worst = max([worst, *(abs(a - b) for a, b in zip(want["logprobs"][:n], logprobs[:n], strict=True))])
    rest = {key: got[key] for key in ("steps", "preempted", "most_running", "seconds", "pages")}
    return {"texts": len(expected), "equal": equal, "gaps_where_not": ties, "logprob_difference": worst, **rest}


def measured(given: Any) -> Iterator[Cell]:
    """All cells: texts by folder and setting, then loads of model and source."""
    for name, folder in given.folders.items():
        drawn = prompts(folder, given.prompts, given.longest, given.seed)
        expected = by_generate(folder, drawn, given.new)
        for setting, values in SETTINGS.items():
            values = {"max_model_len": given.longest + given.new + 64, "max_num_seqs": 32, **values}
            got = by_vllm(
                given.python, given.space, task="texts", folder=folder, prompts=drawn, new=given.new, settings=values,
                preempt=7 if setting == "preempted" else 0,
            )  # fmt: skip
            yield {"part": "texts", "folder": name, "setting": setting, **compared(expected, got)}
    yield from room(given)
    folders = {"converted": next(iter(given.folders.values())), "source": given.source}
    ids = prompts(folders["converted"], 1, 5, given.seed)[0] * 40
    for row, folder in folders.items():
        longest = max(context for context, _ in given.loads)
        values = {"max_model_len": longest + given.writes + 16, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
        values |= {} if row == "converted" else {"enable_prefix_caching": False}
        got = by_vllm(
            given.python, given.space, task="speed", folder=folder, ids=ids, loads=given.loads, new=given.writes,
            settings=values,
        )  # fmt: skip
        for cell in got["cells"]:
            yield {"part": "loads", "row": row, "space_gib": given.space, **cell, "pages": got["pages"]}


def room(given: Any) -> Iterator[Cell]:
    """64 requests of 4,096 tokens in 64 MiB of pages: a random model of four layers, converted and not."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llama", vocab_size=512, num_key_value_heads=2, max_position_embeddings=8192, dtype="float32", **sizes
    )
    torch.manual_seed(given.seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        for row, mixer in (("source", None), ("converted", {"name": "clusters"})):
            target = Path(folder) / row
            (model if mixer is None else linearize.linearize_(model, mixer)).save_pretrained(target)
            values = {
                "max_model_len": 4200, "max_num_seqs": 64, "max_num_batched_tokens": 8192, "skip_tokenizer_init": True,
                "kv_cache_memory_bytes": 64 * 2**20, "enable_prefix_caching": False,
            }  # fmt: skip
            ids = [random.Random(given.seed).randrange(3, 500) for _ in range(4096)]
            got = by_vllm(
                given.python, 1, task="speed", folder=str(target), ids=ids, loads=[[4096, 64]], new=64, settings=values
            )
            yield {"part": "room", "row": row, **got["cells"][0], "pages": got["pages"]}


def claims(cells: list[Cell]) -> list[Claim]:
    """What was promised, as far as it is measured."""
    made = []
    for cell in (each for each in cells if each["part"] == "texts"):
        name = f"{cell['folder']}, {cell['setting']}"
        wrong = sum(gap > TIE for gap in cell["gaps_where_not"])
        made.append(common.claim(f"{name}: texts that differ without a near-tie", "≤ 0", wrong))
        made.append(
            common.claim(f"{name}: log-probabilities, largest difference", "≤ 0.001", cell["logprob_difference"])
        )
        lost = cell["pages"]["all"] - 1 - cell["pages"]["free"]
        made.append(common.claim(f"{name}: pages not given back", "≤ 0", lost))
    for row, limit in (("source", "≤ 8"), ("converted", "≥ 64")):
        most = common.find(cells, "most_running", part="room", row=row)
        made += [] if most is None else [common.claim(f"{row}: requests of 4K tokens at once", limit, most)]
    return made


def markdown(results: dict[str, Any]) -> list[str]:
    """The page."""
    cells = results["cells"]
    lines = ["# vLLM's plugin against `generate`", "", __doc__.strip().partition("\n")[2].strip().partition("\n\n")[0]]
    head = (
        "folder",
        "setting",
        "texts",
        "equal",
        "log-probability differs by",
        "steps",
        "taken from",
        "running at most",
    )
    rows = [
        (
            c["folder"], c["setting"], str(c["texts"]), str(c["equal"]), f"{c['logprob_difference']:.1e}",
            str(c["steps"]), str(c["preempted"]), str(c["most_running"]),
        )
        for c in cells
        if c["part"] == "texts"
    ]  # fmt: skip
    lines += common.table(head, rows, left=2)
    if rooms := [c for c in cells if c["part"] == "room"]:
        head = ("64 requests of 4,096 tokens, 64 MiB of pages, a random model of four layers", "running at most", "s")
        lines += common.table(head, [(c["row"], str(c["most_running"]), f"{c['seconds']:.0f}") for c in rooms])
    loads = [c for c in cells if c["part"] == "loads"]
    if loads:
        head = ("", "context", "requests", "running at most", "read in s", "tokens/s while writing")
        rows = [
            (
                c["row"], str(c["context"]), str(c["concurrency"]), str(c["most_running"]),
                common.shown(c["reading_seconds"], ".1f"), common.shown(c["tokens_per_second"], ".1f"),
            )
            for c in loads
        ]  # fmt: skip
        lines += ["", f"Loads, {loads[0]['space_gib']} GiB for pages, fp32, the same machine, one run:"]
        lines += common.table(head, rows)
    return lines + common.claims_table(results["claims"], "fp32")


def main() -> None:
    """Check, write, print."""
    parser = common.options(__doc__, name="check-vllm")
    parser.add_argument("--python", required=True, help="of an environment with vLLM")
    parser.add_argument("--folders", type=lambda x: dict(p.split("=") for p in x.split(",")), required=True)
    parser.add_argument("--source", required=True, help="folder of the unconverted model")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=3000)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--writes", type=int, default=24)
    parser.add_argument("--space", type=int, default=1, help="GiB for pages")
    parser.add_argument("--loads", type=json.loads, default=[[256, 1], [256, 16], [2048, 1], [2048, 16]])
    given = parser.parse_args()
    results, target = common.begin(given)
    common.collect(results, measured(given), claims, target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
