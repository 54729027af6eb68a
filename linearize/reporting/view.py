"""One or several results files as one set of columns, for the report."""

from dataclasses import dataclass, field
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
        pairs: student -> control -> the student minus the control, as in results.json.
        differing: setting -> its value by student, of those that are not the same in all.
    """

    reports: list[dict[str, Any]]
    students: list[str]
    columns: dict[str, Any] = field(default_factory=dict)
    meaning: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=lambda: {"average": {}, "recovery": {}})
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)
    differing: dict[str, list[str]] = field(default_factory=dict)

    @property
    def styles(self) -> Styles:
        """Colour and dashes of each column, the same in all charts."""
        return styles(self.columns)

    @property
    def windows(self) -> list[int]:
        """The students' windows, each once."""
        return sorted({window for report in self.reports if (window := _settings(report).get("window"))})

    @property
    def tasks(self) -> dict[str, str]:
        """Every task and its name in charts and tables."""
        scores = [item for column in self.columns.values() for item in column["tasks"].items()]
        return {task: score.get("label", task) for task, score in scores}

    def prefix(self, student: str) -> str:
        """How a line about one of several students begins; empty for one alone."""
        return f"{student}: " if len(self.students) > 1 else ""


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
        meaning = {name: COLUMNS[name] for name in columns}
        return View(reports, ["student"], columns, meaning, summary, {"student": summary["paired"]})
    _check_comparable(reports)
    return _side_by_side(View(reports, _names(reports), differing=_differing(reports)))


def _side_by_side(shown: View) -> View:
    """Fill a view of several results: the shared source, the window controls, the students, and their differences."""

    def add(name: str, report: dict[str, Any], column: str, words: str) -> None:
        shown.columns[name], shown.meaning[name] = report["columns"][column], words
        for key, values in shown.summary.items():
            if column in report["summary"][key]:
                values[name] = report["summary"][key][column]

    each = list(zip(shown.students, shown.reports, strict=True))
    one_window = len({str([_settings(report).get(key) for key in ("window", "sinks")]) for _, report in each}) == 1
    for column in ("source", "window"):
        for student, report in each:
            name = column if column == "source" or one_window else f"window of {student}"
            if column in report["columns"] and name not in shown.columns:
                add(name, report, column, COLUMNS[column])
    first = shown.students[0]
    for student, report in each:
        add(student, report, "student", f"the evaluated model {report['model']}")
        shown.pairs[student] = {
            control if control in shown.columns else f"{control} of {student}": report["summary"]["paired"][control]
            for control in ("source", "window")
            if control in report["summary"]["paired"]
        }
        if student != first:
            seed = shown.reports[0]["settings"]["seed"]
            shown.pairs[student][first] = paired(shown.columns[student], shown.columns[first], seed)
    return shown


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
        values = {key: (_shared(report, key), _shared(first, key)) for key in SHARED}
        unequal = [f"{key} ({ours} here, {theirs} there)" for key, (ours, theirs) in values.items() if ours != theirs]
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
        versions = {f"{name} (version)": each for name, each in (environment.get("versions") or {}).items()}
        settings = {key: value for key, value in _settings(report).items() if key not in SHARED}
        rows.append({**settings, **machine, **versions})
    keys = dict.fromkeys(key for row in rows for key in row)
    values = {key: [str(row.get(key)) for row in rows] for key in keys}
    return {key: own for key, own in values.items() if len(set(own)) > 1}
