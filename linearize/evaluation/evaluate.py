"""Compare a linearized model with its source and with the controls that would embarrass it, under the same settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.evaluation import suite as suites
from linearize.evaluation.run import run
from linearize.evaluation.work import Options


def evaluate(
    folder: str | Path,
    suite: str | Path | list[str] | suites.Suite = "smoke",
    source: str | None = None,
    against: str | Path | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    columns: str | Sequence[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str | None = None,
    include_path: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Run a suite on a model, its source and the controls, with the same prompts, seeds and settings.

    Every finished task is kept beside `out` until the run is complete; `out` appears, complete, at the end.

    Args:
        folder: linearized folder, adapter folder, or Hub id.
        suite: name of a suite, a suite file, or lm-eval task names (a list, or separated by commas).
        source: the model that was converted; None finds it through the folder's configuration.
        against: another student of the same source, for the column `other`: folder or Hub id.
        out: results file; None writes `results.json` into a local `folder`.
        limit: items per task, in place of the suite's.
        columns: which of `linearize.results.schema.COLUMNS`, a list or separated by commas, in place of the suite's.
        batch_size: rows per forward pass of lm-eval.
        seed: of few-shot examples, sampling, bootstrap and untrained weights.
        dtype: of the weights of all models: float32, bfloat16, float16, or `auto`, the student's.
        quantize: hold the weights of all models, source included, as int8, int4 or nf4; None: as they are.
        device: as in torch; None for the accelerator if there is one.
        include_path: folder with lm-eval task files of your own.
        resume: take over what an interrupted run, or a complete one with fewer columns, left at `out`.
        progress: show on stderr what is running.

    Returns:
        The content of results.json, see `linearize.results.schema`.

    Raises:
        InputError: a wrong argument, suite or task, a folder or source that cannot be opened, one that does not belong
            to the student, or a model whose numbers are broken; what was finished until then is kept.

    Example:
        >>> linearize.evaluate("runs/demo/merged", suite="smoke")["summary"]["memory"]["loss"]
    """
    chosen = suites.load(suite)
    names = columns.split(",") if isinstance(columns, str) else list(columns) if columns else None
    suites.check_columns(names or [], "columns")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}: found {value}; expected at least 1")

    target = Path(out) if out is not None else Path(folder) / "results.json" if Path(folder).is_dir() else None
    given: dict[str, Any] = {"source": source, "batch_size": batch_size, "seed": seed, "dtype": dtype, "device": device}
    given |= {"quantize": quantize, "shorten": isinstance(suite, str) and suite in suites.names()}
    given |= {"include_path": include_path, "resume": resume, "progress": progress, "limit": limit or chosen.limit}
    return run(Options(str(folder), chosen, target, against=str(against) if against else None, columns=names, **given))


def bench(
    folder: str | Path,
    contexts: Sequence[int] = (1024, 8192, 32768),
    batches: Sequence[int] = (1,),
    steps: int = 12,
    source: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure speed and memory of a model, its source and the window control by context length.

    Args:
        folder: linearized folder, adapter folder, or Hub id.
        contexts: tokens in the cache.
        batches: rows decoded together.
        steps: decoded tokens per context and batch, at least 3.
        source: the model that was converted; None finds it through the folder's configuration.
        out: results file; None writes none.
        seed: of the random prompts.
        dtype: of the weights of all models: float32, bfloat16, float16, or `auto`, the student's.
        quantize: hold the weights of all models as int8, int4 or nf4; None: as they are.
        device: as in torch; None for the accelerator if there is one.
        progress: show on stderr what is running.

    Returns:
        Results, see `linearize.results.schema`; their columns hold `speed`, in seconds and bytes.

    Raises:
        InputError: a number that is too small, or a folder, source or device that cannot be used; what was measured
            until then is kept beside `out`.

    Example:
        >>> linearize.bench("runs/demo/merged", contexts=[1024])["columns"]["student"]["speed"][0]["token_seconds"]
    """
    for name, values, least in (("contexts", contexts, 1), ("batches", batches, 1), ("steps", [steps], 3)):
        if not values or min(values) < least:
            raise InputError(f"{name}: found {', '.join(map(str, values)) or 'none'}; expected at least {least}")
    spec = suites.SpeedSpec(contexts=list(contexts), batches=list(batches), steps=steps)
    chosen = suites.Suite(name="bench", speed=spec, columns=["source", "window", "student"])
    target = Path(out) if out is not None else None
    given: dict[str, Any] = {"source": source, "seed": seed, "dtype": dtype, "device": device, "progress": progress}
    return run(Options(str(folder), chosen, target, quantize=quantize, **given))
