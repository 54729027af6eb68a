"""What the benchmarks share: cells of results, medians, claims with their limits, the memory of this process."""

import argparse
import ctypes
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def find(cells: list[Cell], key: str, **wanted: Any) -> float | None:
    found = (cell for cell in cells if all(cell.get(name) == value for name, value in wanted.items()))
    return next((cell[key] for cell in found if key in cell), None)


def summary(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"seconds": middle, "low": low, "high": high, "samples": len(seconds)}


def rotated(items: list, by: int) -> list:
    by %= len(items)
    return items[by:] + items[:by]


def claim(name: str, limit: str, value: float) -> dict[str, Any]:
    """A promised number beside the measured one; limit is `≤ x` or `≥ x`."""
    holds = value >= float(limit[2:]) if limit.startswith("≥") else value <= float(limit[2:])
    return {"claim": name, "limit": limit, "value": round(value, 4), "holds": holds}


def claims_table(claims: list[dict[str, Any]], what: str) -> list[str]:
    lines = ["", f"| claim ({what}) | limit | measured | |", "|---|---:|---:|---|"]
    for row in claims:
        lines.append(f"| {row['claim']} | {row['limit']} | {row['value']:.4g} | {'yes' if row['holds'] else 'no'} |")
    return lines


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status, such as VmHWM, the peak of resident memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Give freed memory back and start VmHWM anew; returns the resident bytes from which it starts."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


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
