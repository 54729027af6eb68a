"""The verbs that only tell: what a folder is, what recipes, mixers and architectures there are, what is wrong."""

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.app import Json, Set, app, note, show
from linearize.errors import InputError


@app.command()
def inspect(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Any model folder, GGUF file or Hub id.", show_default=False)
    ],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: FILE.png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a model folder is made of, from its headers.

    \b
    Example:
      linearize inspect runs/demo/merged --json
    """
    from linearize.checkpoint import describe

    found = describe.inspect(folder)
    if plot is not None:
        from linearize.reporting.plot import draw

        note(f"picture: {draw(found, plot)}")
    show(found, as_json, describe.text(found))


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
    from linearize.recipe import load as stage

    if name is not None:
        resolved = stage.load(name)
        return show(stage.to_dict(resolved), as_json, stage.to_yaml(resolved).rstrip())
    listed = [stage.load(each) for each in stage.names()]
    rows = [
        {"name": each.name, "source": each.source.id, "status": each.status, "description": each.description}
        for each in listed
    ]
    show(rows, as_json, "\n".join(f"{row['name']:<14} {row['status']:<25} {row['description']}" for row in rows))


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
    from linearize.checkpoint.manifest import verify
    from linearize.recipe import load as stage

    problems = []
    for file in files:
        try:
            if Path(file).is_dir():
                problems += [f"{file}/{problem}; write the folder again" for problem in verify(file)]
            else:
                stage.load(file)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    show({"ok": files}, as_json, "\n".join(f"{file}: ok" for file in files))


@app.command()
def mixers(
    model: Annotated[
        str | None, typer.Option(help="Print what each costs in this one: recipe, Hub id, folder or GGUF file.")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """List the mixers: update rule, paper, state, settings; or what each costs in a model.

    \b
    Example:
      linearize mixers --model smollm2-135m
    """
    from linearize.conversion import costs

    if model is None:
        listed = costs.describe()
        return show(listed, as_json, costs.text(listed))
    from linearize.recipe import load as recipes

    found = costs.costs(recipes.resolve(model, set_ or ()))
    show(found, as_json, costs.table(found))


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
        from linearize.model.architectures import record

        found = record()
        count = f"{len(found['passes'])} model types of transformers {found['transformers']}"
        return show(found, as_json, f"{', '.join(found['passes'])}\n\n{count}")
    from linearize.conversion import probe as stage
    from linearize.recipe import load as recipes

    source = recipes.resolve(probe).source
    checks = stage.probe_named(source.id, source.package, tiny)
    show([vars(check) for check in checks], as_json, stage.text(checks))
    if not stage.passes(checks):
        raise typer.Exit(1)
