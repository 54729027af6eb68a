"""The verbs of the package: `linearize.convert(...)` is `linearize convert ...`, with the same options and defaults.

Each resolves what a user names (a recipe, a folder, a model of the Hub) and calls the function that does the work. What
is heavy is imported inside, so that `import linearize` and `linearize --help` answer at once.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import InputError
from linearize.verbs.stages import Name, files_of, recipe_of_folder

if TYPE_CHECKING:
    from linearize.checkpoint.open import load as load
    from linearize.checkpoint.states import load_state as load_state
    from linearize.checkpoint.states import save_state as save_state
    from linearize.conversion.export import export as export
    from linearize.conversion.plan import Plan
    from linearize.evaluation.diagnosis import doctor as doctor
    from linearize.evaluation.evaluate import evaluate as evaluate
    from linearize.generation import Chat as Chat
    from linearize.generation import StateStore as StateStore
    from linearize.generation import generate as generate
    from linearize.hub.push import push as push
    from linearize.model.branches import branches as branches
    from linearize.model.mixers import MIXERS as MIXERS
    from linearize.model.mixers import build_config as build_config
    from linearize.model.modeling import LinearizedConfig as LinearizedConfig
    from linearize.model.modeling import LinearizedForCausalLM as LinearizedForCausalLM
    from linearize.model.modeling import linearize_ as linearize_
    from linearize.model.states import split_states as split_states
    from linearize.model.states import stack_states as stack_states
    from linearize.pipeline import plan as plan
    from linearize.recovery.merge import merge as merge
    from linearize.reporting.page import report as report
    from linearize.verbs.stages import allocate as allocate
    from linearize.verbs.stages import calibrate as calibrate
    from linearize.verbs.stages import prune as prune
    from linearize.verbs.stages import select as select

_HOMES = {
    **dict.fromkeys(("LinearizedConfig", "LinearizedForCausalLM", "linearize_"), "model.modeling"),
    **dict.fromkeys(("MIXERS", "build_config"), "model.mixers"),
    **dict.fromkeys(("Chat", "Lossless", "StateStore", "chat", "generate"), "generation"),
    **dict.fromkeys(("load_state", "save_state"), "checkpoint.states"),
    **dict.fromkeys(("split_states", "stack_states"), "model.states"),
    **dict.fromkeys(("allocate", "calibrate", "prune", "select"), "verbs.stages"),
    "InputError": "errors",
    "branches": "model.branches",
    "doctor": "evaluation.diagnosis",
    "evaluate": "evaluation.evaluate",
    "export": "conversion.export",
    "facts_of": "checkpoint.manifest",
    "graph_chat": "generation.graph:chat",
    "graph_generate": "generation.graph:generate",
    "is_graph": "generation.graph",
    "load": "checkpoint.open",
    "lossless_line": "generation.speed:line",
    "merge": "recovery.merge",
    "plan": "pipeline",
    "push": "hub.push",
    "push_plan": "hub.push:plan",
    "report": "reporting.page",
}
"""Names that live where their work is done, and are imported at the first use."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home, _, inside = _HOMES[name].partition(":")
        return getattr(import_module(f"linearize.{home}"), inside or name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def convert(
    model: Name, out: Name | None = None, *,
    recipe: Name | None = None, mixer: str | None = None, window: int | None = None, sinks: int | None = None,
    combine: str | None = None, layers: str | Sequence[int] | None = None, cache: str | int | None = None,
    dtype: str | None = None, revision: str | None = None, link: bool = False, allow_pickle: bool = False,
    with_code: bool = False, set: Iterable[str] = (), dry_run: bool = False, overwrite: bool = False,
    on_plan: Callable[..., None] | None = None,
) -> "Path | Plan":  # fmt: skip
    """Convert a model: same weights, other attention.

    Args:
        model: recipe name, recipe file, Hub id, model folder or GGUF file.
        out: folder to appear, complete, at the end; None: runs/NAME/0-converted.
        recipe: recipe to use with another `model`.
        mixer: what replaces softmax attention, a name of `linearize.MIXERS`.
        window: tokens of exact attention.
        sinks: first tokens that stay visible to all.
        combine: memory, liger or none.
        layers: full, all, a list of numbers, "0-11,20" or "keep:20,23".
        cache: bytes of the linearized layers' cache of one row, "8MiB", in the place of a number of clusters.
        dtype: float32, bfloat16, float16 or auto, as stored.
        revision: branch, tag or commit on the Hub.
        link: hard-link unchanged weights instead of copying them.
        allow_pickle: read PyTorch .bin files where there are no safetensors, with the restricted loader.
        with_code: bring the code along, for trust_remote_code without this package.
        set: changes of the recipe, each "convert.mixer.window=128".
        dry_run: write nothing and return the plan.
        overwrite: replace a model folder in the place of `out`, once the new one is complete.
        on_plan: called with the plan and `out` before anything is written.

    Returns:
        The folder; with `dry_run` the plan.

    Raises:
        InputError: anything wrong with the source, the recipe, the disk or `out`; nothing is left behind.

    Example:
        >>> linearize.convert("smollm2-135m", "runs/demo/0-converted", mixer="gla", window=64)
        PosixPath('runs/demo/0-converted')
    """
    from linearize.checkpoint.replacing import check_apart
    from linearize.checkpoint.sources import locate
    from linearize.conversion.convert import convert as run
    from linearize.conversion.plan import plan
    from linearize.recipe import load as recipes

    flags = {"mixer.window": window, "mixer.sinks": sinks, "mixer.combine": combine, "layers": layers, "dtype": dtype}
    flags = {f"convert.{key}": value for key, value in {**flags, "cache": cache}.items()}
    wanted = recipes.with_flags(str(model), recipe, mixer, flags | {"source.revision": revision}, set)
    located = locate(wanted.source.id, wanted.source.revision, package=wanted.source.package)
    planned = plan(located, wanted)
    target = Path(out) if out is not None else recipes.run_folder(wanted) / "0-converted"
    check_apart(target, files_of(model, recipe))
    if dry_run:
        planned = _rehearsed(planned, wanted, located, target, overwrite)
    if on_plan is not None:
        on_plan(planned, target)
    if dry_run:
        return planned
    return run(located, wanted, target, overwrite, link=link, allow_pickle=allow_pickle, with_code=with_code)


def _rehearsed(planned: "Plan", wanted: Any, located: Any, target: Path, overwrite: bool) -> "Plan":
    """The plan, once nothing is found that the conversion would refuse before it writes, or that later stages would."""
    from linearize import pipeline
    from linearize.checkpoint import tokenizer_files
    from linearize.checkpoint.atomic import check_output

    check_output(target, overwrite, [located.read])
    if located.gguf is None:
        tokenizer_files.check(located.path)
    return replace(planned, later=pipeline.problems(wanted))


def train(
    folder: Name, out: Name, *,
    recipe: Name | None = None, stage: str | None = None, resume: bool = False,
    set: Iterable[str] = (), overwrite: bool = False, flags: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Recover a converted model: one training stage.

    Args:
        folder: what `convert` or an earlier stage has written.
        out: folder to appear at the end; while it runs, everything is in OUT.training.
        recipe: name or file; None: `folder`/recipe.yaml.
        stage: of the recipe; None: the first. transfer, distil and long exist where the recipe has none of the name.
        resume: go on from the last checkpoint of an interrupted run.
        set: changes of the recipe, each "train.distil.tokens=50000".
        overwrite: replace `out`, or an interrupted run with other settings.
        flags: of `accelerate launch`, which then runs the stage on several processes; without, it runs in this one.

    Returns:
        `out`: adapters, or a whole model if the stage trains all weights.

    Raises:
        InputError: bad input, or the loss is not finite any more; checkpoints stay.

    Example:
        >>> linearize.train("runs/demo/0-converted", "runs/demo/1-distil", set=["train.distil.tokens=50000"])
    """
    from linearize import pipeline
    from linearize.recipe import load as recipes
    from linearize.recipe.schema import STAGES

    if stage in STAGES:
        known = recipes.with_stage(recipe_of_folder(folder, recipe, (), out), stage)
        wanted = recipes.from_dict(recipes.to_dict(known), set, "command line")
    else:
        wanted = recipe_of_folder(folder, recipe, set, out)
    return pipeline.train_stage(Path(folder), wanted, stage, Path(out), resume=resume, overwrite=overwrite, flags=flags)


def run(
    model: Name, out: Name | None = None, *,
    set: Iterable[str] = (), overwrite: bool = False, flags: Sequence[str] = (), note: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Run a whole recipe: convert, allocate, calibrate and select if it says so, train, merge, evaluate.

    Finished stages are kept: after an interruption the same call goes on where it stopped.

    Args:
        model: recipe, recipe file, Hub id, folder or GGUF file.
        out: folder for all stages; None: runs/NAME.
        set: changes of the recipe.
        overwrite: redo stages that were made with another recipe.
        flags: of `accelerate launch`, for the training stages.
        note: called with one line per stage.

    Returns:
        The content of results.json.

    Raises:
        InputError: bad input to a stage, or a stage was made with another recipe and `overwrite` is off.

    Example:
        >>> linearize.run("smollm2-135m", "runs/demo")["summary"]["recovery"]["student"]
    """
    from linearize import pipeline
    from linearize.recipe import load as recipes

    wanted = recipes.resolve(str(model), list(set))
    folder = Path(out) if out is not None else recipes.run_folder(wanted)
    return pipeline.run(wanted, folder, overwrite=overwrite, flags=flags, note=note, reads=files_of(model))


def bench(
    folder: Name, *,
    contexts: Sequence[int] = (1024, 8192, 32768), batches: Sequence[int] = (1,), steps: int = 12,
    source: str | None = None, out: Name | None = None, dtype: str = "auto", quantize: str | None = None,
    plot: Name | None = None, lossless: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure speed and memory by context length, beside the source and the window control.

    Args:
        folder: linearized folder, adapter folder or Hub id.
        contexts: tokens in the cache.
        batches: rows decoded together.
        steps: decoded tokens per context and batch, at least 3.
        source: the model that was converted; None: the recorded one.
        out: results file; None writes none.
        dtype: float32, bfloat16, float16, or auto: as in `folder`.
        quantize: hold the weights of all models as int8, int4 or nf4.
        plot: also draw it: FILE.png, .svg or .pdf.
        lossless: measure lossless mode instead, on real text: `steps` tokens, batch 1, no picture.

    Returns:
        Results, see `linearize.results.schema`; their columns hold `speed`. With `lossless`, see `generation.speed`.

    Raises:
        InputError: bad input.

    Example:
        >>> linearize.bench("runs/demo/merged", contexts=[1024])["columns"]["student"]["speed"][0]["token_seconds"]
    """
    if lossless:
        from linearize.evaluation.suite import read_text
        from linearize.generation.speed import bench_lossless

        if plot is not None or list(batches) != [1] or source is not None or quantize is not None:
            raise InputError(
                "bench: lossless writes one text at a time, from the recorded source, and draws nothing; leave out "
                "batches, source, quantize and plot"
            )
        return bench_lossless(folder, read_text("wikitext2_valid")[0], contexts, steps, dtype, out)
    from linearize.evaluation.evaluate import bench as run
    from linearize.reporting import terminal
    from linearize.reporting.plot import check_target, draw_speed

    if plot is not None:
        check_target(Path(plot))  # before the measurement, which takes minutes
    results = run(folder, contexts, batches, steps, source, out, dtype=dtype, quantize=quantize)
    if plot is not None:
        draw_speed(terminal.speed_panels(results), Path(plot))
    return results


def inspect(folder: Name, plot: Name | None = None, *, outliers: bool = False) -> dict[str, Any]:
    """Describe what a model folder is made of, from its headers.

    Args:
        folder: any model folder, GGUF file or Hub id.
        plot: also draw it: FILE.png, .svg or .pdf.
        outliers: also run a linearized model over a text, and tell of outliers in its activations and states.

    Returns:
        JSON-safe: layers, sizes, cache by context length; see `linearize.checkpoint.describe.inspect`.

    Raises:
        InputError: nothing is there, or it is damaged.

    Example:
        >>> linearize.inspect("runs/demo/0-converted")["layers"][0]["mixer"]
        'gla'
    """
    from linearize.checkpoint.describe import inspect as run

    description = run(folder)
    if plot is not None:
        from linearize.reporting.plot import draw

        draw(description, Path(plot))
    if outliers:
        from linearize.evaluation.outliers import outliers as look

        description["outliers"] = look(folder)
    return description


def check(files: Name | Sequence[Name]) -> None:
    """Check recipe files, or every file of converted folders by its hash.

    Args:
        files: one recipe file or model folder, or several.

    Raises:
        InputError: one line per problem.

    Example:
        >>> linearize.check(["recipes/smollm2-135m.yaml", "runs/demo/0-converted"])
    """
    from linearize import pipeline
    from linearize.checkpoint.manifest import verify
    from linearize.recipe import load as recipes

    problems = []
    for file in [files] if isinstance(files, str | Path) else files:
        try:
            if os.path.isdir(file):
                problems += [f"{file}/{problem}; write the folder again" for problem in verify(file)]
            else:
                problems += [f"{file}: {problem}" for problem in pipeline.problems(recipes.load(file))]
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
