"""The comparison of a results file as a table of text, for terminals, pages and model cards."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from linearize.formats import each_string, format_bytes, markdown
from linearize.results.file import presenting
from linearize.results.numbers import fixed, interval, off_perplexity, percent, perplexity, score, with_error
from linearize.results.summary import beyond, recall_beyond, recall_mean, remembered

Columns = dict[str, dict[str, Any]]
LEAST_ITEMS = 20
"""With fewer items, many answers may fall on one position by chance."""


@dataclass(frozen=True)
class Table:
    """A table of text: header, rows of the same length, and notes below it."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def lay_out(results: dict[str, Any], columns: list[str] | None = None) -> Table:
    """Lay the comparison out: a row per task, then averages, recovery and perplexities; the paired differences below.

    Args:
        results: valid results.
        columns: which columns, in which order; None means all.

    Returns:
        Cells of plain text: scores in per cent with their standard error, perplexities with two decimals.
    """
    shown = {name: results["columns"][name] for name in columns or results["columns"]}
    summary = results.get("summary") or {}
    tasks = _union(column["tasks"] for column in shown.values())
    rows = [row for task in tasks for row in _task_rows(task, shown)]
    rows += [*_summary_rows(summary, shown), *_perplexity_rows(shown), *_recall_rows(shown), *_capacity_rows(shown)]
    rows += _behaviour_rows(shown)
    notes = [*_text_notes(shown), *_recall_notes(shown), *_capacity_notes(shown), *_cache_notes(shown)]
    notes += [note for task in tasks for note in _position_bias(task, shown)]
    notes += [*_memory_notes(summary), *_paired_notes(summary, shown)]
    speed_rows, speed_notes = _speed(shown, results["environment"])
    return Table(["", *shown], rows + speed_rows, notes + speed_notes)


def markdown_table(results: dict[str, Any], columns: list[str] | None = None) -> str:
    """The same table in Markdown, with its notes as a list below it; arguments as of `lay_out`."""
    with presenting([results]):
        content = lay_out(each_string(results, markdown), columns)
    lines = [content.header, ["---", *("---:" for _ in content.header[1:])], *content.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([text, "", *(f"- {note}" for note in content.notes)]).rstrip() + "\n"


def speed_cell(column: dict[str, Any], context: int, batch: int) -> dict[str, Any] | None:
    """The entry of a column's `speed` for a context and batch, if it has one."""
    cells = column.get("speed", [])
    return next((cell for cell in cells if (cell["context"], cell["batch"]) == (context, batch)), None)


def speed_left_out(columns: Columns) -> list[str]:
    """What of the speed could not be measured, and why; a line each."""
    return [
        f"no {name} at {cell['context']} tokens, batch {cell['batch']}: {cell['reason']}"
        for name, column in columns.items()
        for cell in column.get("speed_left_out", [])
    ]


def _union(groups: Iterable[Iterable[Any]]) -> list[Any]:
    """Each key once, in the order in which they come."""
    return list(dict.fromkeys(key for group in groups for key in group))


def _row(label: str, cells: Iterable[str]) -> list[list[str]]:
    """One row, or none where all cells are empty."""
    row = [label, *cells]
    return [row] if any(row[1:]) else []


def _label(task: str, columns: Columns) -> str:
    entry = next(column["tasks"][task] for column in columns.values() if task in column["tasks"])
    return f"{entry.get('label', task)} ({entry['metric']})"


def _task_rows(task: str, columns: Columns) -> list[list[str]]:
    rotations = [_rotation(column, task) or {} for column in columns.values()]
    means = [{**each, "value": each["accuracy"]} if each else None for each in rotations]
    return [
        *_row(_label(task, columns), (score(column["tasks"].get(task)) for column in columns.values())),
        *_row("… mean of all rotations", map(score, means)),
        *_row("… right in every rotation", (fixed(each.get("consistent"), 1, 100) for each in rotations)),
        *_row("… letter taken most often", (", ".join(_most(each)) if each else "" for each in rotations)),
    ]


def _summary_rows(summary: dict[str, Any], columns: Columns) -> list[list[str]]:
    average, recovery = summary.get("average") or {}, summary.get("recovery") or {}
    kept = [recovery.get(name) or {} for name in columns]
    several = any(entry["tasks"] > 1 for entry in average.values())
    return [
        *_row("average", (score(average.get(name)) if several else "" for name in columns)),
        *_row("kept of the source", (percent(entry.get("raw")) for entry in kept)),
        *_row("… above chance", (percent(entry.get("chance_corrected")) for entry in kept)),
    ]


def _perplexity_rows(columns: Columns) -> list[list[str]]:
    entries = [column.get("perplexity", {}) for column in columns.values()]
    rows = _row("perplexity", (perplexity(entry.get("value")) for entry in entries))
    # Results with other windows, side by side in a report, have other buckets.
    buckets = [{(b["start"], b["end"]): b["ppl"] for b in entry.get("by_position", ())} for entry in entries]
    for start, end in _union(buckets):
        rows += _row(f"… at {start}–{end - 1}", (perplexity(each.get((start, end))) for each in buckets))
    return rows


def _recall_rows(columns: Columns) -> list[list[str]]:
    """A row per length: the mean over all tasks and depths, of the same items in every column."""
    asked = {(c["multiple"], c["length"]) for column in columns.values() for c in column.get("recall", ()) if c["n"]}
    rows = []
    for multiple, length in sorted(asked):
        cells = (fixed(recall_mean(column, length=length), 1, 100) for column in columns.values())
        rows += _row(f"recall at {multiple} × window, {length} tokens", cells)
        inside = [c for column in columns.values() for c in column.get("recall", ()) if c["n"] and not beyond(c)]
        if any(cell["length"] == length for cell in inside):
            rows += _row("… beyond the window", (score(recall_beyond(each, length)) for each in columns.values()))
    return rows


def _capacity_rows(columns: Columns) -> list[list[str]]:
    """A row per number of pairs, and the most that were remembered."""
    asked = [{cell["pairs"]: cell for cell in column.get("capacity", ())} for column in columns.values()]
    rows = []
    for pairs in sorted(_union(asked)):
        rows += _row(f"recalled of {pairs} pairs", (score(cells.get(pairs)) for cells in asked))
    return rows + _row("… most pairs remembered", (fixed(remembered(column), 0) for column in columns.values()))


def _capacity_notes(columns: Columns) -> list[str]:
    cells = {
        name: max(column["capacity"], key=lambda cell: cell["pairs"])
        for name, column in columns.items()
        if column.get("capacity")
    }
    if not cells:
        return []
    held = ", ".join(f"{name} {format_bytes(cell['cache_bytes'])}" for name, cell in cells.items())
    first = next(iter(cells.values()))
    return [f"pairs: right answers in per cent, {first['n']} items each; cache behind the most pairs: {held}"]


_BEHAVIOUR: dict[str, Callable[[dict[str, Any]], str]] = {
    "KL to the source, nats": lambda entry: with_error(entry["kl"]["value"], entry["kl"]["stderr"], 3),
    "tokens as the source": lambda entry: fixed(entry["agreement"]["mean"], 1),
    "repeated 4-grams": lambda entry: percent(entry["repetition"]["rep_4"]),
}


def _behaviour_rows(columns: Columns) -> list[list[str]]:
    entries = [column.get("behaviour") for column in columns.values()]
    return [
        row
        for label, cell in _BEHAVIOUR.items()
        for row in _row(label, (cell(entry) if entry else "" for entry in entries))
    ]


def _speed(columns: Columns, environment: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows for the longest context and smallest batch that any column has, and notes."""
    reasons = [f"speed: {reason}" for reason in speed_left_out(columns)]
    keys = {(cell["context"], -cell["batch"]) for column in columns.values() for cell in column.get("speed", [])}
    if not keys:
        return [], reasons
    context, batch = max(keys)
    cells = [speed_cell(column, context, -batch) or {} for column in columns.values()]
    rows = [
        [label, *(fixed(cell.get(key), digits, scale) for cell in cells)]
        for label, key, scale, digits in (
            (f"ms per token at {context}", "token_seconds", 1e3, 1),
            ("… prefill, s", "prefill_seconds", 1, 2),
            ("… cache, MiB", "cache_bytes", 2**-20, 1),
            ("… peak memory, MiB", "peak_bytes", 2**-20, 0),
        )
    ]
    machine = f"{environment.get('device')} ({environment.get('cpu')}, {environment.get('threads')} threads)"
    return rows, [f"speed: batch {-batch}, medians, on {machine}; all contexts with `linearize bench`", *reasons]


def _text_notes(columns: Columns) -> list[str]:
    texts = next((column["perplexity"].get("texts") for column in columns.values() if "perplexity" in column), None)
    if not texts:
        return []
    first, longest = texts[0], max(texts, key=lambda entry: entry["length"])
    return [
        f"perplexity: {first['text']}, {first['blocks']} × {first['length']} tokens; … at a–b: of tokens with a to b "
        f"others before them, {longest['text']}, {longest['blocks']} × {longest['length']} tokens"
    ]


def _recall_notes(columns: Columns) -> list[str]:
    cells = next((column["recall"] for column in columns.values() if "recall" in column), [])
    if not cells:
        return []
    tasks = ", ".join(_union([cell["task"]] for cell in cells))
    items = max(cell["n"] for cell in cells)
    skipped: dict[str, list[str]] = {}
    for cell in cells:
        if "skipped" in cell:
            skipped.setdefault(cell["skipped"], []).append(f"{cell['task']} at {cell['length']} tokens")
    return [
        f"recall: right answers in per cent, mean over tasks and depths, {items} items each: {tasks}",
        *(f"recall: not measured: {', '.join(those)}: {reason}" for reason, those in skipped.items()),
    ]


def _cache_notes(columns: Columns) -> list[str]:
    wrong = [
        f"{name} at {cached['checked'] - cached['equal']} of {cached['checked']} steps (logits by up to "
        f"{cached['difference']:.2g})"
        for name, column in columns.items()
        if "behaviour" in column and (cached := column["behaviour"]["cached"])["equal"] < cached["checked"]
    ]
    return [f"Cached decoding and a whole forward pick different tokens: {', '.join(wrong)}"] if wrong else []


def _position_bias(task: str, columns: Columns) -> list[str]:
    """Answers that do not depend on the question, such as always A; rotations say it better than one order does."""
    rotated = {name: entry for name, column in columns.items() if (entry := _rotation(column, task))}
    biased = {name: each for name, each in rotated.items() if each["most"] > _limit(1 / len(each["letters"]))}
    notes = []
    if biased:
        those = "; ".join(f"{name} takes {' in '.join(_most(entry))}" for name, entry in biased.items())
        notes.append(f"{_label(task, columns)}: answers depend little on the question: {those} of all rotations")
    elif rotated:
        most = percent(max(entry["most"] for entry in rotated.values()))
        notes.append(f"{_label(task, columns)}: over all rotations no letter is chosen above {most}")
    for name, column in columns.items():
        choices = None if name in rotated else column["tasks"].get(task, {}).get("choices")
        if choices is None or sum(choices["gold"]) < LEAST_ITEMS:
            continue
        n, positions = sum(choices["gold"]), len(choices["gold"])
        notes += [
            f"{_label(task, columns)}, {name}: choice {i} of {positions} is taken in {percent(chosen / n)} of the "
            f"items, and right in {percent(gold / n)}: its answers depend little on the question"
            for i, (chosen, gold) in enumerate(zip(choices["chosen"], choices["gold"], strict=True), 1)
            if chosen / n > _limit(max(gold / n, 1 / positions))
        ]
    return notes


def _rotation(column: dict[str, Any], task: str) -> dict[str, Any] | None:
    return column["tasks"].get(task, {}).get("rotation")


def _most(rotation: dict[str, Any]) -> tuple[str, str]:
    """The letter taken most often, and its share."""
    return max(rotation["letters"], key=rotation["letters"].__getitem__), percent(rotation["most"])


def _limit(share: float) -> float:
    """Share of the answers above which a choice, right in `share` of the items, is taken whatever the question is.

    Of two choices none can take more than twice its share: there, half of the way to always is the limit.
    """
    return min(2 * share, (1 + share) / 2)


def _memory_notes(summary: dict[str, Any]) -> list[str]:
    memory = summary.get("memory")
    if not memory:
        return []
    off, low, high = off_perplexity(memory)
    return [
        f"What the memory adds: {0 - off:+.1f} % perplexity beyond the window ({perplexity(memory['without'])} → "
        f"{perplexity(memory['with'])}; 95 % interval {0 - high:+.1f} to {0 - low:+.1f} %)"
    ]


def _paired_notes(summary: dict[str, Any], columns: Columns) -> list[str]:
    notes = []
    for control, pair in (summary.get("paired") or {}).items():
        parts = [
            "{} ({}) {}".format(*interval(pair[key], digits, scale), unit)
            for key, digits, scale, unit in (
                ("average", 1, 100, "points on the tasks' average"),
                ("loss", 3, 1, "nats per token"),
            )
            if pair.get(key)
        ]
        if parts and control in columns:
            notes.append(f"student − {control}, same items, 95 % interval: {'; '.join(parts)}")
    return notes
