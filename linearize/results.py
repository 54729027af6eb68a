"""results.json: what a comparison leaves behind; table.py lays it out. Standard library only.

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
    rotation           of a task whose suite entry says `rotate`: every item with k options asked in all k rotations
      n                  items that could be rotated
      accuracy, stderr   mean over items of the share of rotations answered right, and its standard error over items
      consistent         share of items answered right in every rotation
      letters, most      letter -> share of the answers over all items and rotations that it was; the largest share
      items              share of rotations answered right of each item
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
  average      column -> {value, stderr, tasks}: plain mean of the tasks that have a chance level, without MMLU and
               other answers by letter
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
import os
import re
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
            if isinstance(score, dict) and "rotation" in score:
                shares = dict.fromkeys(("accuracy", "consistent", "most"), number)
                where_ = f"{at}.tasks.{task}.rotation"
                if need(score["rotation"], where_, n=(int,), **shares, stderr=maybe, letters=mapping, items=array):
                    letters = score["rotation"].get("letters")
                    for letter in letters if isinstance(letters, dict) else ():
                        need(letters, f"{where_}.letters", **{letter: number})
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
