"""The verbs that measure and compare: eval, bench, report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize import verbs
from linearize.cli.app import Flags, Folder, Json, app, is_main, next_step, note, show
from linearize.errors import InputError


@app.command("eval")
def evaluate(
    folder: Folder,
    suite: Annotated[str, typer.Option(help="Name or file of a suite, or lm-eval tasks: arc_easy,piqa.")] = "smoke",
    source: Annotated[str | None, typer.Option(help="Source to compare with.  [default: the recorded one]")] = None,
    against: Annotated[str | None, typer.Option(help="Another student of it, for a column `other`.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write.  [default: DIR/results.json]")] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Of source,window,converted,student,student/window,student/memory.  [default: the suite's]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task, for a quick look.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of few-shot examples and samples.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as in DIR.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Hold the weights of all models as int8, int4 or nf4.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval task files of your own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run has finished.")] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="Exit with 1 if worse: at least, of recovery, memory_gain, recall; at most, of perplexity_ratio, kl. "
            "May be repeated.",
        ),
    ] = None,
    as_json: Json = False,
    flags: Flags = None,
) -> None:
    """Compare a model with its source and with untrained controls: results.json, and beside it report.html.

    With flags after -- it runs under `accelerate launch`: each process measures some of the columns on its own GPU.

    \b
    Example:
      linearize eval runs/demo/merged --suite smoke
    """
    from linearize.reporting import page, verdict

    limits = verdict.parse_limits(fail_under or [])  # before the work
    target = out or (folder / "results.json" if folder.is_dir() else None)
    if target is not None:
        page.check_target(page.beside(target))
    options: dict[str, Any] = {"suite": suite, "source": source, "against": against, "out": out, "columns": columns}
    options |= {"limit": limit, "batch_size": batch_size, "seed": seed, "dtype": dtype, "quantize": quantize}
    options |= {"include_path": include_path}
    if flags:
        results = _launched(folder, options, flags, resume, as_json, target, bool(limits))
    else:
        results = verbs.evaluate(folder, **options, resume=resume)
        if not is_main():
            return
        show_results(results, as_json, target)
    shortfalls = verdict.shortfalls(results, limits)
    for line in shortfalls:
        note(line)
    if shortfalls:
        raise typer.Exit(1)


def _launched(
    folder: Path,
    options: dict[str, Any],
    flags: list[str],
    resume: bool,
    as_json: bool,
    target: Path | None,
    read: bool,
) -> dict[str, Any] | Path:
    """Run `eval` under `accelerate launch`; returns the file of its results if they are to be `read` again."""
    from linearize.evaluation import suite as suites
    from linearize.launch import launch

    if read and target is None:
        raise InputError("--fail-under: with several processes it reads the results file; name one by --out")
    columns = options["columns"]
    suites.check_columns(columns.split(",") if columns else suites.load(options["suite"]).columns, "columns")
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    launch("eval", flags, "linearize.cli", ["eval", str(folder), *given, *["--resume"] * resume, *["--json"] * as_json])
    return target if target is not None and read else {}


@app.command()
def bench(
    folder: Folder,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache.")] = "1024,8192,32768",
    batches: Annotated[str, typer.Option(help="Rows decoded together.")] = "1",
    steps: Annotated[int, typer.Option(help="Decoded tokens per context and batch.")] = 12,
    source: Annotated[str | None, typer.Option(help="Source to compare with.  [default: the recorded one]")] = None,
    out: Annotated[Path | None, typer.Option(help="Results file to write.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as in DIR.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Hold the weights of all models as int8, int4 or nf4.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: FILE.png, .svg or .pdf.")] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Measure lossless mode, on real text, instead.")] = False,
    as_json: Json = False,
) -> None:
    """Measure speed and memory by context length, beside the source and the window control.

    \b
    Example:
      linearize bench runs/demo/merged --contexts 1024,8192
    """
    results = verbs.bench(
        folder, contexts=_numbers("--contexts", contexts), batches=_numbers("--batches", batches), steps=steps,
        source=source, out=out, dtype=dtype, quantize=quantize, plot=plot, lossless=lossless,
    )  # fmt: skip
    if plot is not None:
        note(f"picture: {plot}")
    if as_json:
        show(results, as_json)
    elif lossless:
        print("\n".join(verbs.lossless_line(row) for row in results["rows"]))
    else:
        from linearize.reporting import terminal

        terminal.show_speed(results)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results of one model, or of several.")],
    out: Annotated[Path | None, typer.Option(help="Page to write.  [default: report.html beside FILE]")] = None,
    as_json: Json = False,
) -> None:
    """Write results as one HTML page, or compare several models of the same source.

    \b
    Example:
      linearize report runs/demo/results.json --out report.html
    """
    written = verbs.report(files, out)
    show({"out": str(written)}, as_json, str(written))
    next_step(as_json, "open it in a browser; it is one file and loads nothing")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text}: expected whole numbers separated by commas, such as 1024,8192") from error


def show_results(results: dict[str, Any], as_json: bool, file: Path | None) -> None:
    """Print results; where they lie in a file, write the page beside it and say where."""
    from linearize.reporting import page, terminal

    written = None if file is None else page.write([results], page.beside(file))
    if as_json:
        show(results, as_json)
    else:
        terminal.show(results)
    if written is not None:
        note(f"report: {written} (a page for a browser; its first lines are the verdict)")
