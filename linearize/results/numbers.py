"""How numbers of results are written for people: one rule for the table, the page, the verdict and the terminal."""

import math
from typing import Any


def fixed(value: float | None, digits: int, scale: float = 1) -> str:
    """``scale * value`` with a fixed number of decimals; empty for None."""
    return "" if value is None else f"{scale * value:.{digits}f}"


def percent(share: float | None) -> str:
    """A fraction as ``93.1 %``; empty for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def with_error(value: float | None, error: float | None, digits: int, scale: float = 1) -> str:
    """``60.0 ± 5.0``: a number and its standard error, as `fixed` writes them; no error where it is None."""
    return fixed(value, digits, scale) + ("" if error is None else f" ± {fixed(error, digits, scale)}")


def score(entry: dict[str, Any] | None) -> str:
    """A score of results.json with its standard error: fractions in per cent, everything else as it is."""
    if entry is None:
        return ""
    digits, scale = (1, 100) if entry.get("higher_is_better", True) and abs(entry["value"]) <= 1 else (2, 1)
    return with_error(entry["value"], entry["stderr"], digits, scale)


def perplexity(value: float | None) -> str:
    """Two decimals, three significant digits from 10,000 on; empty for None."""
    return "" if value is None else f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def interval(entry: dict[str, float], digits: int, scale: float = 1) -> tuple[str, str]:
    """A difference and its 95 % interval, with their signs: ``+1.0`` and ``-0.5 to +2.5``.

    Args:
        entry: difference, low, high, see `linearize.results.schema.Interval`.
        digits: decimals.
        scale: factor; 100 for points of per cent.
    """
    difference, low, high = (f"{scale * entry[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    return difference, f"{low} to {high}"


def off_perplexity(memory: dict[str, float]) -> tuple[float, float, float]:
    """What the memory takes off the perplexity, in per cent, and its 95 % interval (low, high)."""
    off, low, high = (100 * (1 - math.exp(-memory[key])) for key in ("loss", "low", "high"))
    return off, low, high


def tokens(count: float) -> str:
    """A number of tokens, in K where it is a multiple of 1024: ``32K``."""
    return f"{count / 1024:g}K" if count >= 1024 and count % 1024 == 0 else f"{count:g}"
