"""What the benchmarks share: options, results as they grow, claims with their limits, tables, text."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from linearize.checkpoint.sources import Located, locate
from linearize.evaluation.clock import in_process, rotated, timed
from linearize.evaluation.environment import environment
from linearize.evaluation.suite import read_text
from linearize.recipe.schema import Recipe

Cell = dict[str, Any]
"""One measurement: what was measured, and the numbers."""
Claim = dict[str, Any]
"""{claim, limit, value, holds}: a promised number beside the measured one."""
RESULTS = Path(__file__).parents[1] / "eval" / "results"
LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment in which every tensor is a mapping of its own: the peak then counts what lives, not what malloc keeps."""


def options(doc: str | None, recipe: str | None = None, name: str | None = None) -> argparse.ArgumentParser:
    """A command line with the options that the benchmarks share; `recipe` and `name` (of the output) are defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if recipe is not None:
        parser.add_argument("--recipe", default=recipe, help="names source and mixer (default: %(default)s)")
        parser.add_argument("--set", nargs="*", default=[], help="overrides, e.g. convert.mixer.window=128")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=name, help="of the output, without suffix (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the output (default: eval/results)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def begin(given: argparse.Namespace, device: str = "cpu") -> tuple[dict[str, Any], Path]:
    """Set threads and seed; returns results that hold settings and environment, and the file they are to be in."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {key: _told(value) for key, value in vars(given).items() if key not in ("worker", "out", "name")}
    machine = environment(torch.device(device), given.seed, {})
    return {"schema": 1, "settings": settings, "environment": machine}, given.out / f"{given.name}.json"


def _told(value: Any) -> Any:
    """A setting as results hold it: files of this repository by their place in it, wherever that lies."""
    if isinstance(value, Path) and value.is_relative_to(RESULTS.parents[1]):
        return value.relative_to(RESULTS.parents[1])
    return value


def save(results: dict[str, Any], target: Path) -> None:
    """Write results as JSON."""
    target.write_text(json.dumps(results, indent=1, default=str) + "\n")


def collect(
    results: dict[str, Any], cells: Iterable[Cell], claims: Callable[[list[Cell]], list[Claim]], target: Path
) -> None:
    """Add cells as they are measured; after each one the file holds it, and the claims that can be checked by then."""
    for cell in cells:
        print(json.dumps(cell), file=sys.stderr)
        results.setdefault("cells", []).append(cell)
        results["claims"] = claims(results["cells"])
        save(results, target)


def in_own_process(script: str, **task: Any) -> Cell:
    """What a script, started with --worker, measures in a process of its own; see `clock.in_process`."""
    return in_process([script, "--worker"], task, LIVE)


def interleaved(calls: Mapping[Any, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[Any, list[float]]:
    """Seconds of every call, another one first in each round: noise of the machine meets all alike."""
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for round_ in range(repeats):
        for key in rotated(list(calls), round_):
            seconds[key].append(timed(calls[key], torch.device(device))[1])
    return seconds


def find(cells: list[Cell], key: str, **wanted: Any) -> float | None:
    """`key` of the first cell that has it and all the `wanted` values."""
    fitting = (cell for cell in cells if all(cell.get(name) == value for name, value in wanted.items()))
    return next((cell[key] for cell in fitting if key in cell), None)


def claim(name: str, limit: str, value: float) -> Claim:
    """A promised number beside the measured one; limit is `≤ x` or `≥ x`."""
    holds = value >= float(limit[2:]) if limit.startswith("≥") else value <= float(limit[2:])
    return {"claim": name, "limit": limit, "value": round(value, 4), "holds": holds}


def ratio(cells: list[Cell], name: str, limit: str, key: str, over: Cell, under: Cell, **both: Any) -> list[Claim]:
    """A claim about `key` of the cell with the values `over`, divided by that of `under`; none where one is missing."""
    top, bottom = find(cells, key, **both, **over), find(cells, key, **both, **under)
    return [claim(name, limit, top / bottom)] if top and bottom else []


def shown(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number in a table: times `scale`, in a format such as `.2f`; empty where there is none."""
    return f"{value * scale:{form}}" if value else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table after an empty one; the first `left` columns hold text, the others numbers."""
    lines = ["", f"| {' | '.join(head)} |", f"|{'---|' * left}{'---:|' * (len(head) - left)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def rows_by_length(cells: list[Cell], base: str, ms: bool, scale: float, unit: str) -> list[str]:
    """Lines of a Markdown table: for each row and length its time, that over the row `base`, and its memory."""
    lengths = sorted({cell["length"] for cell in cells if "length" in cell})
    rows = []
    for row in dict.fromkeys(cell["row"] for cell in cells if "length" in cell):
        line = [row]
        for n in lengths:
            own, other = (find(cells, "seconds", part="time", row=name, length=n) for name in (row, base))
            line += [shown(own, ".1f", 1e3) if ms else shown(own, ".2f")]
            line += [shown(own / other if own and other else None, ".3f")]
            line += [shown(find(cells, "peak_bytes", part="memory", row=row, length=n), ".0f" if ms else ".2f", scale)]
        rows.append(line)
    head = [title for n in lengths for title in (f"{n}: {'ms' if ms else 's'}", f"of the {base}", unit)]
    return table(("", *head), rows)


def claims_table(claims: list[Claim], what: str) -> list[str]:
    """Lines of a Markdown table of claims."""
    rows = [(c["claim"], c["limit"], f"{c['value']:.4g}", "yes" if c["holds"] else "no") for c in claims]
    return table((f"claim ({what})", "limit", "measured", ""), rows)


def write_markdown(lines: list[str], target: Path) -> None:
    """Write lines beside the results file, and print them."""
    text = "\n".join(lines) + "\n"
    target.with_suffix(".md").write_text(text)
    print(text)


def validation_text() -> str:
    """The embedded validation half of WikiText-2, which no recipe trains on."""
    return read_text("wikitext2_valid")[0]


def source_of(wanted: Recipe) -> Located:
    """Where the source of a recipe lies."""
    return locate(wanted.source.id, wanted.source.revision, package=wanted.source.package)
