"""The verbs that make something of a converted folder: trained ones, results, answers, uploads."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.app import (
    Flags,
    Folder,
    Json,
    Out,
    Overwrite,
    Recipe,
    Resume,
    Set,
    WithCode,
    app,
    is_main,
    note,
    show,
)
from linearize.errors import InputError


@app.command()
def train(
    folder: Folder,
    out: Out,
    recipe: Recipe = None,
    stage: Annotated[str | None, typer.Option(help="Training stage of the recipe.  [default: the first]")] = None,
    resume: Resume = False,
    set_: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    flags: Flags = None,
) -> None:
    """Recover a converted model: one training stage.

    Without flags after --, it runs in this process: on the GPU if there is one, else on the CPU. With them it runs
    under `accelerate launch`, which distributes it.

    \b
    Example:
      linearize train runs/demo/0-converted --out runs/demo/1-distil --set train.distil.tokens=50000
    """
    from linearize import pipeline as runs
    from linearize.recipe import load as recipes

    resolved = recipes.recipe_of(folder, recipe, set_ or ())
    out = runs.train_stage(folder, resolved, stage, out, resume=resume, overwrite=overwrite, flags=flags or ())
    show({"out": str(out)}, as_json, str(out))


def _stage_verb(name: str, about: str) -> None:
    """A verb that is `train --stage NAME`, and knows that stage where the recipe has none of the name."""

    @app.command(
        name,
        help=f"{about}\n\nThe same as `train --stage {name}`; a recipe without such a stage gets the built-in one."
        f"\n\n\b\nExample:\n  linearize {name} runs/demo/0-converted --out runs/demo/1-{name}",
    )
    def verb(
        folder: Folder,
        out: Out,
        recipe: Recipe = None,
        resume: Resume = False,
        set_: Set = None,
        overwrite: Overwrite = False,
        as_json: Json = False,
        flags: Flags = None,
    ) -> None:
        from linearize import pipeline as runs
        from linearize.recipe import load as recipes

        known = recipes.to_dict(recipes.with_stage(recipes.recipe_of(folder, recipe), name))
        wanted = recipes.from_dict(known, set_ or (), "command line")
        out = runs.train_stage(folder, wanted, name, out, resume=resume, overwrite=overwrite, flags=flags or ())
        show({"out": str(out)}, as_json, str(out))


_stage_verb(
    "transfer", "Recover each layer on its own: the output of the source's attention, on the source's own input."
)
_stage_verb("distil", "Recover the source's distribution over the next token.")
_stage_verb("long", "Recover the source's distribution over the next token in long texts.")


@app.command()
def merge(
    folder: Folder,
    out: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fold trained adapters into a plain model folder.

    \b
    Example:
      linearize merge runs/demo/1-distil --out runs/demo/merged
    """
    from linearize.recovery import merge as stage

    out = stage.merge(folder, out, overwrite=overwrite)
    show({"out": str(out)}, as_json, str(out))


@app.command()
def run(
    model: Annotated[str, typer.Argument(metavar="NAME", help="Recipe, recipe file, Hub id, folder or GGUF file.")],
    out: Annotated[Path | None, typer.Option(help="Folder for all stages.  [default: runs/NAME]")] = None,
    set_: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    flags: Flags = None,
) -> None:
    """Run a whole recipe: convert, calibrate and select if it says so, train, merge, eval.

    Finished stages are kept: after an interruption the same command goes on where it stopped. Flags after -- go to
    `accelerate launch` for the training stages.

    \b
    Example:
      linearize run smollm2-135m --out runs/demo
    """
    from linearize import pipeline as runs
    from linearize.recipe import load as recipes

    resolved = recipes.resolve(model, set_ or ())
    out = out or recipes.run_folder(resolved)
    results = runs.run(resolved, out, overwrite=overwrite, flags=flags or (), note=note)
    _show_results(results, as_json, out / "results.json")


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
    from linearize import launch
    from linearize.evaluation import suite as suites
    from linearize.evaluation.evaluate import evaluate as stage
    from linearize.reporting import verdict
    from linearize.results import file as results_file

    limits = verdict.parse_limits(fail_under or [])  # before the work
    target = out or (folder / "results.json" if folder.is_dir() else None)
    options: dict[str, Any] = {
        "suite": suite,
        "source": source,
        "against": against,
        "out": out,
        "limit": limit,
        "columns": columns,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": dtype,
        "include_path": include_path,
    }
    if flags:
        if limits and target is None:
            raise InputError("--fail-under: with several processes it reads the results file; name one by --out")
        suites.check_columns(columns.split(",") if columns else suites.load(suite).columns, "columns")
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        arguments = ["eval", str(folder), *given, *["--resume"] * resume, *["--json"] * as_json]
        launch.launch("eval", flags, "linearize.cli", arguments)
        results = results_file.read(target) if target is not None and limits else {}
    else:
        results = stage(folder, **{**options, "columns": columns.split(",") if columns else None}, resume=resume)
        if not is_main():
            return
        _show_results(results, as_json, target)
    short = verdict.shortfalls(results, limits)
    for line in short:
        note(line)
    if short:
        raise typer.Exit(1)


@app.command()
def bench(
    folder: Folder,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache.")] = "1024,8192,32768",
    batches: Annotated[str, typer.Option(help="Rows decoded together.")] = "1",
    steps: Annotated[int, typer.Option(help="Decoded tokens per context and batch.")] = 12,
    source: Annotated[str | None, typer.Option(help="Source to compare with.  [default: the recorded one]")] = None,
    out: Annotated[Path | None, typer.Option(help="Results file to write.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as in DIR.")] = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: FILE.png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory by context length, beside the source and the window control.

    \b
    Example:
      linearize bench runs/demo/merged --contexts 1024,8192
    """
    from linearize.evaluation.evaluate import bench as stage
    from linearize.reporting import terminal
    from linearize.reporting.plot import check_target, draw_speed

    if plot is not None:
        check_target(plot)  # before the measurement, which takes minutes
    results = stage(
        folder,
        contexts=_numbers("--contexts", contexts),
        batches=_numbers("--batches", batches),
        steps=steps,
        source=source,
        out=out,
        dtype=dtype,
    )
    if plot is not None:
        note(f"picture: {draw_speed(terminal.speed_panels(results), plot)}")
    if as_json:
        show(results, as_json)
    else:
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
    from linearize.reporting import page
    from linearize.results import file as results_file

    if out is None and len(files) > 1:
        raise InputError(f"report: {len(files)} files make one page; say by --out where to write it")
    written = page.write([results_file.read(file) for file in files], out or page.beside(files[0]))
    show({"out": str(written)}, as_json, str(written))


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text}: expected whole numbers separated by commas, such as 1024,8192") from error


def _show_results(results: dict[str, Any], as_json: bool, file: Path | None) -> None:
    """Print results; where they lie in a file, write the page beside it and say where."""
    from linearize.reporting import page, terminal

    if file is not None:
        note(f"report: {page.write([results], page.beside(file))}")
    if as_json:
        show(results, as_json)
    else:
        terminal.show(results)


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Model folder or Hub id.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="Text to answer.  [default: chat on the terminal]")] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of an answer.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest.  [default: the model's]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample within this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or chat.

    \b
    Example:
      linearize generate runs/demo/merged --prompt "Why is the sky blue?" --max-new-tokens 60
    """
    from linearize import generation as stage

    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if prompt is None:
        if as_json:
            raise InputError("generate --json: needs --prompt; a chat on the terminal is not one result")
        model, tokenizer = stage.load(folder)
        stage.chat(stage.Chat(model, tokenizer, system=system, **settings), sys.stdin, sys.stdout)
        return
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}] if system else prompt
    answer = stage.generate(folder, messages, raw=raw, stream=None if as_json else sys.stdout, **settings)
    if as_json:
        show(answer.to_dict(), as_json)
    else:
        note(f"\n{sum(answer.new_tokens)} tokens, {answer.tokens_per_second:.1f} tokens/s")


@app.command()
def push(
    folder: Folder,
    repo: Annotated[str, typer.Option(help="organisation/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the card and the files.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    with_code: WithCode = False,
    as_json: Json = False,
) -> None:
    """Upload a folder, with a model card, to the Hugging Face Hub.

    \b
    Example:
      linearize push runs/demo/merged --repo my-org/smollm2-135m-gla --dry-run
    """
    from linearize.hub import push as stage

    if dry_run and as_json:
        return show(stage.plan(folder, repo, with_code).to_dict(), as_json)
    answer = stage.push(folder, repo, private=private, dry_run=dry_run, message=message, with_code=with_code)
    show({"url": answer}, as_json, answer)


@app.command()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option(help="source: back to the architecture it was converted from.")],
    out: Out,
    link: Annotated[bool, typer.Option("--link", help="Hard-link the weights instead of copying.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a folder in another format; tensors stay as they are, byte for byte.

    \b
    Example:
      linearize export runs/demo/merged --to source --out runs/demo/as-source
    """
    from linearize.conversion import export as stage

    done = stage.export(folder, to, out, overwrite, link)
    show({"out": str(done)}, as_json, str(done))
