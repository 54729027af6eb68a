"""The report: one HTML file with everything in it, from one results.json or from several of the same source.

Nothing is loaded from elsewhere and nothing needs JavaScript. `page.html.jinja` is the page; text of a results file
(names of models, tasks, machines) is escaped there. What was not measured is left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from linearize.checkpoint.atomic import write_text
from linearize.checkpoint.replacing import check_file_output
from linearize.errors import InputError
from linearize.formats import each_string, plain
from linearize.reporting import sections, verdict
from linearize.reporting.view import view
from linearize.results import file as results_file
from linearize.results.file import presenting

SECTIONS = (
    sections.recovery,
    sections.numbers,
    sections.paired,
    sections.positions,
    sections.recall,
    sections.capacity,
    sections.behaviour,
    sections.speed,
    sections.layers,
    sections.pruning,
    sections.settings,
)


def write(reports: list[dict[str, Any]], path: str | Path) -> Path:
    """Write the report so that the file appears, complete, by one rename.

    Args:
        reports: valid results, see `linearize.results.schema`; of several the same source, suite, limit and seed.
        path: file to write.

    Returns:
        `path`.

    Raises:
        InputError: the results cannot be compared, or the file cannot be written.

    Example:
        >>> linearize.report("runs/demo/results.json", "runs/demo/report.html")
    """
    check_target(path := Path(path))
    return write_text(path, render(reports))


def check_target(path: Path) -> None:
    """Refuse a page in the place of anything but a page of ours; earlier versions left no name in theirs.

    Raises:
        InputError: see `check_file_output`.
    """
    marks = (b'<meta name="generator" content="linearize">', b'<div class="verdict')
    check_file_output(
        path, "a page of `linearize report`",
        lambda content: content[:9].upper() == b"<!DOCTYPE" and any(mark in content for mark in marks),
    )  # fmt: skip


def beside(results: Path) -> Path:
    """Where the report of a results file lies: report.html beside results.json, NAME.html beside another NAME.json."""
    return results.with_name("report.html") if results.name == "results.json" else results.with_suffix(".html")


def render(reports: list[dict[str, Any]]) -> str:
    """The page as text; arguments and errors as in `write`."""
    with presenting(reports):
        return _render([each_string(report, plain) for report in reports])


def _render(reports: list[dict[str, Any]]) -> str:
    shown = view(reports)
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "undefined": StrictUndefined}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **options)
    verdicts = [
        (student, asked := verdict.checks(report), verdict.answer(asked), *verdict.told(report))
        for student, report in zip(shown.students, shown.reports, strict=True)
    ]
    content: dict[str, Any] = {make.__name__: make(shown) for make in SECTIONS}
    content["picture"] = content.pop("positions") or content["recovery"]  # of the first screen
    if content["picture"] is content["recovery"]:
        content["recovery"] = None
    return environment.get_template("page.html.jinja").render(view=shown, verdicts=verdicts, **content).lstrip()


def report(files: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write results as one HTML page, or compare several models of the same source.

    Args:
        files: one results file, or several.
        out: page to write; None: report.html beside a single file.

    Returns:
        The page.

    Raises:
        InputError: a file cannot be read, they cannot be compared, or several are given without `out`.

    Example:
        >>> linearize.report(["runs/a/results.json", "runs/b/results.json"], out="compared.html")
    """
    paths = [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
    if out is None and len(paths) > 1:
        raise InputError(f"report: {len(paths)} files make one page; say by --out where to write it")
    target = Path(out) if out is not None else beside(paths[0])
    return write([results_file.read(file) for file in paths], target)
