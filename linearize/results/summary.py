"""What follows from the columns: averages, recovery, paired differences, and what the memory adds."""

import math
from typing import Any

import numpy as np

RESAMPLES = 2000
APART = ("mmlu", "lettered")
"""How the names of tasks begin that ask for a letter: shown, but no part of the average."""
CONTROLS = ("source", "window", "converted", "student/window", "student/memory", "other")


def summarize(columns: dict[str, Any], window: int | None, seed: int = 0) -> dict[str, Any]:
    """The `summary` of results.json.

    Args:
        columns: finished columns, as in `linearize.results.schema`.
        window: tokens of exact attention; None for a model without a window.
        seed: of the bootstrap.

    Returns:
        See `linearize.results.schema.Summary`.
    """
    averages = {name: value for name, column in columns.items() if (value := average(column["tasks"])) is not None}
    return {
        "average": averages,
        "recovery": recoveries(averages, columns),
        "memory": memory_gain(columns, window, seed),
        "paired": {
            control: paired(columns["student"], columns[control], seed)
            for control in CONTROLS
            if "student" in columns and control in columns
        },
    }


def headline(tasks: dict[str, Any]) -> list[str]:
    """Tasks that enter the average: those with a chance level, without `APART`."""
    return [name for name, score in tasks.items() if score.get("chance") is not None and not name.startswith(APART)]


def average(tasks: dict[str, Any]) -> dict[str, Any] | None:
    """Plain mean of the headline scores; its standard error treats the tasks as independent. None without a score."""
    scores = [tasks[name] for name in headline(tasks)]
    if not scores:
        return None
    errors = [score["stderr"] for score in scores]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(scores)
    return {"value": sum(score["value"] for score in scores) / len(scores), "stderr": stderr, "tasks": len(scores)}


def recall_mean(column: dict[str, Any], task: str | None = None, length: int | None = None) -> float | None:
    """Plain mean of a column's recall over all lengths and depths that could be asked.

    Args:
        column: as in results.json.
        task: of this task only.
        length: at this length, in tokens, only.

    Returns:
        A fraction; None where nothing was asked.
    """
    values = [
        cell["value"]
        for cell in column.get("recall") or ()
        if cell["value"] is not None and task in (None, cell["task"]) and length in (None, cell["length"])
    ]
    return sum(values) / len(values) if values else None


def beyond(cell: dict[str, Any]) -> bool:
    """Whether a cell of recall asks for what lies beyond the window; facts without a depth are spread over the text."""
    return (1 - (cell["depth"] or 0)) * cell["multiple"] > 1


def recall_beyond(column: dict[str, Any], length: int | None = None) -> dict[str, Any] | None:
    """Plain mean of the cells that are `beyond` the window, and its standard error; None where there are none.

    Args:
        column: as in results.json.
        length: at this length, in tokens, only.
    """
    cells = [
        cell
        for cell in column.get("recall") or ()
        if cell["value"] is not None and length in (None, cell["length"]) and beyond(cell)
    ]
    if not cells:
        return None
    errors = [cell["stderr"] for cell in cells]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(cells)
    return {"value": sum(cell["value"] for cell in cells) / len(cells), "stderr": stderr}


def remembered(column: dict[str, Any]) -> float | None:
    """Most pairs of key and value that a column remembered; None where it was not asked."""
    return max((cell["pairs"] * cell["value"] for cell in column.get("capacity") or ()), default=None)


def recovery(score: float, source: float, chance: float) -> float | None:
    """Share of the distance from chance that is kept, (s - r) / (t - r), for score s, source t, chance r, if t > r."""
    return (score - chance) / (source - chance) if source > chance else None


def recoveries(averages: dict[str, Any], columns: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Raw and chance-corrected share of the source's average, per column.

    Args:
        averages: see `average`, by column.
        columns: see `summarize`.
    """
    if "source" not in averages:
        return {}
    source = averages["source"]
    tasks = columns["source"]["tasks"]
    chance = float(np.mean([tasks[name]["chance"] for name in headline(tasks)]))
    # Of a source that guesses, nothing can be lost: a ratio of two noises would only look like a result.
    guesses = source["value"] - chance <= 2 * (source["stderr"] or 0)
    return {
        name: {
            "raw": entry["value"] / source["value"] if source["value"] > 0 else None,
            "chance_corrected": None if guesses else recovery(entry["value"], source["value"], chance),
        }
        for name, entry in averages.items()
        if name != "source"
    }


def bootstrap(differences: list[np.ndarray], seed: int) -> dict[str, float]:
    """Mean over groups of the mean difference in each group, with its 95 % percentile interval.

    Args:
        differences: one array per group (task), one entry per item; items are drawn with replacement in their group.
        seed: of the resampling.

    Returns:
        difference, low, high.
    """
    rng = np.random.default_rng(seed)
    resampled = np.zeros(RESAMPLES)
    for group in differences:
        for i in range(RESAMPLES):
            resampled[i] += group[rng.integers(0, len(group), len(group))].mean() / len(differences)
    low, high = np.percentile(resampled, [2.5, 97.5])
    exact = np.mean([group.mean() for group in differences])
    return {"difference": float(exact), "low": float(low), "high": float(high)}


def paired(student: dict[str, Any], control: dict[str, Any], seed: int) -> dict[str, Any]:
    """Student minus control on the same items: per task, over the headline tasks, and in loss on the first text.

    Args:
        student: a column of results.json.
        control: another one.
        seed: of the bootstrap.

    Returns:
        See `linearize.results.schema.Paired`.
    """
    differences = {}
    for name, score in student["tasks"].items():
        other = control["tasks"].get(name)
        if other is not None and score.get("items") is not None and other.get("items") is not None:
            differences[name] = np.array(score["items"], float) - np.array(other["items"], float)
    result: dict[str, Any] = {"tasks": {name: bootstrap([values], seed) for name, values in differences.items()}}
    average_of = [differences[name] for name in headline(student["tasks"]) if name in differences]
    if average_of:
        result["average"] = bootstrap(average_of, seed)
    if "perplexity" in student and "perplexity" in control:
        ours, theirs = student["perplexity"]["texts"][0], control["perplexity"]["texts"][0]
        tokens = np.array([bucket["end"] - bucket["start"] for bucket in ours["by_position"]], float)
        blocks = [np.average(np.array(text["losses"]), axis=1, weights=tokens) for text in (ours, theirs)]
        result["loss"] = bootstrap([blocks[0] - blocks[1]], seed)
    return result


def memory_gain(columns: dict[str, Any], window: int | None, seed: int) -> dict[str, float] | None:
    """Loss that the memory takes away where it can be used: at positions from the window on, in the longest blocks.

    Args:
        columns: see `summarize`.
        window: in tokens.
        seed: of the bootstrap.

    Returns:
        See `linearize.results.schema.Memory`; None without a window, one of the two columns, or text beyond the window.
    """
    on, off = (columns.get(name, {}).get("perplexity") for name in ("student", "student/window"))
    if window is None or on is None or off is None:
        return None
    longest = max(range(len(on["texts"])), key=lambda i: on["texts"][i]["length"])
    buckets = on["texts"][longest]["by_position"]
    beyond = [i for i, bucket in enumerate(buckets) if bucket["start"] >= window]
    if not beyond:
        return None
    tokens = np.array([buckets[i]["end"] - buckets[i]["start"] for i in beyond], float)
    losses = [np.array(entry["texts"][longest]["losses"])[:, beyond] @ tokens / tokens.sum() for entry in (on, off)]
    interval = bootstrap([losses[1] - losses[0]], seed)
    return {
        "with": math.exp(losses[0].mean()),
        "without": math.exp(losses[1].mean()),
        "loss": interval["difference"],
        "low": interval["low"],
        "high": interval["high"],
        "start": buckets[beyond[0]]["start"],
    }
