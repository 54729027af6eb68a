"""The verbs that write a folder in another form: convert and export."""

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize import verbs
from linearize.cli.app import Folder, Json, Out, Overwrite, Set, WithCode, app, command, next_step, note, show


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
    cache: Annotated[str | None, typer.Option(help="Bytes of cache of one row, such as 8MiB.")] = None,
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
    planned = {}

    def on_plan(plan, target: Path) -> None:
        planned.update(plan=plan, out=target)
        if not dry_run:
            note(plan.text())

    verbs.convert(
        model, out, recipe=recipe, mixer=mixer, window=window, sinks=sinks, combine=combine, layers=layers,
        cache=cache, dtype=dtype, revision=revision, link=link, allow_pickle=allow_pickle, with_code=with_code,
        set=set_ or (), dry_run=dry_run, overwrite=overwrite, on_plan=on_plan,
    )  # fmt: skip
    plan, target = planned["plan"], str(planned["out"])
    if dry_run:
        show(plan.to_dict(), as_json, plan.text())
    else:
        show({"out": target, "plan": plan.to_dict()}, as_json, target)
        recover = command("train", target, "--out", f"{target}-trained")
        next_step(as_json, f"{command('generate', target)} to talk to it", f"{recover} to recover what it has lost")


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As --model of convert: a recipe, a model.", show_default=False)
    ],
    recipe: Annotated[str | None, typer.Option(help="Recipe to use with another model.")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, a100-40, l40s, l4, rtx4090, rtx3090, or cpu.")] = "h100",
    gpus: Annotated[int, typer.Option(help="How many.")] = 1,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Tell what a recipe takes: memory of a device, time and disk, by stage.

    \b
    Example:
      linearize plan smollm2-135m --gpu l4
    """
    made = verbs.plan(model, recipe=recipe, gpu=gpu, gpus=gpus, set=set_ or ())
    show(made.to_dict(), as_json, made.text())


@app.command()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option(help="source (the architecture it was converted from), onnx or pt2.")],
    out: Out,
    piece: Annotated[int, typer.Option(help="Tokens that a graph's prefill reads at a time.")] = 64,
    quantize: Annotated[str | None, typer.Option(help="int8 weights (onnx).")] = None,
    state_dtype: Annotated[str | None, typer.Option(help="float32: keep states unrounded (onnx, pt2).")] = None,
    link: Annotated[bool, typer.Option("--link", help="Hard-link the weights instead of copying.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a folder in another format: the source's own, byte for byte, or graphs for other runtimes.

    `linearize generate` runs a folder of --to onnx with onnxruntime alone.

    \b
    Example:
      linearize export runs/demo/merged --to source --out runs/demo/as-source
    """
    settings: dict[str, Any] = {"piece": piece, "quantize": quantize, "state_dtype": state_dtype}
    written = verbs.export(folder, to, out, link=link, overwrite=overwrite, **settings)
    show({"out": str(written)}, as_json, str(written))
    next_step(as_json, "open it with transformers: nothing of linearize is in it")
