"""What the benchmarks share: their text, cells of results, claims with their limits, lists on the command line."""

import argparse
import gzip
from collections.abc import Callable, Sequence
from typing import Any

from linearize.recipe.resources import package_folder

Cell = dict[str, Any]
LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment in which every tensor is a mapping of its own: the peak then counts what lives, not what malloc keeps."""


def validation_text() -> str:
    """The embedded validation half of WikiText-2, which no recipe trains on."""
    return gzip.decompress((package_folder("eval") / "data" / "wikitext2_valid.txt.gz").read_bytes()).decode()


def find(cells: list[Cell], key: str, **wanted: Any) -> float | None:
    found = (cell for cell in cells if all(cell.get(name) == value for name, value in wanted.items()))
    return next((cell[key] for cell in found if key in cell), None)


def claim(name: str, limit: str, value: float) -> dict[str, Any]:
    """A promised number beside the measured one; limit is `≤ x` or `≥ x`."""
    holds = value >= float(limit[2:]) if limit.startswith("≥") else value <= float(limit[2:])
    return {"claim": name, "limit": limit, "value": round(value, 4), "holds": holds}


def claims_table(claims: list[dict[str, Any]], what: str) -> list[str]:
    lines = ["", f"| claim ({what}) | limit | measured | |", "|---|---:|---:|---|"]
    for row in claims:
        lines.append(f"| {row['claim']} | {row['limit']} | {row['value']:.4g} | {'yes' if row['holds'] else 'no'} |")
    return lines


def numbers(text: str) -> list[int]:
    """A command line's 1,2,3."""
    return [int(item) for item in text.split(",")]


def some(options: Sequence[str]) -> Callable[[str], list[str]]:
    """A command line's a,b where only `options` may be named."""

    def parse(text: str) -> list[str]:
        unknown = [item for item in text.split(",") if item not in options]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}; allowed: {', '.join(options)}")
        return text.split(",")

    return parse
