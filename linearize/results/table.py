"""The comparison of a results file as a table of text, for terminals and model cards. Standard library only."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
    rows = []
    for task in _ordered(column["tasks"] for column in shown.values()):
        scores = [column["tasks"].get(task) for column in shown.values()]
        rows += [[_label(task, shown), *map(_score, scores)], *_rotation_rows(scores)]

    def add(label: str, cell: Callable[[str], str]) -> None:
        cells = [cell(name) for name in shown]
        if any(cells):
            rows.append([label, *cells])

    average, recovery = summary.get("average") or {}, summary.get("recovery") or {}
    if any(entry["tasks"] > 1 for entry in average.values()):
        add("average", lambda name: _score(average.get(name)))
    add("kept of the source", lambda name: _percent((recovery.get(name) or {}).get("raw")))
    add("… above chance", lambda name: _percent((recovery.get(name) or {}).get("chance_corrected")))
    rows += _perplexity_rows(shown) + _recall_rows(shown)
    behaviour = {name: column["behaviour"] for name, column in shown.items() if "behaviour" in column}
    if behaviour:
        for label, cell in _BEHAVIOUR.items():
            rows.append([label, *(cell(behaviour[name]) if name in behaviour else "" for name in shown)])
    speed, speed_notes = _speed(shown, results["environment"])
    notes = [*_text_notes(shown), *_recall_notes(shown), *_behaviour_notes(behaviour), *_choice_notes(shown)]
    return Table(["", *shown], rows + speed, [*notes, *_notes(summary, shown), *speed_notes])


def markdown_table(results: dict[str, Any], columns: list[str] | None = None) -> str:
    """The same table in Markdown, with its notes as a list below it."""
    content = lay_out(results, columns)
    lines = [content.header, ["---", *("---:" for _ in content.header[1:])], *content.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([text, "", *(f"- {note}" for note in content.notes)]).rstrip() + "\n"


def _ordered(groups: Any) -> list[Any]:
    return list(dict.fromkeys(key for group in groups for key in group))


def _label(task: str, columns: dict[str, Any]) -> str:
    score = next(column["tasks"][task] for column in columns.values() if task in column["tasks"])
    return f"{score.get('label', task)} ({score['metric']})"


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    scale, digits = (100, 1) if score.get("higher_is_better", True) and abs(score["value"]) <= 1 else (1, 2)
    error = "" if score["stderr"] is None else f" ± {scale * score['stderr']:.{digits}f}"
    return f"{scale * score['value']:.{digits}f}{error}"


def _rotation_rows(scores: list[dict[str, Any] | None]) -> list[list[str]]:
    found = [(score or {}).get("rotation") for score in scores]
    if not any(found):
        return []
    return [
        ["… mean of all rotations", *(_score(entry and {**entry, "value": entry["accuracy"]}) for entry in found)],
        ["… right in every rotation", *(f"{100 * entry['consistent']:.1f}" if entry else "" for entry in found)],
        ["… letter taken most often", *(_most(entry) if entry else "" for entry in found)],
    ]


def _most(entry: dict[str, Any]) -> str:
    return f"{max(entry['letters'], key=entry['letters'].__getitem__)}, {_percent(entry['most'])}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def _perplexity_rows(columns: dict[str, Any]) -> list[list[str]]:
    measured = [column.get("perplexity") for column in columns.values()]
    if not any(measured):
        return []
    cells = ["" if entry is None else _number(entry["value"]) for entry in measured]
    rows = [["perplexity", *cells]]
    # Results with other windows, side by side in a report, have other buckets.
    found = [{(b["start"], b["end"]): b["ppl"] for b in (entry or {}).get("by_position", ())} for entry in measured]
    for start, end in _ordered(found):
        cells = ["" if (start, end) not in buckets else _number(buckets[start, end]) for buckets in found]
        rows.append([f"… at {start}–{end - 1}", *cells])
    return rows


_BEHAVIOUR: dict[str, Callable[[dict[str, Any]], str]] = {
    "KL to the source, nats": lambda entry: (
        f"{entry['kl']['value']:.3f}" + ("" if entry["kl"]["stderr"] is None else f" ± {entry['kl']['stderr']:.3f}")
    ),
    "tokens as the source": lambda entry: f"{entry['agreement']['mean']:.1f}",
    "repeated 4-grams": lambda entry: _percent(entry["repetition"]["rep_4"]),
}


def _behaviour_notes(behaviour: dict[str, Any]) -> list[str]:
    wrong = [
        f"{name} at {cached['checked'] - cached['equal']} of {cached['checked']} steps (logits by up to "
        f"{cached['difference']:.2g})"
        for name, entry in behaviour.items()
        if (cached := entry["cached"])["equal"] < cached["checked"]
    ]
    return [f"Cached decoding and a whole forward pick different tokens: {', '.join(wrong)}"] if wrong else []


def _speed(columns: dict[str, Any], environment: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows for the longest context and smallest batch that any column has, and notes."""
    reasons = [
        f"speed: no {name} at {cell['context']} tokens, batch {cell['batch']}: {cell['reason']}"
        for name, column in columns.items()
        for cell in column.get("speed_left_out", [])
    ]
    keys = {(cell["context"], -cell["batch"]) for column in columns.values() for cell in column.get("speed", [])}
    if not keys:
        return [], reasons
    context, batch = max(keys)
    rows = []
    for label, key, scale, digits in (
        (f"ms per token at {context}", "token_seconds", 1e3, 1),
        ("… prefill, s", "prefill_seconds", 1, 2),
        ("… cache, MiB", "cache_bytes", 2**-20, 1),
        ("… peak memory, MiB", "peak_bytes", 2**-20, 0),
    ):
        found = [speed_cell(column, context, -batch) for column in columns.values()]
        values = [None if cell is None else cell[key] for cell in found]
        rows.append([label, *("" if value is None else f"{value * scale:.{digits}f}" for value in values)])
    machine = f"{environment.get('device')} ({environment.get('cpu')}, {environment.get('threads')} threads)"
    return rows, [f"speed: batch {-batch}, medians, on {machine}; all contexts with `linearize bench`", *reasons]


def speed_cell(column: dict[str, Any], context: int, batch: int) -> dict[str, Any] | None:
    """The entry of a column's `speed` for a context and batch, if it has one."""
    cells = column.get("speed", [])
    return next((cell for cell in cells if (cell["context"], cell["batch"]) == (context, batch)), None)


def _text_notes(columns: dict[str, Any]) -> list[str]:
    texts = next((column["perplexity"].get("texts") for column in columns.values() if "perplexity" in column), None)
    if not texts:
        return []
    first, longest = texts[0], max(texts, key=lambda entry: entry["length"])
    return [
        f"perplexity: {first['text']}, {first['blocks']} × {first['length']} tokens; … at a–b: of tokens with a to b "
        f"others before them, {longest['text']}, {longest['blocks']} × {longest['length']} tokens"
    ]


def _recall_rows(columns: dict[str, Any]) -> list[list[str]]:
    """A row per length: the mean over all tasks and depths, of the same items in every column."""
    cells = {name: [cell for cell in column.get("recall", ()) if cell["n"]] for name, column in columns.items()}
    rows = []
    for multiple, length in sorted({(cell["multiple"], cell["length"]) for found in cells.values() for cell in found}):
        row = [f"recall at {multiple} × window, {length} tokens"]
        for found in cells.values():
            values = [cell["value"] for cell in found if cell["length"] == length]
            row.append(f"{100 * sum(values) / len(values):.1f}" if values else "")
        rows.append(row)
    return rows


def _recall_notes(columns: dict[str, Any]) -> list[str]:
    found = next((column["recall"] for column in columns.values() if "recall" in column), [])
    notes = []
    if found:
        tasks = ", ".join(dict.fromkeys(cell["task"] for cell in found))
        notes.append(f"recall: right answers in per cent, mean over tasks and depths: {tasks}")
    skipped: dict[str, list[str]] = {}
    for cell in found:
        if "skipped" in cell:
            skipped.setdefault(cell["skipped"], []).append(f"{cell['task']} at {cell['length']} tokens")
    return notes + [f"recall: not measured: {', '.join(cells)}: {reason}" for reason, cells in skipped.items()]


def _choice_notes(columns: dict[str, Any]) -> list[str]:
    """Answers that do not depend on the question, such as always A; what rotations say replaces what one order says."""
    notes = []
    for task in _ordered(column["tasks"] for column in columns.values()):
        rotated = {name: entry for name, column in columns.items() if (entry := _rotation_of(column, task))}
        if rotated:
            by_letter = {
                name: entry for name, entry in rotated.items() if entry["most"] > _limit(1 / len(entry["letters"]))
            }
            found = "; ".join(f"{name} takes {_most(entry).replace(', ', ' in ')}" for name, entry in by_letter.items())
            if found:
                notes.append(
                    f"{_label(task, columns)}: answers depend little on the question: {found} of all rotations"
                )
            else:
                most = max(entry["most"] for entry in rotated.values())
                notes.append(f"{_label(task, columns)}: over all rotations no letter is chosen above {_percent(most)}")
        for name, column in columns.items():
            if name in rotated:
                continue
            choices = column["tasks"].get(task, {}).get("choices")
            if choices is None or sum(choices["gold"]) < 20:  # fewer items may fall on one position by chance
                continue
            n, positions = sum(choices["gold"]), len(choices["gold"])
            for i, (chosen, gold) in enumerate(zip(choices["chosen"], choices["gold"], strict=True)):
                if chosen / n > _limit(max(gold / n, 1 / positions)):
                    notes.append(
                        f"{_label(task, columns)}, {name}: choice {i + 1} of {positions} is taken in "
                        f"{_percent(chosen / n)} of the items, and right in {_percent(gold / n)}: its answers depend "
                        "little on the question"
                    )
    return notes


def _rotation_of(column: dict[str, Any], task: str) -> dict[str, Any] | None:
    return column["tasks"].get(task, {}).get("rotation")


def _limit(share: float) -> float:
    """Share of the answers above which a choice, right in `share` of the items, is taken whatever the question is.

    Of two choices none can take more than twice its share: there, half of the way to always is the limit.
    """
    return min(2 * share, (1 + share) / 2)


def _notes(summary: dict[str, Any], columns: dict[str, Any]) -> list[str]:
    notes = []
    memory = summary.get("memory")
    if memory:
        change = math.exp(-memory["loss"]) - 1
        low, high = math.exp(-memory["high"]) - 1, math.exp(-memory["low"]) - 1
        notes.append(
            f"What the memory adds: {100 * change:+.1f} % perplexity beyond the window ({_number(memory['without'])} → "
            f"{_number(memory['with'])}; 95 % interval {100 * low:+.1f} to {100 * high:+.1f} %)"
        )
    for control, pair in (summary.get("paired") or {}).items():
        if control not in columns:
            continue
        parts = []
        if pair.get("average"):
            average = pair["average"]
            parts.append(f"{_interval(average, 100, 1)} points on the tasks' average")
        if pair.get("loss"):
            parts.append(f"{_interval(pair['loss'], 1, 3)} nats per token")
        if parts:
            notes.append(f"student − {control}, same items, 95 % interval: {'; '.join(parts)}")
    return notes


def _interval(entry: dict[str, float], scale: float, digits: int) -> str:
    difference, low, high = (scale * entry[key] for key in ("difference", "low", "high"))
    return f"{difference:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
