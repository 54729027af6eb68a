"""One or several results files as one set of columns, for the report."""

from dataclasses import dataclass
from typing import Any

from linearize.errors import InputError
from linearize.reporting.charts import Styles, styles
from linearize.results.schema import COLUMNS
from linearize.results.summary import paired

SHARED = ("source", "suite", "limit", "seed")  # settings without which two results say nothing about each other


@dataclass(frozen=True)
class View:
    """What a report shows.

    Attributes:
        reports: the results files, one per student.
        students: their names in `columns`, in the same order.
        columns: name -> column, as in results.json; what each name means is in `meaning`.
        meaning: name -> words.
        summary: average and recovery by column, as in results.json.
        pairs: (one column, another, one minus the other as in results.json).
        differing: setting -> its value by student, of those that are not the same in all.
    """

    reports: list[dict[str, Any]]
    students: list[str]
    columns: dict[str, Any]
    meaning: dict[str, str]
    summary: dict[str, Any]
    pairs: list[tuple[str, str, dict[str, Any]]]
    differing: dict[str, list[str]]

    @property
    def styles(self) -> Styles:
        """Colour and dashes of each column, the same in all charts."""
        return styles(self.columns)

    @property
    def windows(self) -> list[int]:
        """The students' windows, each once."""
        return sorted({window for report in self.reports if (window := _settings(report).get("window"))})


def view(reports: list[dict[str, Any]]) -> View:
    """Lay results side by side: one with all its columns, several with source, window control and their students.

    Raises:
        InputError: one is not complete, they cannot be compared, or one of several has no student.
    """
    for report in reports:
        if "summary" not in report:
            raise InputError(
                f"{report['model']}: its comparison was interrupted; finish it with `linearize eval --resume`"
            )
    if len(reports) == 1:
        (report,) = reports
        columns, summary = report["columns"], report["summary"]
        pairs = [("student", control, entry) for control, entry in summary["paired"].items()]
        meaning = {name: COLUMNS[name] for name in columns}
        return View(reports, ["student"], columns, meaning, summary, pairs, {})
    _check_comparable(reports)
    students = _names(reports)
    columns: dict[str, Any] = {}
    summary: dict[str, Any] = {"average": {}, "recovery": {}}
    meaning: dict[str, str] = {}
    pairs = []

    def add(name: str, report: dict[str, Any], column: str, words: str) -> None:
        columns[name], meaning[name] = report["columns"][column], words
        for key, values in summary.items():
            if column in report["summary"][key]:
                values[name] = report["summary"][key][column]

    one_window = len({str([_settings(report).get(key) for key in ("window", "sinks")]) for report in reports}) == 1
    for column in ("source", "window"):
        for student, report in zip(students, reports, strict=True):
            name = column if column == "source" or one_window else f"window of {student}"
            if column in report["columns"] and name not in columns:
                add(name, report, column, COLUMNS[column])
    for student, report in zip(students, reports, strict=True):
        add(student, report, "student", f"the evaluated model {report['model']}")
        for control in ("source", "window"):
            if control in report["summary"]["paired"]:
                name = control if control in columns else f"{control} of {student}"
                pairs.append((student, name, report["summary"]["paired"][control]))
    first = students[0]
    for student in students[1:]:
        pairs.append((student, first, paired(columns[student], columns[first], reports[0]["settings"]["seed"])))
    return View(reports, students, columns, meaning, summary, pairs, _differing(reports))


def _settings(report: dict[str, Any]) -> dict[str, Any]:
    return report.get("settings") or {}


def _names(reports: list[dict[str, Any]]) -> list[str]:
    """Names of the models, each different and none that of another column."""
    names: list[str] = []
    for report in reports:
        name = wanted = report["model"]
        number = 2
        while name in names or name in COLUMNS:
            name, number = f"{wanted} ({number})", number + 1
        names.append(name)
    return names


def _check_comparable(reports: list[dict[str, Any]]) -> None:
    first = reports[0]
    for report in reports:
        if "student" not in report["columns"]:
            raise InputError(
                f"{report['model']}: its results have no column student, which is what several results are compared "
                "in; run `linearize eval` on it with that column"
            )
        found = {key: (_shared(report, key), _shared(first, key)) for key in SHARED}
        unequal = [f"{key} ({ours} here, {theirs} there)" for key, (ours, theirs) in found.items() if ours != theirs]
        if not unequal and _asked(report) != _asked(first):
            unequal = [f"suite (both named {report['suite']}, but with other contents)"]
        if unequal:
            raise InputError(
                f"{report['model']}: cannot be compared with {first['model']}, which was measured with another "
                f"{', '.join(unequal)}; run `linearize eval` again on one of them with the settings of the other"
            )
        tasks = first["columns"]["student"]["tasks"]
        for name, score in report["columns"]["student"]["tasks"].items():
            if name in tasks and score.get("prompts") != tasks[name].get("prompts"):
                raise InputError(
                    f"{report['model']}: was asked other prompts in {name} than {first['model']}, so their scores "
                    "cannot be compared; run `linearize eval` again on both with the same version of lm-eval"
                )


def _shared(report: dict[str, Any], key: str) -> str:
    if key == "suite":
        return report["suite"]
    if key == "source":
        source = _settings(report).get("source") or {"id": report["source"]}
        return " ".join(str(value) for value in source.values() if value is not None)
    return str(_settings(report).get(key))


def _asked(report: dict[str, Any]) -> dict[str, Any]:
    """What the suite asks for, without what only describes it; rotations add to a task and change nothing of it."""
    suite = _settings(report).get("suite") or {}
    asked = {name: value for name, value in suite.items() if name not in ("description", "columns")}
    tasks = [{key: value for key, value in task.items() if key != "rotate"} for task in asked.get("tasks", ())]
    return {**asked, "tasks": tasks}


def _differing(reports: list[dict[str, Any]]) -> dict[str, list[str]]:
    rows: list[dict[str, Any]] = []
    for report in reports:
        environment = report["environment"]
        machine = {f"{key} (machine)": environment.get(key) for key in ("cpu", "cores", "threads", "device", "commit")}
        versions = {f"{name} (version)": found for name, found in (environment.get("versions") or {}).items()}
        settings = {key: value for key, value in _settings(report).items() if key not in SHARED}
        rows.append({**settings, **machine, **versions})
    keys = dict.fromkeys(key for row in rows for key in row)
    values = {key: [str(row.get(key)) for row in rows] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}
