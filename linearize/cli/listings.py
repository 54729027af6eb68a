"""The verbs that only tell: what a folder is, what recipes, mixers and architectures there are, what is wrong."""

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize import verbs
from linearize.cli.app import Json, Set, app, command, next_step, note, show, table


@app.command()
def inspect(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Any model folder, GGUF file or Hub id.", show_default=False)
    ],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: FILE.png, .svg or .pdf.")] = None,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Also run it over a text and look for outliers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a model folder is made of, from its headers.

    \b
    Example:
      linearize inspect runs/demo/merged --json
    """
    from linearize.reporting.terminal import inspection

    description = verbs.inspect(folder, plot, outliers=outliers)
    if plot is not None:
        note(f"picture: {plot}")
    shown = inspection(description)
    if outliers:
        from linearize.evaluation.outliers import text

        shown += f"\n\n{text(description['outliers'])}"
    show(description, as_json, shown)


@app.command()
def doctor(
    folder: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Model folder, GGUF file or Hub id.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what this machine and a model can do, and why not more; exits with 2 if something cannot be opened.

    \b
    Example:
      linearize doctor runs/demo/merged
    """
    from linearize.evaluation.diagnosis import text

    report = verbs.doctor(folder)
    show(report, as_json, text(report))
    if not report["ok"]:
        raise typer.Exit(2)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or print one with its defaults.

    \b
    Example:
      linearize recipes smollm2-135m
    """
    from linearize.recipe import load

    if name is not None:
        resolved = load.load(name)
        return show(load.to_dict(resolved), as_json, load.to_yaml(resolved).rstrip())
    keys = ("name", "status", "source", "description")
    rows = [
        dict(zip(keys, (recipe.name, recipe.status, recipe.source.id, recipe.description), strict=True))
        for recipe in map(load.load, load.names())
    ]
    show(rows, as_json, None if as_json else table(keys, [[row[key] for key in keys] for row in rows]))
    next_step(as_json, "linearize recipes NAME prints one with every default", "linearize run NAME runs it")


@app.command()
def check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Recipes, or model folders.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Check recipe files, or every file of converted folders by its hash, and report every problem.

    \b
    Example:
      linearize check recipes/smollm2-135m.yaml runs/demo/0-converted
    """
    verbs.check(files)
    show({"ok": files}, as_json, "\n".join(f"{file}: ok" for file in files))


@app.command()
def mixers(
    model: Annotated[
        str | None, typer.Option(help="Print what each costs in this one: recipe, Hub id, folder or GGUF file.")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """List the mixers and what each is worth beside the window control; or what each costs in a model.

    Update rules and settings stand in what --json prints.

    \b
    Example:
      linearize mixers --model smollm2-135m
    """
    from linearize.conversion import costs

    if model is None:
        listed = costs.describe()
        show(listed, as_json, None if as_json else costs.mixers_table(listed))
        return next_step(as_json, "linearize mixers --model NAME counts what each costs in a model")
    from linearize.recipe import load

    priced = costs.costs(load.resolve(model, set_ or ()))
    show(priced, as_json, None if as_json else costs.costs_table(priced))
    next_step(as_json, command("convert", "--model", model, "--mixer", "NAME"))


@app.command()
def archs(
    probe: Annotated[str | None, typer.Option(metavar="MODEL", help="Check this model instead of listing.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Check a tiny random model of its configuration.")] = False,
    as_json: Json = False,
) -> None:
    """List the architectures that can be converted exactly, or check a model.

    MODEL is a recipe, folder, GGUF file or Hub id; with --tiny also a model type. Exits with 1 if a check fails.

    \b
    Example:
      linearize archs --probe my-org/my-model --tiny
    """
    if probe is None:
        from linearize.conversion.probe import architectures

        known = architectures.record()
        show(known, as_json, None if as_json else _architectures(known))
        return next_step(as_json, "linearize archs --probe MODEL checks any model, listed or not")
    from linearize.conversion import probe as probing
    from linearize.recipe import load

    source = load.resolve(probe).source
    checks = probing.probe_named(source.id, source.package, tiny)
    show([vars(check) for check in checks], as_json, probing.text(checks))
    if probing.failures(checks):
        raise typer.Exit(1)


def _architectures(known: dict[str, Any]) -> Any:
    """What `record` holds as a table: the model types that pass, side by side, and why the others do not."""
    passes, columns = known["passes"], 4
    rows = [passes[start : start + columns] for start in range(0, len(passes), columns)]
    grid = table([""] * columns, rows)
    grid.show_header, grid.title_justify = False, "left"
    grid.title = f"{len(passes)} model types of transformers {known['transformers']} can be converted exactly"
    return grid
