"""vLLM's plugin on real models: eval/results/check-vllm.json and .md.

Prompts of 5 to 3,000 tokens at once: greedy text and log-probabilities against `generate`, one prompt at a time; the
same with chunked prefill while other requests are given up, and where all requests lose their pages again and again.
Then requests of one length at once, of converted models and their source: how many vLLM admits into one cache space,
how fast it reads and writes; hundreds of HTTP requests, some of them cancelled or broken; and tiny random models of
every architecture in tests/model/test_architectures.py.

    bash scripts/check_vllm.sh [--parts texts room loads http architectures]
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from bench_common import Cell, Claim
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.checkpoint.sources import load_source, load_tokenizer
from linearize.recipe import load as recipes

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": str(ROOT),
}  # fmt: skip
RECIPES = {"clusters": "smollm2-135m-best", "gla": "smollm2-135m", "hybrid": "smollm2-135m-hybrid"}
"""Converted, not trained: what is compared is how a model runs, not how good it is."""
SETTINGS: dict[str, dict[str, Any]] = {
    "together": {"max_num_batched_tokens": 8192},
    "chunked, 16 given up": {"max_num_batched_tokens": 256},
    "preempted": {"max_num_batched_tokens": 2048},
}
NOISE = 1e-7
CONTROL = "`generate`, weights times 1 ± 1e-7"
TIE = 1e-3
"""Difference of the two largest logits below which either token is right."""


def by_vllm(given: Any, script: str = "vllm_worker.py", space: int | None = 1, **task: Any) -> Any:
    """A task of a script that runs in the environment with vLLM.

    Args:
        given: the options.
        script: beside this one.
        space: GiB for pages; None where the task says how many bytes.
        **task: see there.
    """
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(given.threads)}
    environment |= {} if space is None else {"VLLM_CPU_KVCACHE_SPACE": str(space)}
    command = [given.python, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, input=json.dumps(task, default=str), env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{script}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def folders(work: Path) -> dict[str, Path]:
    """The converted models, and their source."""
    made = {name: linearize.convert(recipe, work / name) for name, recipe in RECIPES.items()}
    located = common.source_of(recipes.load(RECIPES["gla"]))
    load_source(located, "float32")[0].save_pretrained(work / "source")
    load_tokenizer(located).save_pretrained(work / "source")
    return {**{name: Path(path) for name, path in made.items()}, "source": work / "source"}


def prompts(folder: Path, count: int, longest: int, seed: int) -> list[list[int]]:
    """Pieces of the validation text, of lengths spread evenly in their logarithm, in any order."""
    draw = random.Random(seed)
    ids = AutoTokenizer.from_pretrained(folder)(common.validation_text()[:400_000])["input_ids"]
    lengths = [round(5 * (longest / 5) ** (i / max(count - 1, 1))) for i in range(count)]
    draw.shuffle(lengths)
    return [ids[(start := draw.randrange(len(ids) - n)) : start + n] for n in lengths]


@torch.no_grad()
def by_generate(model: Any, given: list[list[int]], new: int) -> list[dict[str, Any]]:
    """What transformers writes, one prompt at a time, with log-probabilities and how near the second token was."""
    texts = []
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
        texts.append({"tokens": tokens.tolist(), "logprobs": logprobs.tolist(), "gaps": gaps})
    return texts


def listed(got: dict[str, Any]) -> list[dict[str, Any]]:
    """vLLM's texts in the form of `by_generate`."""
    pairs = zip(got["tokens"], got["logprobs"], strict=True)
    return [{"tokens": tokens, "logprobs": logprobs} for tokens, logprobs in pairs]


def compared(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> Cell:
    """How many texts are equal, where not how near a tie, and the largest difference of log-probabilities before."""
    equal, ties, worst = 0, [], 0.0
    for want, have in zip(expected, got, strict=True):
        pairs = zip(want["tokens"], have["tokens"], strict=True)
        n = next((i for i, (a, b) in enumerate(pairs) if a != b), len(want["tokens"]))
        equal += n == len(want["tokens"])
        if n < len(want["tokens"]):
            ties.append(want["gaps"][n])
        worst = max([worst, *(abs(a - b) for a, b in zip(want["logprobs"][:n], have["logprobs"][:n], strict=True))])
    return {"texts": len(expected), "equal": equal, "gaps_where_not": ties, "logprob_difference": worst}


def texts(given: Any, made: dict[str, Path]) -> Iterator[Cell]:
    """The same prompts by `generate` and by vLLM; and by `generate` with weights that differ by what rounding does."""
    for name in RECIPES:
        drawn, first = prompts(made[name], given.prompts, given.longest, given.seed), None
        model: Any = linearize.load(made[name], dtype=torch.float32)[0]
        expected = by_generate(model, drawn, given.new)
        if name == "clusters":
            for parameter in (x.data for x in model.parameters() if x.ndim == 2):
                parameter.mul_(1 + NOISE * torch.randn_like(parameter))
            noisy = by_generate(model, drawn, given.new)
            yield {"part": "texts", "folder": name, "setting": CONTROL, **compared(expected, noisy)}
        for setting, values in SETTINGS.items():
            values = {"max_model_len": given.longest + given.new + 64, "max_num_seqs": 64, **values}
            got = by_vllm(
                given, task="texts", folder=made[name], prompts=drawn, new=given.new, settings=values,
                preempt=16 if setting == "preempted" else 0, abort=16 if "given up" in setting else 0,
            )  # fmt: skip
            first = first or got
            same = sum(a == b for a, b in zip(first["tokens"], got["tokens"], strict=True))
            agreement = compared(expected, listed(got))
            rest = {key: got[key] for key in ("steps", "preempted", "aborted", "most_running", "seconds", "pages")}
            yield {"part": "texts", "folder": name, "setting": setting, **agreement, "equal_to_first": same, **rest}


def loads(given: Any, made: dict[str, Path]) -> Iterator[Cell]:
    """Speed by context and concurrency."""
    ids = prompts(made["source"], 1, 5, given.seed)[0] * 40
    longest = max(context for context, _ in given.loads)
    values = {"max_model_len": longest + given.new + 16, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
    values |= {"enable_prefix_caching": False, "enforce_eager": False}
    for row in ("source", "clusters", "gla"):
        got = by_vllm(
            given, task="speed", folder=made[row], ids=ids, loads=given.loads, new=given.new, settings=values
        )  # fmt: skip
        for cell in got["cells"]:
            yield {"part": "loads", "row": row, "space_gib": 1, **cell, "pages": got["pages"]}


def room(given: Any, made: dict[str, Path]) -> Iterator[Cell]:
    """64 requests of 4,096 tokens in 64 MiB of pages: a random model of four layers, converted and not."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llama", vocab_size=512, num_key_value_heads=2, max_position_embeddings=8192, dtype="float32", **sizes
    )
    torch.manual_seed(given.seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    ids = [random.Random(given.seed).randrange(3, 500) for _ in range(4096)]
    for row, mixer in (("source", None), ("clusters", {"name": "clusters"})):
        target = made["source"].with_name(f"room-{row}")
        (model if mixer is None else linearize.linearize_(model, mixer)).save_pretrained(target)
        values = {
            "max_model_len": 4200, "max_num_seqs": 64, "max_num_batched_tokens": 8192, "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": 64 * 2**20, "enable_prefix_caching": False,
        }  # fmt: skip
        got = by_vllm(
            given, space=None, task="speed", folder=target, ids=ids, loads=[[4096, 64]], new=64, settings=values
        )
        yield {"part": "room", "row": row, **got["cells"][0], "pages": got["pages"]}


def http(given: Any, made: dict[str, Path]) -> Iterator[Cell]:
    """Hundreds of requests to a server; see scripts/load_vllm.py."""
    drawn = prompts(made["clusters"], 12, 200, given.seed)
    with tempfile.NamedTemporaryFile() as log:
        got = by_vllm(
            given, "load_vllm.py", folder=made["clusters"], prompts=drawn, new=8, requests=given.requests, at_once=24,
            seed=given.seed, log=log.name, options=["--max-model-len", "1024", "--max-num-seqs", "32"],
        )  # fmt: skip
    yield {"part": "http", **got}


def architectures(given: Any, made: dict[str, Path]) -> Iterator[Cell]:
    """Tiny random models: which of them vLLM writes the same text with, or why not."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "model")]
    from helpers.tiny import tiny_model, tiny_tokenizer
    from test_architectures import ARCHITECTURES

    work, tasks, expected = made["source"].with_name("architectures"), {}, {}
    drawn = [[random.Random(n).randrange(3, 380) for _ in range(n)] for n in (5, 60)]
    settings = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 24}
    tied = {"cohere", "cohere2", "gemma2"}  # as all their models are; vLLM knows no other
    for kind, changes in ARCHITECTURES.items():
        sizes = {**changes, "hidden_size": 128, **({} if kind == "gpt_neox" else {"head_dim": 32})}
        sizes |= {"word_embed_proj_dim": 128} if kind == "opt" else {}
        if kind == "gpt_oss":
            sizes.pop("rope_parameters")
        for name, layers in (("gla", [0, 1, 3]), ("clusters", None), ("source", None)):
            model = tiny_model(kind, tie_word_embeddings=kind in tied, **sizes)
            if name != "source":
                linearize.linearize_(model, {"name": name, "window": 16, "sinks": 2}, layers=layers)
            model.save_pretrained(work / f"{kind}-{name}")
            tiny_tokenizer().save_pretrained(work / f"{kind}-{name}")
            tasks[kind, name] = {"folder": work / f"{kind}-{name}", "prompts": drawn, "new": 12, "settings": settings}
            expected[kind, name] = by_generate(model, drawn, 12)

    def cell(kind: str, name: str, got: Any) -> Cell:
        first = {"part": "architectures", "architecture": kind, "model": name}
        if isinstance(got, str):
            return {**first, "refused": got[:400]}
        return first | compared(expected[kind, name], listed(got))

    own = [key for key in tasks if key[1] != "source"]
    for key, got in zip(own, by_vllm(given, task="several", tasks=[tasks[key] for key in own]), strict=True):
        yield (found := cell(*key, got))
        if found.get("equal", 2) < 2 and key[1] == "clusters":  # what does vLLM make of the source?
            try:
                yield cell(key[0], "source", by_vllm(given, task="texts", **tasks[key[0], "source"]))
            except RuntimeError as error:
                yield cell(key[0], "source", str(error))


PARTS = {"texts": texts, "room": room, "loads": loads, "http": http, "architectures": architectures}


def claims(cells: list[Cell]) -> list[Claim]:
    """What was promised, as far as it is measured."""
    made = []
    for cell in (each for each in cells if each["part"] == "texts" and each["setting"] != CONTROL):
        name = f"{cell['folder']}, {cell['setting']}"
        made.append(common.claim(f"{name}: texts other than together", "≤ 0", cell["texts"] - cell["equal_to_first"]))
        wrong = sum(gap > TIE for gap in cell["gaps_where_not"])
        made.append(common.claim(f"{name}: texts that differ without a near-tie", "≤ 0", wrong))
        made.append(
            common.claim(f"{name}: log-probabilities, largest difference", "≤ 0.001", cell["logprob_difference"])
        )
        lost = cell["pages"]["all"] - 1 - cell["pages"]["free"]
        made.append(common.claim(f"{name}: pages not given back", "≤ 0", lost))
    for row, limit in (("source", "≤ 8"), ("clusters", "≥ 64")):
        most = common.find(cells, "most_running", part="room", row=row)
        made += [] if most is None else [common.claim(f"{row}: requests of 4K tokens at once", limit, most)]
    for cell in (each for each in cells if each["part"] == "http"):
        made.append(common.claim("HTTP: answers wrong or lost", "≤ 0", cell["wrong"] + cell["lost"]))
        made.append(common.claim("HTTP: requests and pages left afterwards", "≤ 0", sum(cell["left"].values())))
    return made


def markdown(results: dict[str, Any]) -> list[str]:
    """The page."""
    cells = results["cells"]
    by_part = {part: [c for c in cells if c["part"] == part] for part in PARTS}
    lines = ["# vLLM's plugin against `generate`", "", __doc__.strip().partition("\n")[2].strip().partition("\n\n")[0]]
    lines += ["", f"SmolLM2-135M, fp32, vLLM on {results['settings']['threads']} thread(s) of a CPU."]
    head = ("folder", "by", "texts", "as `generate`", "as together", "log-probability differs by", "steps", "preempted")
    lines += common.table(head, [
        (c["folder"], c["setting"], str(c["texts"]), str(c["equal"]), str(c.get("equal_to_first", "")),
         f"{c['logprob_difference']:.1e}", str(c.get("steps", "")), str(c.get("preempted", "")))
        for c in by_part["texts"]
    ], left=2)  # fmt: skip
    if rooms := by_part["room"]:
        head = ("64 requests of 4,096 tokens, 64 MiB of pages, a random model of four layers", "running at most", "s")
        lines += common.table(head, [(c["row"], str(c["most_running"]), f"{c['seconds']:.0f}") for c in rooms])
    if by_part["loads"]:
        lines += ["", "Requests of one length at once, 1 GiB for pages, compiled by vLLM, no prefix caching, one run:"]
        head = ("", "context", "requests", "running at most", "read in s", "tokens/s while all write")
        lines += common.table(head, [
            (c["row"], str(c["context"]), str(c["concurrency"]), str(c["most_running"]),
             common.shown(c["reading_seconds"], ".1f"), common.shown(c["tokens_per_second"], ".1f"))
            for c in by_part["loads"]
        ])  # fmt: skip
    for c in by_part["http"]:
        grown = (c["rss_after"] - c["rss_before"]) / 2**20
        lines += ["", f"{c['requests']} HTTP requests, {c['seconds']:.0f} s: {c['right']} answered as if alone, "
                  f"{c['cancelled']} cancelled by the client, {c['refused']} broken and refused, {c['wrong']} wrong, "
                  f"{c['lost']} lost; in the second half the server's memory grew by {grown:.0f} MiB."]  # fmt: skip
    if by_part["architectures"]:
        lines += _architectures(by_part["architectures"])
    return lines + common.claims_table(results["claims"], "fp32")


def _architectures(cells: list[Cell]) -> list[str]:
    def shown(kind: str, name: str) -> str:
        row = next((c for c in cells if (c["architecture"], c["model"]) == (kind, name)), None)
        if row is None:
            return ""
        if why := row.get("refused"):
            return re.sub(r"^.*(Value error,|Error:) ", "", why.replace("\n", " ")).partition(";")[0][:160]
        return "equal" if row["equal"] == row["texts"] else "**differs**"

    columns = ("gla", "clusters", "source")
    kinds = dict.fromkeys(c["architecture"] for c in cells)
    rows = [(kind, *(shown(kind, name) for name in columns)) for kind in kinds]
    head = ("tiny random model", "gla in three of six layers", "clusters in all", "its source, where one differs")
    return common.table(head, rows, left=4)


def main() -> None:
    """Check, write, print."""
    parser = common.options(__doc__, name="check-vllm")
    parser.add_argument("--python", required=True, help="of an environment with vLLM")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--add", action="store_true", help="to what the file of results holds")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=3000)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--requests", type=int, default=500, help="over HTTP")
    parser.add_argument("--loads", type=json.loads, default=[[256, 1], [256, 16], [1024, 8], [4096, 1], [4096, 4]])
    given = parser.parse_args()
    results, target = common.begin(given)
    if given.add:
        results["cells"] = json.loads(target.read_text())["cells"]
    with tempfile.TemporaryDirectory() as work:
        made = folders(Path(work))
        for part in given.parts:
            common.collect(results, PARTS[part](given, made), claims, target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
