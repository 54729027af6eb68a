"""Compare a linearized model with its source and with the controls that would embarrass it, under the same settings."""

from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.evaluate import suite as suites


def evaluate(
    folder: str | Path,
    suite: str | Path | list[str] | suites.Suite = "smoke",
    source: str | None = None,
    against: str | Path | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    columns: list[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "auto",
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
        columns: which of `linearize.results.COLUMNS`, in place of the suite's.
        batch_size: rows per forward pass of lm-eval.
        seed: of few-shot examples, sampling, bootstrap and untrained weights.
        dtype: of the weights of both families; `auto` is the student's.
        device: None for the GPU if there is one.
        include_path: folder with lm-eval task files of your own.
        resume: take over what an interrupted run, or a complete one with fewer columns, left at `out`.
        progress: show on stderr what is running.

    Returns:
        The content of results.json, see `linearize.results`.

    Raises:
        InputError: see the messages; what was finished until then is kept.

    Example:
        >>> evaluate("runs/demo/merged", suite="smoke")["summary"]["memory"]["loss"]
    """
    chosen = suites.load(suite)
    suites.check_columns(columns or [], "columns")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}: found {value}; expected at least 1")

    from linearize.evaluate.run import run  # imports torch, transformers and lm-eval

    target = Path(out) if out is not None else Path(folder) / "results.json" if Path(folder).is_dir() else None
    return run(
        str(folder),
        chosen,
        source=source,
        against=str(against) if against is not None else None,
        target=target,
        limit=limit or chosen.limit,
        columns=columns,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
        include_path=include_path,
        resume=resume,
        progress=progress,
    )
