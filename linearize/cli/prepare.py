"""The verbs that make the folder to train: convert, and what may come after it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.app import Folder, Json, Out, Overwrite, Recipe, Set, WithCode, app, note, show

Tokens = Annotated[int | None, typer.Option(help="How much text to read.  [default: the recipe's]")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens in a block.  [default: the recipe's, else 1024]")]


@app.command()
def convert(
    model: Annotated[str, typer.Option(help="Recipe name, recipe file, Hub id, model folder or GGUF file.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write.  [default: runs/NAME/0-converted]")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe to use with another --model.")] = None,
    mixer: Annotated[str | None, typer.Option(help="What replaces softmax attention; see `linearize mixers`.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of exact attention.")] = None,
    sinks: Annotated[int | None, typer.Option(help="First tokens that stay visible to all.")] = None,
    combine: Annotated[str | None, typer.Option(help="memory, liger or none.")] = None,
    layers: Annotated[str | None, typer.Option(help="full, all, 0-11,20, or keep:20,23.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Hard-link unchanged weights instead of copying.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights, restricted.")] = False,
    with_code: WithCode = False,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a model: same weights, other attention.

    \b
    Example:
      linearize convert --model smollm2-135m --out runs/demo/0-converted
    """
    from linearize.recipe import load as recipes

    named = [] if mixer is None else [f"{recipes.NAME}={mixer}"]
    resolved = recipes.resolve(model, [*named, *(set_ or ())], recipe)
    flags = {
        "convert.mixer.window": window,
        "convert.mixer.sinks": sinks,
        "convert.mixer.combine": combine,
        "convert.layers": layers,
        "convert.dtype": dtype,
        "source.revision": revision,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    resolved = recipes.from_dict(recipes.to_dict(resolved), given, "command line")

    from linearize.checkpoint.sources import locate
    from linearize.conversion import convert as stage
    from linearize.conversion.plan import plan as make_plan

    source = resolved.source
    located = locate(source.id, source.revision, package=source.package)
    plan = make_plan(located, resolved)
    if dry_run:
        return show(plan.to_dict(), as_json, plan.text())
    note(plan.text())
    out = out or recipes.run_folder(resolved) / "0-converted"
    stage.convert(located, resolved, out, overwrite, link=link, allow_pickle=allow_pickle, with_code=with_code)
    show({"out": str(out), "plan": plan.to_dict()}, as_json, str(out))


@app.command()
def calibrate(
    folder: Folder,
    out: Out,
    recipe: Recipe = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    set_: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fit how much each head trusts its memory, in closed form, without training.

    \b
    Example:
      linearize calibrate runs/demo/0-converted --out runs/demo/calibrated
    """
    from linearize.recipe import load as recipes
    from linearize.recovery import calibrate as stage

    wanted = recipes.recipe_of(folder, recipe, set_ or ())
    out = stage.calibrate(folder, wanted, out, tokens=tokens, seq_len=seq_len, overwrite=overwrite)
    show({"out": str(out)}, as_json, str(out))


@app.command()
def select(
    folder: Folder,
    keep: Annotated[int | None, typer.Option(help="How many stay softmax.  [default: the recipe's, else 4]")] = None,
    per: Annotated[
        str | None, typer.Option(help="Of layers, or of key/value heads.  [default: the recipe's, else layers]")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="uniform, sensitivity, greedy or recall.  [default: the recipe's, else sensitivity]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.  [default: only print]")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: FILE.png, .svg or .pdf.")] = None,
    recipe: Recipe = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    set_: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Choose which replaced layers, or heads, become softmax again, and show what every budget costs in loss and cache.

    \b
    Example:
      linearize select runs/demo/0-converted --keep 4 --by recall --out runs/demo/selected
      linearize select runs/demo/0-converted --keep 12 --per heads --out runs/demo/selected
    """
    from linearize.recipe import load as recipes
    from linearize.recovery import select as stage
    from linearize.reporting.plot import check_target, draw_selection

    if plot is not None:
        check_target(plot)  # before the measurement, which takes minutes
    wanted = recipes.recipe_of(folder, recipe, set_ or ())
    given: dict[str, Any] = {"keep": keep, "by": by, "per": per, "tokens": tokens, "seq_len": seq_len}
    found = stage.select(folder, wanted, out, **given, overwrite=overwrite)
    if plot is not None:
        note(f"picture: {draw_selection(found, plot)}")
    written = None if out is None else str(out)
    show({"out": written, **found}, as_json, stage.text(found) + (f"\n\n{written}" if written else ""))
