"""Whether a student is worth deploying: five numbers of results.json, what is asked of them, and one sentence."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from linearize.errors import InputError, suggest
from linearize.formats import format_bytes

# What the report calls enough. No law: whoever needs more or less says so by --fail-under.
PERPLEXITY = 1.1  # times the source's
KEPT = 0.95  # of the source's average on tasks, and of its recall


@dataclass(frozen=True)
class Metric:
    """A number that `--fail-under` can ask for.

    Attributes:
        description: in words.
        higher_is_better: whether the limit is the least or the most allowed.
        of: the number in results; None where it was not measured.
    """

    description: str
    higher_is_better: bool
    of: Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Check:
    """One condition for deploying.

    Attributes:
        name: what is asked.
        found: what was measured, in words.
        holds: None where it was not measured, or the interval holds both answers.
    """

    name: str
    found: str
    holds: bool | None


def perplexity_ratio(results: dict[str, Any], column: str = "student") -> float | None:
    """Perplexity of a column over the source's, on the suite's first text."""
    measured = [results["columns"].get(name, {}).get("perplexity") for name in (column, "source")]
    return measured[0]["value"] / measured[1]["value"] if measured[0] and measured[1] else None


def recall(results: dict[str, Any], column: str = "student") -> float | None:
    """Plain mean over all recall tasks, lengths and depths of a column that could be asked."""
    entries = results["columns"].get(column, {}).get("recall")
    values = [entry["value"] for entry in entries or () if entry["value"] is not None]
    return float(np.mean(values)) if values else None


def _recovery(results: dict[str, Any], column: str = "student") -> float | None:
    return (results["summary"]["recovery"].get(column) or {}).get("raw")


def _memory(results: dict[str, Any]) -> float | None:
    return (results["summary"]["memory"] or {}).get("loss")


def _kl(results: dict[str, Any]) -> float | None:
    return (results["columns"].get("student", {}).get("behaviour") or {}).get("kl", {}).get("value")


METRICS = {
    "recovery": Metric("share of the source's average on tasks that is kept", True, _recovery),
    "perplexity_ratio": Metric("perplexity over the source's", False, perplexity_ratio),
    "memory_gain": Metric("nats per token that the memory takes away beyond the window", True, _memory),
    "kl": Metric("nats per token from the source's distribution", False, _kl),
    "recall": Metric("average over all recall tasks, lengths and depths", True, recall),
}


def parse_limits(texts: list[str]) -> dict[str, float]:
    """Limits as typed, ``metric=value``.

    Raises:
        InputError: unknown metric, or no number.
    """
    limits = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in METRICS:
            raise InputError(f"--fail-under {text}: unknown metric {name!r}. {suggest(name, METRICS)}")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise InputError(f"--fail-under {text}: found {value!r}; expected a number, as in {name}=0.9") from error
        if not math.isfinite(limits[name]):
            raise InputError(f"--fail-under {text}: found {value!r}; expected a finite number, as in {name}=0.9")
    return limits


def shortfalls(results: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """One line for every limit that the student does not keep, or of which nothing was measured."""
    lines = []
    for name, limit in limits.items():
        metric, bound = METRICS[name], "at least" if METRICS[name].higher_is_better else "at most"
        value = metric.of(results)
        if value is None or (value < limit if metric.higher_is_better else value > limit):
            found = "was not measured" if value is None else f"is {value:.4g}"
            lines.append(f"fell short: {name} ({metric.description}) {found}; expected {bound} {limit:g}")
    return lines


def checks(results: dict[str, Any]) -> list[Check]:
    """What is asked of a student before it is deployed; an interval that holds both answers answers neither."""
    paired, memory = results["summary"]["paired"], results["summary"]["memory"]
    control = (paired.get("window") or {}).get("loss")
    list_of = [
        Check(
            "it beats the window control, which costs no training",
            _interval(control, "nats per token against it", 3) if control else "not measured",
            _below(control["low"], control["high"], 0) if control else None,
        ),
        Check(
            "the memory adds something",
            _memory_words(memory) if memory else "not measured",
            None if memory is None else _below(-memory["high"], -memory["low"], 0),
        ),
    ]
    ratio = perplexity_ratio(results)
    found = "not measured" if ratio is None else f"{ratio:.2f} times"
    list_of.append(
        Check(
            f"perplexity at most {PERPLEXITY} times the source's", found, None if ratio is None else ratio <= PERPLEXITY
        )
    )
    list_of.append(_kept_check(results))
    ours, theirs = recall(results), recall(results, "source")
    if ours is not None and theirs:
        found = f"{_percent(ours)} right, source {_percent(theirs)}"
        list_of.append(Check(f"at least {100 * KEPT:g} % of the source's recall", found, ours >= KEPT * theirs))
    return list_of


def _kept_check(results: dict[str, Any]) -> Check:
    name = f"at least {100 * KEPT:g} % of the source's average on tasks"
    kept = _recovery(results)
    difference = (results["summary"]["paired"].get("source") or {}).get("average")
    if kept is None:
        return Check(name, "not measured", None)
    if difference is None:
        return Check(name, _percent(kept), kept >= KEPT)
    source = results["summary"]["average"]["source"]["value"]
    low, high = (1 + difference[key] / source for key in ("low", "high"))
    below = _below(low, high, KEPT)
    return Check(
        name,
        f"{_percent(kept)} (95 % interval {_percent(low)} to {_percent(high)})",
        None if below is None else not below,
    )


def _below(low: float, high: float, limit: float) -> bool | None:
    return True if high < limit else False if low >= limit else None


def answer(found: list[Check]) -> tuple[bool | None, str]:
    """The verdict on all checks: yes, no or neither, and in a few words."""
    control, memory, *quality = (check.holds for check in found)
    if control is False:
        return False, "No: the window control, which costs no training, does as well"
    if memory is False:
        return False, "No: the memory adds nothing"
    if False in quality:
        return False, "Not in place of the source: too much quality is lost"
    if None in (control, memory, *quality):
        return None, "Cannot be told yet: see the open checks below"
    return True, "Yes: it keeps the source's quality"


def sentences(results: dict[str, Any]) -> str:
    """What was kept, beside the control, what the memory adds, what is saved; without what was not measured."""
    parts = []
    ratio, control = perplexity_ratio(results), perplexity_ratio(results, "window")
    if ratio is not None:
        beside = f" (window control: {control:.2f} times)" if control is not None else ""
        parts.append(f"Its perplexity is {ratio:.2f} times the source's{beside}.")
    kept, control = _recovery(results), _recovery(results, "window")
    if kept is not None:
        beside = f" (window control: {_percent(control)})" if control is not None else ""
        parts.append(f"It keeps {_percent(kept)} of the source's average on tasks{beside}.")
    memory = results["summary"]["memory"]
    if memory:
        parts.append(f"The memory {_memory_words(memory)}.")
    ours, theirs = recall(results), recall(results, "source")
    if ours is not None and theirs is not None:
        parts.append(f"It recalls {_percent(ours)} of what was asked, the source {_percent(theirs)}.")
    return " ".join(parts + _saved(results["columns"]))


def _saved(columns: dict[str, Any]) -> list[str]:
    """Cache and time per token against the source at the longest context that both were measured at, one row."""
    rows = [
        {row["context"]: row for row in columns.get(name, {}).get("speed") or () if row["batch"] == 1}
        for name in ("student", "source")
    ]
    common = set(rows[0]) & set(rows[1])
    if not common:
        return []
    context = max(common)
    ours, theirs = rows[0][context], rows[1][context]
    time = ours["token_seconds"] / theirs["token_seconds"]
    return [
        f"At a context of {context} tokens its cache takes {format_bytes(ours['cache_bytes'])}, the source's "
        f"{format_bytes(theirs['cache_bytes'])}, and a token takes {time:.2f} of the source's time."
    ]


def _memory_words(memory: dict[str, float]) -> str:
    gain, low, high = (100 * (1 - math.exp(-memory[key])) for key in ("loss", "low", "high"))
    return f"takes {gain:.1f} % off the perplexity beyond the window (95 % interval {low:.1f} to {high:.1f} %)"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(entry: dict[str, float], unit: str, digits: int) -> str:
    difference, low, high = (entry[key] for key in ("difference", "low", "high"))
    return f"{difference:+.{digits}f} {unit} (95 % interval {low:+.{digits}f} to {high:+.{digits}f})"
