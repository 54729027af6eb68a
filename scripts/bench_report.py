"""What scripts/bench_decode.py writes from its cells: the promised numbers, a table and a plot.

python scripts/bench_report.py eval/results/bench-decode-NAME.json      # table and plot anew
"""

import json
import sys
from pathlib import Path
from typing import Any

from bench_common import Cell, claim, claims_table, find

from linearize.errors import InputError
from linearize.evaluation.speed import COLUMNS as KINDS
from linearize.reporting.plot import Points, draw_speed

SOURCE, WINDOW, STUDENT = ({"kind": kind} for kind in KINDS)


def claims(cells: list[Cell]) -> list[dict[str, Any]]:
    """The numbers that the product promises, where this run has measured what they need (batch 1, fp32)."""
    one = {"dtype": "float32", "batch": 1}
    found: list[dict[str, Any]] = []

    def ratio(name: str, limit: str, over: dict[str, Any], under: dict[str, Any], key: str) -> None:
        top, bottom = find(cells, key, **one, **over), find(cells, key, **one, **under)
        if top and bottom:
            found.append(claim(name, limit, top / bottom))

    for context, limit in ((256, "≥ 0.95"), (8192, "≥ 1.6"), (32768, "≥ 4")):
        at = {"part": "decode", "context": context}
        ratio(f"speed over the source at {context}", limit, at | SOURCE, at | STUDENT, "seconds")
    for context in sorted({cell["context"] for cell in cells if cell["part"] == "decode"}):
        at = {"part": "decode", "context": context}
        ratio(f"time over the window control at {context}", "≤ 1.15", at | STUDENT, at | WINDOW, "seconds")
        if context > 1024:
            base = {"part": "decode", "context": 1024} | STUDENT
            ratio(f"time at {context} over 1024", "≤ 1.1", at | STUDENT, base, "seconds")
    for part, key, limit in (("memory", "peak_bytes", "≤ 1.02"), ("decode", "cache_bytes", "≤ 1")):
        at = {"part": part} | STUDENT
        ratio(f"{key} at 32768 over 1024", limit, at | {"context": 32768}, at | {"context": 1024}, key)
    at = {"part": "decode", "context": 32768}
    ratio("cache bytes over the source's at 32768", "≤ 0.01", at | STUDENT, at | SOURCE, "cache_bytes")
    at = {"part": "prefill"} | STUDENT
    ratio("prefill time, 16384 over 8192", "≤ 2.1", at | {"context": 16384}, at | {"context": 8192}, "seconds")
    at = {"part": "prefill", "context": 8192}
    ratio("prefill time over the source's at 8192", "≤ 0.7", at | STUDENT, at | SOURCE, "seconds")
    peak = find(cells, "peak_bytes", part="long", context=100_000)
    if peak:
        found.append(claim("bytes of a prefill of 100000 tokens", "≤ 4e9", peak))
    return found


def markdown(results: dict[str, Any]) -> str:
    """Tables: decoding, prefill, claims."""
    cells, machine = results["cells"], results["environment"]
    lines = [
        f"Decoding of {results['recipe']}: {machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}.",
        "Milliseconds per token (median), bytes of the cache, peak resident memory while decoding.",
        "",
        "| dtype | batch | context | source | window | student | source / student | cache source | cache student "
        "| peak source | peak student |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    keys = sorted(
        {(c["dtype"], c["batch"], c["context"]) for c in cells if c["part"] in ("decode", "memory")}, reverse=False
    )
    for dtype, batch, context in keys:
        at = {"dtype": dtype, "batch": batch, "context": context}
        times = [find(cells, "seconds", part="decode", **at, kind=kind) for kind in KINDS]
        speed = f"{times[0] / times[2]:.2f}" if times[0] and times[2] else ""
        row = [dtype, str(batch), str(context), *(f"{1e3 * t:.1f}" if t else "" for t in times), speed]
        for part, key in (("decode", "cache_bytes"), ("memory", "peak_bytes")):
            for kind in ("source", "student"):
                value = find(cells, key, part=part, **at, kind=kind)
                row.append(f"{value / 2**20:.1f} MiB" if value else "")
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| prefill | source | window | student |", "|---:|---:|---:|---:|"]
    for context in sorted({cell["context"] for cell in cells if cell["part"] == "prefill"}):
        times = [find(cells, "seconds", part="prefill", context=context, kind=kind) for kind in KINDS]
        lines.append(f"| {context} | {' | '.join(f'{t:.2f} s' if t else '' for t in times)} |")
    for cell in (cell for cell in cells if cell["part"] == "profile"):
        top = ", ".join(f"{op['name']} {op['share']:.0%} ({op['calls']:.0f} calls)" for op in cell["operators"][:6])
        lines += ["", f"A step of the {cell['kind']} at {cell['context']}: {top}."]
    for cell in (cell for cell in cells if cell["part"] == "long" and "peak_bytes" in cell):
        size, seconds = cell["peak_bytes"] / 2**30, cell["seconds"]
        lines += ["", f"{cell['context']} tokens in pieces of {cell['piece']}: {size:.2f} GiB, {seconds:.0f} s."]
    return "\n".join([*lines, *claims_table(results["claims"], "batch 1, fp32")]) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Time per token and cache bytes against the context, a panel per dtype and batch; nothing without matplotlib."""
    cells = [cell for cell in results["cells"] if cell["part"] == "decode"]
    panels: dict[str, dict[str, Points]] = {}
    for cell in sorted(cells, key=lambda cell: (cell["dtype"], cell["batch"], KINDS.index(cell["kind"]))):
        points = panels.setdefault(f"{cell['dtype']}, batch {cell['batch']}", {}).setdefault(cell["kind"], [])
        points.append((cell["context"], cell["seconds"], cell["cache_bytes"]))
    try:
        draw_speed(panels, path)
    except InputError as error:
        print(f"no plot: {error}", file=sys.stderr)


def write(results: dict[str, Any], path: Path) -> str:
    """Table and plot beside the results file; returns the table."""
    table = markdown(results)
    path.with_suffix(".md").write_text(table)
    plot(results, path.with_suffix(".png"))
    return table


if __name__ == "__main__":
    print(write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1])))
