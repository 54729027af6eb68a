"""Tables of the documentation that come from committed results: which number, out of which file, in which words."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from linearize.formats import format_bytes
from linearize.results.summary import recall_mean

RESULTS = Path(__file__).parents[1] / "eval" / "results"
GLA, CLUSTERS, HYBRID, LIGER = (
    "report-smollm2-135m.json", "smollm2-135m-best.json", "smollm2-135m-hybrid.json", "liger-smollm2-135m.json"
)  # fmt: skip
TRAINED = {
    "window alone": (CLUSTERS, "window", ""),
    "`gla`: recipe `smollm2-135m`": (GLA, "student", "49,152"),
    "`clusters`, not trained": (CLUSTERS, "converted", ""),
    "`clusters`: recipe `smollm2-135m-best`": (CLUSTERS, "student", "131,072"),
    "`clusters` + 4 softmax layers: `smollm2-135m-hybrid`": (HYBRID, "student", "32,768"),
    "Liger as published": (LIGER, "student", "131,072"),
}
"""Models that were measured on the same blocks and prompts, all with a window of 64; and the tokens they trained on."""
BEYOND = 1024
"""Perplexity is given of the tokens with at least so many before them."""
WINDOWS = 4
"""Recall is given at so many windows back, at which all of them were asked."""


@cache
def read(name: str) -> dict[str, Any]:
    """A committed results file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def column(file: str, name: str) -> dict[str, Any]:
    """One column of a results file."""
    return read(file)["columns"][name]


def beyond(entry: dict[str, Any]) -> float | None:
    """Perplexity of the tokens behind `BEYOND` others."""
    ranges = entry["perplexity"]["by_position"]
    return next((each["ppl"] for each in ranges if each["start"] == BEYOND), None)


def recall(entry: dict[str, Any], windows: int = WINDOWS) -> float | None:
    """Mean share of right answers over the four tasks, that many windows back; None where not all were asked."""
    asked = [each for each in entry.get("recall") or () if each["multiple"] == windows]
    return recall_mean({"recall": asked}) if len({each["task"] for each in asked}) == 4 else None


def cached(entry: dict[str, Any], context: int = 2048) -> int | None:
    """Bytes of the cache at a context."""
    return next((cell["cache_bytes"] for cell in entry.get("speed") or () if cell["context"] == context), None)


def _times(value: float | None, of: float | None) -> str:
    return "" if value is None or of is None else f"{value / of:,.0f} ×" if value > 100 * of else f"{value / of:.2f} ×"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def trained() -> str:
    """What was trained and measured on the same text, beside the source."""
    source = column(CLUSTERS, "source")

    def row(name: str, file: str, which: str, tokens: str) -> list[str]:
        entry, average = column(file, which), read(file)["summary"]["average"].get(which)
        size = cached(column(file, "student") if which == "converted" else entry)
        return [
            name,
            tokens,
            _times(entry["perplexity"]["value"], source["perplexity"]["value"]),
            _times(beyond(entry), beyond(source)),
            _share(recall(entry)),
            "" if average is None else f"{100 * average['value']:.1f} ± {100 * average['stderr']:.1f}",
            "" if size is None else format_bytes(size),
        ]

    header = (
        "", "trained on, tokens", "perplexity, 512 tokens", f"… behind {BEYOND} tokens",
        f"recall, {WINDOWS} windows back", "six tasks", "cache at 2048 tokens",
    )  # fmt: skip
    entries = {"source": (CLUSTERS, "source", "")} | TRAINED
    return table(header, [row(name, *entry) for name, entry in entries.items()])


def mixers() -> str:
    """Every mixer without training, what it costs, and whether it beats the window control."""
    from linearize.conversion.costs import costs, describe
    from linearize.recipe.load import load

    untrained = read("quality-smollm2-135m.json")["columns"]
    for file in sorted(RESULTS.glob("quality-smollm2-135m-*.json")):
        untrained = read(file.name)["columns"] | untrained
    source, priced, known = untrained["source"]["perplexity"], costs(load("smollm2-135m"))["mixers"], describe()
    names = [name for name in known if name in priced and name in untrained]

    def values(name: str) -> dict[str, float]:
        return untrained[name].get("calibrated", untrained[name])["perplexity"]

    def row(name: str) -> list[str]:
        kind = "none" if name == "window" else "calibrated" if "calibrated" in untrained[name] else "as converted"
        ratios = [f"{values(name)[length] / source[length]:.3f} ×" for length in ("512", "2048")]
        change = known[name]["evidence"]
        best = (
            "the control" if change is None else f"{100 * change['change']:+.1f} % ({change['result'].split(':')[0]})"
        )
        cost = [format_bytes(priced[name]["state_bytes"]), f"{priced[name]['flops'] / 1e6:.1f}"]
        return [f"`{name}`", known[name]["about"], kind, *ratios, best, *cost]

    rows = sorted(map(row, names), key=lambda cells: float(cells[4].split()[0]))
    header = (
        "mixer", "what it is", "fitted", "perplexity, 512", "2048", "best beside the window", "cache", "MFLOP a token"
    )  # fmt: skip
    return table(header, rows, left=3)


def memories(file: str = "bench-memory.json") -> str:
    """Memories with the same bytes of cache beside a longer window, untrained unless a row says otherwise."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for cell in read(file)["cells"]:
        row = rows.setdefault((cell["row"], cell.get("cache", "")), {})
        row |= {"clusters, exact tokens or window": str(cell.get("number", ""))}
        row |= {"cache": format_bytes(cell["bytes"])} if "bytes" in cell else {"cache": ""}
        row |= _measured(cell)
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    lines = ([row, *(entries.get(name, "") for name in columns)] for (row, _), entries in rows.items())
    return table(("", *columns), lines)


def _measured(cell: dict[str, Any]) -> dict[str, str]:
    """Column -> entry, of one measurement of a memory."""
    if cell["part"] == "recall":
        return {
            f"{cell['task']}, {cell['back']} windows back": f"{100 * cell['value']:.0f} ± {100 * cell['stderr']:.0f} %"
        }
    if cell["part"] == "speed":
        return {"a token": f"{1e3 * cell['token_seconds']:.0f} ms", "prefill": f"{cell['prefill_seconds']:.1f} s"}
    if cell["part"] == "kl":
        return {f"KL, {cell['text']}": f"{statistics.mean(cell['kl']):.4f}"}
    mean, low, high = cell["over_source"]
    return {cell["text"]: f"{mean:.3f} × ({low:.3f} to {high:.3f})" if low < high else "1 ×"}


def peers(length: int) -> str:
    """A converted folder beside kvpress's presses behind contexts of one length."""
    cells = [cell for cell in read("peers.json")["cells"] if cell["length"] == length]
    by_task = {(cell["system"], cell["task"]): cell for cell in cells}
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))

    def shown(cell: dict[str, Any] | None) -> str:
        if cell is None:
            return ""
        scale, form, unit = (1, "+.3f", "") if cell["task"].startswith("text") else (100, ".0f", " %")
        error = "" if cell["stderr"] is None else f" ± {scale * cell['stderr']:{form.lstrip('+')}}"
        return f"{scale * cell['value']:{form}}{error}{unit} ({cell['n']})"

    systems = dict.fromkeys(system for system, _ in by_task)
    rows = ([system, *(shown(by_task.get((system, task))) for task in tasks)] for system in systems)
    return table(("", *tasks), rows)


def decoding() -> str:
    """Milliseconds per token and cache by context, one row and fp32."""
    cells = read("bench-decode-x86_64-2-cores.json")["cells"]
    timed = [cell for cell in cells if cell["part"] == "decode" and cell["dtype"] == "float32"]

    def cell(kind: str, batch: int, context: int) -> dict[str, Any]:
        return next(each for each in timed if (each["kind"], each["batch"], each["context"]) == (kind, batch, context))

    rows = []
    for context in sorted({each["context"] for each in timed}):
        times = [f"{1e3 * cell(kind, b, context)['seconds']:.0f}" for b in (1, 8) for kind in ("source", "student")]
        sizes = [format_bytes(cell(kind, 1, context)["cache_bytes"]) for kind in ("source", "student")]
        rows.append([f"{context:,}", *times[:2], *sizes, *times[2:]])
    header = (
        "tokens before", "source, ms", "converted, ms", "source's cache", "converted cache", "8 rows: source, ms",
        "8 rows: converted, ms",
    )  # fmt: skip
    return table(header, rows, left=0)


def training() -> str:
    """Seconds of a training step and peak memory, by length of the block."""
    rows = []
    for name, file in (("gla", "bench-train.json"), ("clusters", "bench-train-clusters.json")):
        for length in (1024, 4096):
            found = {(cell["part"], cell["row"]): cell for cell in read(file)["cells"] if cell.get("length") == length}
            seconds = [found["time", which]["seconds"] for which in ("source", "student+kl")]
            peak = found.get(("memory", "student+kl"), {}).get("peak_bytes")
            rows.append([
                f"`{name}`", f"{length:,}", f"{seconds[0]:.1f} s", f"{seconds[1]:.1f} s",
                "" if peak is None else f"{peak / 2**30:.1f} GiB",
            ])  # fmt: skip
    header = (
        "mixer",
        "tokens in the block",
        "LoRA step of the source",
        "LoRA step with KL to the source",
        "peak memory",
    )
    return table(header, rows)


def quantised() -> str:
    """Perplexity, recall and bytes of source, window and student by how weights are held."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in read("bench-quantized.json")["cells"]:
        if "column" in cell:
            own = cells.setdefault((cell["column"], cell["weights"]), {})
            own |= cell | {"token_seconds": min(x.get("token_seconds", math.inf) for x in (own, cell))}
    rows = []
    for weights in dict.fromkeys(each for _, each in cells):
        own = [cells[column, weights] for column in ("source", "window", "student")]
        numbers = [f"{cell[f'perplexity_{length}']:.1f}" for length in (512, 2048) for cell in own]
        numbers += [f"{cell['recall']:.0%}" for cell in own]
        numbers += [f"{1e3 * cell['token_seconds']:.0f}" for cell in own]
        rows.append([weights, *numbers, f"{own[0]['bytes'] / 2**20:.0f}"])
    names = ("512", "2,048", "recall", "ms a token")
    of = [f"{what}: {column}" for what in names for column in ("source", "window", "student")]
    return table(("weights", *of, "MiB of weights"), rows)


def adapters() -> str:
    """Training beside each other: frozen weights in fp32, which is LoRA, and in nf4, which is QLoRA."""
    runs = [cell for cell in read("bench-quantized.json")["cells"] if cell.get("part") == "training"]
    header = ["frozen weights", *(f"KL to {each['tokens']:,} tokens" for each in runs[0]["quarters"]), "peak memory"]
    rows = (
        [run["weights"], *(f"{each['kl']:.4f}" for each in run["quarters"]), format_bytes(run["peak_bytes"])]
        for run in runs
    )
    return table(header, rows)


def graphs() -> str:
    """An exported model beside PyTorch: milliseconds a token by context, start, peak memory and size on disk."""
    cells = read("bench-onnx-gla.json")["cells"]
    contexts = sorted({cell["context"] for cell in cells if cell["part"] == "speed"})
    names = {
        "eager": ("PyTorch", "folder"), "graph fp32": ("graph, fp32", "fp32"), "graph int8": ("graph, int8", "int8"),
        "source eager": ("source, PyTorch", ""), "source graph fp32": ("source, graph, fp32", "source"),
    }  # fmt: skip
    rows = []
    for what, (said, folder) in names.items():
        times = {cell["context"]: cell["token_seconds"] for cell in cells if cell.get("what") == what}
        about: dict[str, Any] = {}
        for cell in cells:
            about |= cell if cell.get("graph") == folder and cell["part"] in ("size", "start") else {}
        own = [said, *(f"{1e3 * times[context]:.0f}" for context in contexts)]
        own += [f"{about['first_token_seconds']:.1f} s" if "first_token_seconds" in about else ""]
        rows.append(own + [format_bytes(about[key]) if key in about else "" for key in ("peak_bytes", "bytes")])
    header = (*(f"ms a token, {context:,}" for context in contexts), "to the first token", "peak memory", "on disk")
    return table(("", *header), rows)


def lossless() -> str:
    """Tokens per second of the source, drafted, and of the student alone, by context and dtype."""
    rows = []
    for dtype, measured in read("bench-lossless.json")["dtypes"].items():
        for row in measured["rows"]:
            ratios = [f"{row['ratio'][name]:.2f} ×" for name in ("lossless", "forced", "student")]
            speed = f"{row['source']['tokens_per_second']:.1f}"
            rows.append([dtype, f"{row['context']:,}", speed, *ratios, f"{row['kept']['forced']:.0%}"])
    header = ("dtype", "tokens before", "source, tokens a second", "lossless", "always four drafts", "student alone")
    return table((*header, "drafts kept"), rows)


def conversion() -> str:
    """Seconds and memory of converting folders of 8B and 1B size."""
    rows = [
        [f"`{name}`", row["shape"].upper(), format_bytes(row["bytes"]), f"{row['seconds']:.1f} s",
         format_bytes(row["peak_rss"]) if row["peak_rss"] else ""]
        for name, row in read("bench-convert.json")["runs"].items()
    ]  # fmt: skip
    return table(("command", "shape", "size", "time", "peak memory"), rows, left=2)


def suites() -> str:
    """Suites by name, with what they say of themselves."""
    files = sorted((RESULTS.parent / "suites").glob("*.yaml"))
    described = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))["description"] for file in files}
    return table(("suite", "what it measures"), ((f"`{name}`", text) for name, text in described.items()), left=2)


def results() -> str:
    """The committed results files, what they hold, and where and when they were made."""
    rows = []
    for file in sorted(RESULTS.glob("*.json")):
        facts = read(file.name).get("environment") or {}
        if facts.get("commit"):
            rows.append(
                [f"`{file.name}`", facts["date"][:10], f"`{facts['commit'][:10]}`", facts["cpu"], facts["device"]]
            )
    return table(("file in `eval/results`", "date", "commit", "processor", "device"), rows, left=5)


PARTS: dict[str, Callable[[], str]] = {
    "trained": trained,
    "mixers": mixers,
    "memories": memories,
    "budgets": partial(memories, "bench-memory-curve.json"),
    "peers-near": partial(peers, 1024),
    "peers-far": partial(peers, 4096),
    "decoding": decoding,
    "training": training,
    "conversion": conversion,
    "quantised": quantised,
    "adapters": adapters,
    "graphs": graphs,
    "lossless": lossless,
    "suites": suites,
    "results": results,
}
