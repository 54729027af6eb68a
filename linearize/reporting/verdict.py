"""Whether a student is worth deploying: five numbers of results.json, what is asked of them, and one sentence."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import InputError, suggest
from linearize.formats import format_bytes
from linearize.results.file import read
from linearize.results.numbers import interval, off_perplexity, percent
from linearize.results.summary import recall_mean

# What the report calls enough. No law: whoever needs more or less says so by --fail-under.
PERPLEXITY = 1.1  # times the source's
KEPT = 0.95  # of the source's average on tasks, and of its recall
UNKNOWN = "not measured"


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
        measured: in words.
        holds: None where it was not measured, or the interval holds both answers.
    """

    name: str
    measured: str
    holds: bool | None


def perplexity_ratio(results: dict[str, Any], column: str = "student") -> float | None:
    """Perplexity of a column over the source's, on the suite's first text."""
    ours, source = (results["columns"].get(name, {}).get("perplexity") for name in (column, "source"))
    return ours["value"] / source["value"] if ours and source else None


def _recall(results: dict[str, Any], column: str = "student") -> float | None:
    return recall_mean(results["columns"].get(column, {}))


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
    "recall": Metric("average over all recall tasks, lengths and depths", True, _recall),
}


def parse_limits(texts: list[str]) -> dict[str, float]:
    """Limits as typed, ``metric=value``.

    Raises:
        InputError: unknown metric, or no finite number.
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


def shortfalls(results: dict[str, Any] | Path, limits: dict[str, float]) -> list[str]:
    """One line for every limit that the student does not keep, or of which nothing was measured.

    Args:
        results: complete results, or their file.
        limits: metric -> limit, see `parse_limits`.
    """
    results = read(results) if isinstance(results, Path) else results
    lines = []
    for name, limit in limits.items():
        metric, bound = METRICS[name], "at least" if METRICS[name].higher_is_better else "at most"
        value = metric.of(results)
        if value is None or (value < limit if metric.higher_is_better else value > limit):
            words = "was not measured" if value is None else f"is {value:.4g}"
            lines.append(f"fell short: {name} ({metric.description}) {words}; expected {bound} {limit:g}")
    return lines


def checks(results: dict[str, Any]) -> list[Check]:
    """What is asked of a student before it is deployed; an interval that holds both answers answers neither."""
    loss, memory = (results["summary"]["paired"].get("window") or {}).get("loss"), results["summary"]["memory"]
    ratio, kept = perplexity_ratio(results), f"at least {100 * KEPT:g} % of the source's"
    asked = [
        Check(
            "it beats the window control, which costs no training",
            "{} nats per token against it (95 % interval {})".format(*interval(loss, 3)) if loss else UNKNOWN,
            _below(loss["low"], loss["high"], 0) if loss else None,
        ),
        Check(
            "the memory adds something",
            _memory_words(memory) if memory else UNKNOWN,
            _below(-memory["high"], -memory["low"], 0) if memory else None,
        ),
        Check(
            f"perplexity at most {PERPLEXITY} times the source's",
            UNKNOWN if ratio is None else f"{ratio:.2f} times",
            None if ratio is None else ratio <= PERPLEXITY,
        ),
        Check(f"{kept} average on tasks", *_kept(results)),
    ]
    ours, source = _recall(results), _recall(results, "source")
    if ours is not None and source:
        words = f"{percent(ours)} right, source {percent(source)}"
        asked.append(Check(f"{kept} recall", words, ours >= KEPT * source))
    return asked


def _kept(results: dict[str, Any]) -> tuple[str, bool | None]:
    """What is kept of the source's average on tasks, in words, and whether it is enough."""
    kept = _recovery(results)
    difference = (results["summary"]["paired"].get("source") or {}).get("average")
    if kept is None:
        return UNKNOWN, None
    if difference is None:
        return percent(kept), kept >= KEPT
    source = results["summary"]["average"]["source"]["value"]
    low, high = (1 + difference[key] / source for key in ("low", "high"))
    below = _below(low, high, KEPT)
    words = f"{percent(kept)} (95 % interval {percent(low)} to {percent(high)})"
    return words, None if below is None else not below


def _below(low: float, high: float, limit: float) -> bool | None:
    return True if high < limit else False if low >= limit else None


def answer(asked: list[Check]) -> tuple[bool | None, str]:
    """The verdict on all `checks`: yes, no or neither, and in a few words."""
    control, memory, *quality = (check.holds for check in asked)
    if control is False:
        return False, "No: the window control, which costs no training, does as well"
    if memory is False:
        return False, "No: the memory adds nothing"
    if False in quality:
        return False, "Not in place of the source: too much quality is lost"
    if None in (control, memory, *quality):
        return None, "Cannot be told yet: see the open checks below"
    return True, "Yes: it keeps the source's quality"


def told(results: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The words of a verdict, and up to three numbers: value and meaning. With numbers, the words leave out what they
    say."""
    shown = _key_numbers(results)
    if len(shown) < 3:
        return sentences(results), shown
    return (f"The memory {_memory_words(results['summary']['memory'])}." if results["summary"]["memory"] else ""), shown


def _key_numbers(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Perplexity, then recall or the tasks, then the cache or what else was measured; three at most."""
    shown = []
    ratio, control = perplexity_ratio(results), perplexity_ratio(results, "window")
    if ratio is not None:
        beside = "" if control is None else f" (window control: {control:.2f})"
        shown.append((f"{ratio:.2f} ×", f"the source's perplexity{beside}"))
    ours, source = _recall(results), _recall(results, "source")
    if ours is not None and source is not None:
        shown.append((percent(ours), f"recalled (source: {percent(source)})"))
    if common := _common_speed(results["columns"]):
        student, beside_it = common
        where = f"cache at {student['context']} tokens"
        shown.append(
            (format_bytes(student["cache_bytes"]), f"{where} (source: {format_bytes(beside_it['cache_bytes'])})")
        )
    kept, control = _recovery(results), _recovery(results, "window")
    if kept is not None:
        beside = "" if control is None else f" (window control: {percent(control)})"
        shown.append((percent(kept), f"of the source's average on tasks{beside}"))
    if results["summary"]["memory"]:
        shown.append((f"−{off_perplexity(results['summary']['memory'])[0]:.1f} %", "perplexity by the memory"))
    return shown[:3]


def sentences(results: dict[str, Any]) -> str:
    """What was kept, beside the control, what the memory adds, what is saved; without what was not measured."""
    parts = []
    ratio, control = perplexity_ratio(results), perplexity_ratio(results, "window")
    if ratio is not None:
        beside = "" if control is None else f" (window control: {control:.2f} times)"
        parts.append(f"Its perplexity is {ratio:.2f} times the source's{beside}.")
    kept, control = _recovery(results), _recovery(results, "window")
    if kept is not None:
        beside = "" if control is None else f" (window control: {percent(control)})"
        parts.append(f"It keeps {percent(kept)} of the source's average on tasks{beside}.")
    if results["summary"]["memory"]:
        parts.append(f"The memory {_memory_words(results['summary']['memory'])}.")
    ours, source = _recall(results), _recall(results, "source")
    if ours is not None and source is not None:
        parts.append(f"It recalls {percent(ours)} of what was asked, the source {percent(source)}.")
    return " ".join(parts + _saved(results["columns"]))


def _saved(columns: dict[str, Any]) -> list[str]:
    """Cache and time per token against the source at the longest context that both were measured at, one row."""
    common = _common_speed(columns)
    if common is None:
        return []
    sizes = [format_bytes(cell["cache_bytes"]) for cell in common]
    time = common[0]["token_seconds"] / common[1]["token_seconds"]
    return [
        f"At a context of {common[0]['context']} tokens its cache takes {sizes[0]}, the source's {sizes[1]}, and a "
        f"token takes {time:.2f} of the source's time."
    ]


def _common_speed(columns: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Student and source at the longest context that both were measured at, one row."""
    ours, source = (
        {cell["context"]: cell for cell in columns.get(name, {}).get("speed") or () if cell["batch"] == 1}
        for name in ("student", "source")
    )
    common = ours.keys() & source.keys()
    return (ours[max(common)], source[max(common)]) if common else None


def _memory_words(memory: dict[str, float]) -> str:
    return "takes {:.1f} % off the perplexity beyond the window (95 % interval {:.1f} to {:.1f} %)".format(
        *off_perplexity(memory)
    )
