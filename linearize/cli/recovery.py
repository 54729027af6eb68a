"""The verbs that recover what a conversion costs: allocate, calibrate, select, training, merge, and whole recipes."""

from pathlib import Path
from typing import Annotated

import typer

from linearize import verbs
from linearize.cli.app import (
    Flags,
    Folder,
    Json,
    Out,
    Overwrite,
    Recipe,
    Resume,
    Set,
    app,
    command,
    next_step,
    note,
    show,
)

Tokens = Annotated[int | None, typer.Option(help="How much text to read.  [default: the recipe's]")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens in a block.  [default: the recipe's, else 1024]")]


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
    written = verbs.calibrate(
        folder, out, recipe=recipe, tokens=tokens, seq_len=seq_len, set=set_ or (), overwrite=overwrite
    )
    show({"out": str(written)}, as_json, str(written))
    next_step(as_json, command("train", written, "--out", f"{written}-trained"))


@app.command()
def allocate(
    folder: Folder,
    cache: Annotated[
        str | None, typer.Option(help="Bytes of one row, such as 8MiB.  [default: the recipe's, else the folder's]")
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
    """Divide a budget of cache over the layers by what each gains, and compare it with equal shares.

    \b
    Example:
      linearize allocate runs/best/0-converted --out runs/best/allocated
    """
    choice = verbs.allocate(
        folder, out, cache=cache, plot=plot, recipe=recipe, tokens=tokens, seq_len=seq_len, set=set_ or (),
        overwrite=overwrite,
    )  # fmt: skip
    if plot is not None:
        note(f"picture: {plot}")
    from linearize.reporting.choices import allocation

    written = None if out is None else str(out)
    show({"out": written, **choice}, as_json, allocation(choice) + (f"\n\n{written}" if written else ""))


@app.command()
def prune(
    folder: Folder,
    out: Out,
    sparsity: Annotated[str, typer.Option(help="Share of the weights, such as 0.5, or 2:4.")] = "0.5",
    recipe: Recipe = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    set_: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Set the weights that matter least to zero, by Wanda, without training.

    \b
    Example:
      linearize prune runs/demo/merged --sparsity 2:4 --out runs/demo/pruned
    """
    written = verbs.prune(
        folder, out, sparsity=sparsity, recipe=recipe, tokens=tokens, seq_len=seq_len, set=set_ or (),
        overwrite=overwrite,
    )  # fmt: skip
    made = verbs.facts_of(written)["pruning"]
    note(
        f"{made['zeros']:.1%} of {made['layers']} layers' weights are zero; loss of other text "
        f"{made['loss_before']:.3f}, now {made['loss_after']:.3f}"
    )
    show({"out": str(written), "pruning": made}, as_json, str(written))


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
    choice = verbs.select(
        folder, out, keep=keep, per=per, by=by, plot=plot, recipe=recipe, tokens=tokens, seq_len=seq_len,
        set=set_ or (), overwrite=overwrite,
    )  # fmt: skip
    if plot is not None:
        note(f"picture: {plot}")
    from linearize.reporting.choices import selection

    written = None if out is None else str(out)
    show({"out": written, **choice}, as_json, selection(choice) + (f"\n\n{written}" if written else ""))
    train = command("train", written, "--out", f"{written}-trained")
    next_step(as_json, train if written else "the same with --out DIR, which writes the folder")


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
    written = verbs.train(
        folder, out, recipe=recipe, stage=stage, resume=resume, set=set_ or (), overwrite=overwrite, flags=flags or ()
    )
    show({"out": str(written)}, as_json, str(written))
    adapter = (written / "adapter_config.json").is_file()
    next_step(as_json, command("merge", written, "--out", f"{written}-merged") if adapter else command("eval", written))


def _stage_verb(name: str, about: str) -> None:
    """A verb that is `train --stage NAME`."""

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
        train(folder, out, recipe, name, resume, set_, overwrite, as_json, flags)


_stage_verb(
    "transfer", "Recover each layer on its own: the output of the source's attention, on the source's own input."
)
_stage_verb("distil", "Recover the source's distribution over the next token.")
_stage_verb("long", "Recover the source's distribution over the next token in long texts.")


@app.command()
def merge(folder: Folder, out: Out, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Fold trained adapters into a plain model folder.

    \b
    Example:
      linearize merge runs/demo/1-distil --out runs/demo/merged
    """
    written = verbs.merge(folder, out, overwrite=overwrite)
    show({"out": str(written)}, as_json, str(written))
    next_step(as_json, f"{command('eval', written)} to compare it with its source")


@app.command()
def run(
    model: Annotated[str, typer.Argument(metavar="NAME", help="Recipe, recipe file, Hub id, folder or GGUF file.")],
    out: Annotated[Path | None, typer.Option(help="Folder for all stages.  [default: runs/NAME]")] = None,
    set_: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    flags: Flags = None,
) -> None:
    """Run a whole recipe: convert, allocate, calibrate and select if it says so, train, merge, eval.

    Finished stages are kept: after an interruption the same command goes on where it stopped. Flags after -- go to
    `accelerate launch` for the training stages.

    \b
    Example:
      linearize run smollm2-135m --out runs/demo
    """
    from linearize.cli.evaluation import show_results
    from linearize.recipe import load as recipes
    from linearize.reporting import page

    target = out or recipes.run_folder(recipes.resolve(model, set_ or ()))
    page.check_target(target / "report.html")
    results = verbs.run(model, target, set=set_ or (), overwrite=overwrite, flags=flags or (), note=note)
    show_results(results, as_json, target / "results.json")
