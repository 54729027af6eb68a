"""results.json: what a comparison leaves behind, and the table made from it. Standard library only.

Schema 1. Scores are fractions, not per cent; losses are in nats per token.

```
schema       1
complete     false while columns are still missing (an interrupted run), else true
model        what was evaluated: folder or Hub id
layers       [{layer, mixer, and the mixer's settings}], softmax for layers left as they were
source       where the student's weights came from: Hub id, or name of a folder or file
suite        name of the suite
settings     what two results must share to be comparable: suite, limit, seed, batch_size, dtype, device, window, sinks,
             weights (sha256 of the evaluated folder's files), source
columns      name -> column, in the order of COLUMNS
  tasks        task -> score
    label              name in tables
    metric             name in lm-eval, e.g. acc_norm
    value, stderr      score and its standard error (null where lm-eval gives none)
    n                  items scored
    higher_is_better   bool
    chance             score of guessing: 0 where the answer is free text, null where it has no meaning (perplexities)
    prompts            sha256 over every prompt and choice scored: equal in all columns
    choices            {chosen, gold}: of a multiple-choice task, how often each position was chosen, and how often it
                       was right, as counts; null elsewhere
    items              score of each item, in order; null for metrics that are no mean over items
  perplexity   absent when the suite has no texts
    value, tokens      perplexity of the suite's first text, and how many tokens were predicted
    by_position        [{start, end, ppl, tokens}] of the text with the longest blocks; a token's position is the
                       number of tokens before it
    texts              every text: {text, length, blocks, value, tokens, by_position, losses}, where
                       losses[block][bucket] is the mean loss of a block in a bucket
  recall       [{task, length, multiple, depth, value, stderr, n, items}]: share of right answers per generated task,
               length in tokens (and in windows) and depth (0 at the start of the context, 1 at its end; null where the
               task has none); items is the score of each. Where nothing could be measured, value, stderr and depth are
               null, and `skipped` says why
  behaviour    what the model does beside the source
    kl                 {value, stderr, tokens, by_position}: KL(source ‖ model) in nats per token, standard error over
                       blocks (null for one); by_position is [{start, end, kl, tokens}], buckets as in perplexity
    agreement          {mean, median, lengths}: greedy tokens until the first that differs from the source's, per prompt
    repetition         {rep_2, rep_3, rep_4, distinct_1, distinct_2}: of the greedy continuations, fractions
    cached             {checked, equal, difference}: steps at which cached and whole forward pick the same token, and
                       the largest difference of their logits
    state              [{position, norm, effective_rank}]: of the memory's state, mean over layers and heads; null
                       without a memory; effective_rank is null where the state is a vector per head
  speed        [{context, batch, prefill_seconds, token_seconds, low, high, peak_bytes, cache_bytes}]: of source, window
               and student; seconds per decoded token with quartiles, peak memory while decoding (null where the system
               does not tell)
  speed_left_out  [{context, batch, reason}]: what could not be measured; absent when all could
  seconds      wall time, without loading and speed
  model, weights  of the column other: folder or Hub id, and as in settings
summary      what follows from the columns alone (see linearize/evaluate/statistics.py)
  average      column -> {value, stderr, tasks}: plain mean of the tasks that have a chance level, without MMLU
  recovery     column -> {raw, chance_corrected}: share of the source's average kept, s / t and (s - r) / (t - r) with
               chance r; null where the source itself is within two standard errors of chance
  memory       perplexity at positions from `start` (the window) on, {with, without} the memory, and the difference of
               the losses with its 95 % interval, {loss, low, high}; null without both columns
  paired       control -> student minus control on the same items, each {difference, low, high}: {tasks: {task: …},
               average, loss}
environment  versions, commit, cpu, threads, device, seed, date, data (name -> sha256), …
```
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import InputError

SCHEMA = 1
COLUMNS = {
    "source": "the model that was converted, untouched",
    "window": "the source with the same window and sinks and nothing else, no training",
    "converted": "the source converted, no training",
    "student": "the evaluated model",
    "student/window": "the student with its memory off",
    "student/memory": "the student with its window off",
    "other": "another student, given by --against",
}


@dataclass(frozen=True)
class Table:
    """A table of text: header, rows of the same length, and notes below it."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def read(path: str | Path) -> dict[str, Any]:
    """Read and check a results file.

    Raises:
        InputError: it is missing, no JSON, of a newer schema, or does not follow the schema.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; write it with `linearize eval DIR --out {path}`") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no readable JSON ({error}); run `linearize eval` again") from error
    validate(content, str(path))
    return content


def write(results: dict[str, Any], path: str | Path) -> Path:
    """Check results and write them so that the file appears, complete, by one rename.

    Raises:
        InputError: they do not follow the schema, or the file cannot be written.
    """
    path = Path(path)
    validate(results, str(path))
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    # Lists of numbers, one per item, take one line each. No JSON string holds a raw line break: only lists match.
    text = re.sub(r"\[\n[-\d.eE+,\s]+\]", lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text)
    partial = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    return path


def validate(results: Any, where: str = "results") -> None:
    """Check results against the schema.

    Raises:
        InputError: one paragraph that names every problem.
    """
    if not isinstance(results, dict) or "schema" not in results:
        raise InputError(f"{where}: is no results file (no `schema`); write one with `linearize eval`")
    if results["schema"] != SCHEMA:
        raise InputError(
            f"{where}: schema is {results['schema']!r}; this version reads {SCHEMA}; install the linearize that wrote "
            "it"
        )
    problems: list[str] = []

    def need(values: Any, at: str, **kinds: tuple[type, ...]) -> bool:
        if not isinstance(values, dict):
            problems.append(f"{at}: expected an object")
            return False
        for key, kind in kinds.items():
            # bool is an int to Python, but no number to a reader of the file.
            if key not in values:
                problems.append(f"{at}.{key}: missing")
            elif not isinstance(values[key], kind) or (isinstance(values[key], bool) and bool not in kind):
                problems.append(f"{at}.{key}: found {values[key]!r}")
        return True

    text, number, maybe, mapping, array = (str,), (int, float), (int, float, type(None)), (dict,), (list,)
    need(results, "results", model=text, source=text, suite=text, columns=mapping, environment=mapping)
    columns = results.get("columns")
    for name, column in columns.items() if isinstance(columns, dict) else ():
        at = f"columns.{name}"
        if name not in COLUMNS:
            problems.append(f"{at}: unknown column; allowed: {', '.join(COLUMNS)}")
        if not need(column, at, tasks=mapping, seconds=number):
            continue
        for task, score in column["tasks"].items() if isinstance(column.get("tasks"), dict) else ():
            need(
                score,
                f"{at}.tasks.{task}",
                metric=text,
                value=number,
                stderr=maybe,
                n=(int,),
                higher_is_better=(bool,),
            )
        for i, cell in enumerate(column.get("recall", ())):
            need(
                cell,
                f"{at}.recall.{i}",
                task=text,
                length=(int,),
                multiple=(int,),
                depth=maybe,
                value=number if "skipped" not in cell else maybe,
                stderr=maybe,
                n=(int,),
                items=array,
            )
        if "perplexity" in column:
            need(column["perplexity"], f"{at}.perplexity", value=number, tokens=(int,), by_position=array)
        if "behaviour" in column and need(
            column["behaviour"], f"{at}.behaviour",
            kl=mapping, agreement=mapping, repetition=mapping, cached=mapping, state=(list, type(None)),
        ):  # fmt: skip
            fractions = dict.fromkeys(("rep_2", "rep_3", "rep_4", "distinct_1", "distinct_2"), number)
            for key, kinds in {
                "kl": {"value": number, "stderr": maybe, "tokens": (int,), "by_position": array},
                "agreement": {"mean": number, "median": number, "lengths": array},
                "repetition": fractions,
                "cached": {"checked": (int,), "equal": (int,), "difference": number},
            }.items():
                need(column["behaviour"].get(key), f"{at}.behaviour.{key}", **kinds)
            for i, entry in enumerate(column["behaviour"].get("state") or []):
                need(entry, f"{at}.behaviour.state.{i}", position=(int,), norm=number, effective_rank=maybe)
        for i, cell in enumerate(column.get("speed", [])):
            where_, sizes = f"{at}.speed.{i}", {"context": (int,), "batch": (int,), "cache_bytes": (int,)}
            times = dict.fromkeys(("prefill_seconds", "token_seconds", "low", "high"), number)
            need(cell, where_, **sizes, **times, peak_bytes=(int, type(None)))
    if problems:
        raise InputError(f"{where}: does not follow schema {SCHEMA}: {'; '.join(problems)}")


def table(results: dict[str, Any], columns: list[str] | None = None) -> Table:
    """Lay the comparison out: a row per task, then averages, recovery and perplexities; the paired differences below.

    Args:
        results: valid results.
        columns: which columns, in which order; None means all.

    Returns:
        Cells of plain text: scores in per cent with their standard error, perplexities with two decimals.
    """
    shown = {name: results["columns"][name] for name in columns or results["columns"]}
    summary = results.get("summary") or {}
    rows = [
        [f"{_label(task, shown)}", *(_score(column["tasks"].get(task)) for column in shown.values())]
        for task in _ordered(column["tasks"] for column in shown.values())
    ]

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
    content = table(results, columns)
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
    """Answers that do not depend on the question, such as always A."""
    notes = []
    for task in _ordered(column["tasks"] for column in columns.values()):
        for name, column in columns.items():
            choices = column["tasks"].get(task, {}).get("choices")
            if choices is None or sum(choices["gold"]) < 20:  # fewer items may fall on one position by chance
                continue
            n, positions = sum(choices["gold"]), len(choices["gold"])
            for i, (chosen, gold) in enumerate(zip(choices["chosen"], choices["gold"], strict=True)):
                share = max(gold / n, 1 / positions)
                # Of two choices none can take more than twice its share: there, half of the way to always is the limit.
                if chosen / n > min(2 * share, (1 + share) / 2):
                    notes.append(
                        f"{_label(task, columns)}, {name}: choice {i + 1} of {positions} is taken in "
                        f"{_percent(chosen / n)} of the items, and right in {_percent(gold / n)}: its answers depend "
                        "little on the question"
                    )
    return notes


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
