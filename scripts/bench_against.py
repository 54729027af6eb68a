"""Paired decoding benchmark against an earlier commit or another folder: eval/results/bench-against.json and .md.

    python scripts/bench_against.py --folder runs/best/0-converted --commit d7b08a5
    python scripts/bench_against.py --folder runs/best/0-converted --other runs/smaller/0-converted

One process opens the folder with the package of this tree, one the other folder with that of the commit. Their pieces
are interleaved, so that noise of the machine meets both alike.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_common as common
from bench_common import Cell

WARM_UP = 2
"""Pieces that are not counted."""
WORKER = """
import json, sys
import torch, linearize
from transformers import AutoModelForCausalLM, DynamicCache

task = json.loads(sys.argv[1])
torch.set_num_threads(task["threads"])
model = AutoModelForCausalLM.from_pretrained(task["folder"], dtype=torch.float32).eval()
ids = torch.randint(100, 1000, (1, task["context"]), generator=torch.Generator().manual_seed(task["seed"]))
cache = DynamicCache(config=model.config)
with torch.no_grad():
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(task["steps"]):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        print(int(token), flush=True)
"""


def start(tree: Path, task: dict[str, Any]) -> subprocess.Popen[str]:
    """A process that decodes a piece for every line it is given, by the package in a tree."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(task)], env={**os.environ, "PYTHONPATH": str(tree)}, cwd=tree,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def piece(process: subprocess.Popen[str], tokens: list[int]) -> None:
    """Have a process decode a piece, whose last token is added to `tokens`."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    tokens.append(int(process.stdout.readline()))


def ratio(pairs: list[tuple[float, ...]], seed: int) -> Cell:
    """Median of the ratios now / then, with its 95 % interval over pairs drawn again."""
    ratios, rng = [now / then for now, then in pairs], random.Random(seed)
    again = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"ratio": median(ratios), "low": again[50], "high": again[1949], "pairs": len(pairs)}


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, name="bench-against")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--commit", default="HEAD", help="of the other one's package (default: %(default)s)")
    parser.add_argument("--other", type=Path, help="folder; default: the same, which both versions must open")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--steps", type=int, default=16, help="of a piece")
    parser.add_argument("--pairs", type=int, default=40)
    given = parser.parse_args()
    results, target = common.begin(given)
    here, rows = Path(__file__).resolve().parents[1], []
    with tempfile.TemporaryDirectory() as work:
        then = Path(work) / "then"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", then, given.commit], cwd=here, check=True)
        try:
            for context in given.contexts:
                task = {key: getattr(given, key) for key in ("threads", "seed", "steps")}
                sides = ((here, given.folder), (then, given.other or given.folder))
                both = [start(tree, {**task, "folder": str(f.resolve()), "context": context}) for tree, f in sides]
                tokens: list[list[int]] = [[], []]
                calls = {side: partial(piece, both[side], tokens[side]) for side in (0, 1)}
                seconds = common.interleaved(calls, given.pairs + WARM_UP)
                pairs = list(zip(*(seconds[side][WARM_UP:] for side in (0, 1)), strict=True))
                for process in both:
                    process.kill()
                ms = 1e3 * median(now for now, _ in pairs) / given.steps
                cell = {
                    "context": context,
                    **ratio(pairs, given.seed),
                    "ms_per_token": ms,
                    "same_tokens": tokens[0] == tokens[1],
                }
                results.setdefault("cells", []).append(cell)
                common.save(results, target)
                interval = f"{cell['ratio']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})"
                rows.append((f"{context:,}", f"{ms:.1f}", interval, "yes" if cell["same_tokens"] else "no"))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", then], cwd=here, check=True)
    other = f"`{given.other or given.folder}` at {given.commit}"
    head = ("context", "ms per token", "time over the other's", "same tokens")
    about = [
        f"`{given.folder}` beside {other}: one text in fp32, {given.pairs} pairs of {given.steps} tokens in turns,"
    ]
    about += [f"{given.threads} threads; median of the ratios, with its 95 % interval."]
    common.write_markdown([*about, *common.table(head, rows)], target)


if __name__ == "__main__":
    main()
