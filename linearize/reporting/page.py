"""The report: one HTML file with everything in it, from one results.json or from several of the same source.

Nothing is loaded from elsewhere and nothing needs JavaScript. Text of a results file (names of models, tasks, machines)
is escaped; charts come from `linearize.reporting.charts`. What was not measured is left out.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from linearize.checkpoint.atomic import write_text
from linearize.reporting import charts, measured, verdict
from linearize.reporting.markup import checklist, figure, kind, legend, section, table
from linearize.reporting.view import View, view
from linearize.results.summary import APART
from linearize.results.table import Table, lay_out

CSS = """
:root { color-scheme: light; --line: #d8d8d8; --soft: #f5f6f8; --ink: #1c1c1c; --dim: #5a5a5a; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 66rem; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { max-width: 46rem; margin: .5rem 0; }
.dim, figcaption, footer { color: var(--dim); font-size: .9rem; }
.verdict { background: var(--soft); border-left: 5px solid #8c8c8c; padding: .75rem 1rem; margin: 1rem 0; }
.verdict.yes { border-color: #0a7d4f; } .verdict.no { border-color: #b3261e; }
.verdict strong { font-size: 1.15rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; min-width: 8.5rem; }
th { border-bottom: 2px solid #999; vertical-align: bottom; }
table.words td, table.words th { text-align: left; }
td.bold, th.bold { font-weight: 700; }
.num td:not(:first-child) { white-space: nowrap; }
.grid { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
figure { margin: .5rem 0; max-width: 34rem; min-width: 0; }
figure > svg { display: block; width: 100%; height: auto; }
figcaption strong { color: var(--ink); }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .4rem 0;
  padding: 0; font-size: .85rem; }
ul.legend svg { width: 1.8rem; height: .7rem; margin-right: .35rem; vertical-align: baseline; }
ul.checks { list-style: none; padding: 0; }
ul.checks li { display: grid; grid-template-columns: 1.5rem 1fr; margin: .3rem 0; }
ul.checks .mark { font-weight: 700; }
.yes .mark { color: #0a7d4f; } .no .mark { color: #b3261e; } .open .mark { color: #7a5b00; }
summary { cursor: pointer; margin: 1rem 0 .5rem; }
dl { display: grid; grid-template-columns: fit-content(45%) 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { color: var(--dim); } dd { margin: 0; }
code { font-size: .85em; }
@media print { h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


def write(reports: list[dict[str, Any]], path: str | Path) -> Path:
    """Write the report so that the file appears, complete, by one rename.

    Args:
        reports: valid results, see `linearize.results.schema`; of several the same source, suite, limit and seed.
        path: file to write.

    Raises:
        InputError: the results cannot be compared, or the file cannot be written.

    Example:
        >>> write([results.read("runs/demo/results.json")], "runs/demo/report.html")
    """
    return write_text(Path(path), render(reports))


def beside(results: Path) -> Path:
    """Where the report of a results file lies: report.html beside results.json, NAME.html beside another NAME.json."""
    return results.with_name("report.html") if results.name == "results.json" else results.with_suffix(".html")


def render(reports: list[dict[str, Any]]) -> str:
    """The page as text; arguments and errors as in `write`."""
    shown = view(reports)
    title = " and ".join(escape(report["model"]) for report in reports)
    sections: tuple[Callable[[View], str], ...] = (
        _headline,
        _settings_that_differ,
        _recovery,
        _numbers,
        _paired,
        measured.positions,
        measured.recall,
        measured.behaviour,
        measured.speed,
        measured.layers,
        _settings,
    )
    body = "\n".join(part for make in sections if (part := make(shown)))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # browsers ask for /favicon.ico otherwise
        f"<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _headline(shown: View) -> str:
    names = ", ".join(escape(report["model"]) for report in shown.reports)
    first = shown.reports[0]
    parts = [
        f"<header><h1>{names}, beside {escape(first['source'])}</h1>",
        f'<p class="dim">Suite {escape(first["suite"])}. Is it worth deploying in place of its source?</p>',
    ]
    for student, report in zip(shown.students, shown.reports, strict=True):
        found = verdict.checks(report)
        holds, answer = verdict.answer(found)
        name = f"{escape(student)}: " if len(shown.students) > 1 else ""
        words = f"<strong>{name}{escape(answer)}.</strong> {escape(verdict.sentences(report))}"
        parts.append(f'<div class="verdict {kind(holds)}">{words}</div>')
        parts.append(checklist([(escape(check.name), escape(check.found), check.holds) for check in found]))
    return "\n".join([*parts, "</header>"])


def _settings_that_differ(shown: View) -> str:
    if not shown.differing:
        return ""
    rows = [[escape(key), *map(escape, values)] for key, values in shown.differing.items()]
    return section("Settings that differ", table(["setting", *map(escape, shown.students)], rows, words=True))


def _recovery(shown: View) -> str:
    columns = {name: column for name, column in shown.columns.items() if column["tasks"]}
    controls = [name for name in columns if name.startswith("window")]
    compared = [name for name in [*shown.students, *controls] if name in columns]
    if "source" not in columns or not compared:
        return ""
    values = {name: charts.shares(columns[name], columns["source"]) for name in compared}
    if not any(values.values()):
        return ""
    words = "; ".join(
        f"{name}: " + ", ".join(f"{task} {100 * share:.1f} %" for task, (share, _) in found.items())
        for name, found in values.items()
    )
    chart = charts.recovery(columns, compared, shown.styles, f"Share of the source's score by task. {words}")
    caption = (
        "<strong>Share of the source's score kept, by task.</strong> Whiskers: 95 % interval of the difference on the "
        "same items. The upright line is the source. A student that does not stand out from its window control has "
        "recovered nothing."
    )
    return section("What it keeps of the source", figure(chart, caption, legend(compared, shown.styles, bars=True)))


def _numbers(shown: View) -> str:
    def part(wanted: Callable[[str], bool], **others: Any) -> dict[str, Any]:
        columns = {
            name: {**column, "tasks": {task: score for task, score in column["tasks"].items() if wanted(task)}}
            for name, column in shown.columns.items()
        }
        return {"columns": columns, "environment": shown.reports[0]["environment"], **others}

    summary = {**shown.summary, "paired": {}}
    if len(shown.reports) == 1:
        summary["memory"] = shown.reports[0]["summary"]["memory"]
    content = lay_out(part(lambda task: not task.startswith(APART), summary=summary))
    parts = [_cells(content, shown)]
    parts += [f'<p class="dim">{escape(note)}</p>' for note in content.notes]
    apart = part(lambda task: task.startswith(APART))
    apart["columns"] = {name: {"tasks": column["tasks"]} for name, column in apart["columns"].items()}
    if any(column["tasks"] for column in apart["columns"].values()):
        letters = lay_out(apart)
        parts += ["<h3>Answers by letter, which are no part of the average</h3>", _cells(letters, shown)]
        parts += [f'<p class="dim">{escape(note)}</p>' for note in letters.notes]
    meaning = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in shown.meaning.items())
    return section(
        "All numbers",
        '<p class="dim">Scores in per cent ± standard error; perplexities as they are.</p>',
        *parts,
        f"<dl>{meaning}</dl>",
    )


def _cells(content: Table, shown: View) -> str:
    header = [escape(name) for name in content.header]
    rows = [[escape(cell) for cell in row] for row in content.rows]
    return table(header, rows, bold=[content.header.index(name) for name in shown.students if name in content.header])


def _paired(shown: View) -> str:
    names = {
        task: score.get("label", task) for column in shown.columns.values() for task, score in column["tasks"].items()
    }
    parts = []
    for student in dict.fromkeys(student for student, _, _ in shown.pairs):
        chosen = {control: pair for name, control, pair in shown.pairs if name == student and any(pair.values())}
        if not chosen:
            continue
        tasks = {control: pair["tasks"] for control, pair in chosen.items() if pair["tasks"]}
        if tasks:
            label = f"Differences of {student} from {', '.join(tasks)} by task; the table below holds every number"
            caption = f"<strong>{escape(student)} minus each control, by task.</strong> Lines: 95 % intervals."
            chart = charts.differences(tasks, names, shown.styles, label)
            parts.append(figure(chart, caption, legend(tasks, shown.styles, bars=True)))
        parts.append(table([f"{escape(student)} minus", *map(escape, chosen)], _paired_rows(chosen, names)))
    if not parts:
        return ""
    return section(
        "Paired differences",
        '<p class="dim">On the same items, or the same blocks of text, with 95 % intervals by bootstrap; bold where 0 '
        "lies outside. A score above 0 is better, a loss below 0 is.</p>",
        *parts,
    )


def _paired_rows(pairs: dict[str, dict[str, Any]], names: dict[str, str]) -> list[list[str]]:
    tasks = dict.fromkeys(task for pair in pairs.values() for task in pair["tasks"])
    rows = [(f"{names[task]}, points", [pair["tasks"].get(task) for pair in pairs.values()], 100, 1) for task in tasks]
    rows.append(("average, points", [pair.get("average") for pair in pairs.values()], 100, 1))
    rows.append(("loss, nats per token", [pair.get("loss") for pair in pairs.values()], 1, 4))
    return [
        [escape(label), *(_difference(entry, scale, digits) for entry in entries)]
        for label, entries, scale, digits in rows
        if any(entries)
    ]


def _difference(entry: dict[str, float] | None, scale: float, digits: int) -> str:
    if entry is None:
        return ""
    difference, low, high = (f"{scale * entry[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    text = f"{difference}<br><small>{low} to {high}</small>"
    return text if entry["low"] <= 0 <= entry["high"] else f"<b>{text}</b>"


def _settings(shown: View) -> str:
    rows = []
    for student, report in zip(shown.students, shown.reports, strict=True):
        environment = report["environment"]
        facts = {**(report.get("settings") or {}), **environment}
        facts.pop("suite", None)
        nested = {key: facts.pop(key) for key in ("source", "versions", "data") if isinstance(facts.get(key), dict)}
        facts |= {f"{key}: {name}": value for key, values in nested.items() for name, value in values.items()}
        facts["seconds"] = ", ".join(f"{name} {column['seconds']:.0f}" for name, column in report["columns"].items())
        if len(shown.reports) > 1:
            rows.append(f"<h3>{escape(student)}</h3>")
        listed = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_words(value))}</dd>" for key, value in facts.items())
        rows.append(f"<dl>{listed}</dl>")
    return section("Settings, machine, versions, data", *rows)


def _words(value: Any) -> str:
    return "not set" if value is None else str(value)
