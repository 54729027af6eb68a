"""Compare a linearized model with its source and with the controls that would embarrass it, under the same settings."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from linearize import results as results_file
from linearize import sources
from linearize.errors import InputError
from linearize.evaluate import suite as suites
from linearize.evaluate.progress import Bar, quiet, stopwatch
from linearize.evaluate.statistics import summarize
from linearize.results import COLUMNS, SCHEMA

PROBE = 256  # tokens of the forward pass that looks for numbers that are none, where the suite has no text of its own


def evaluate(
    folder: str | Path,
    suite: Any = "smoke",
    source: str | None = None,
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
    """
    chosen = suites.load(suite)
    if columns is not None:
        suites.check_columns(columns, "columns")
    if limit is not None and limit < 1:
        raise InputError(f"limit: found {limit}; expected at least 1 item per task, or none for all items")
    from linearize.evaluate.columns import Models, fingerprint, read_config, weight_files, window_of

    with quiet(), Bar(progress) as bar:
        config = read_config(folder)
        names = _columns(columns or chosen.columns, config, explicit=columns is not None, bar=bar)
        located = sources.locate(source) if source else sources.relocate(config.linearize["source"])
        models = Models(folder, config, located, dtype, device, seed)
        window = window_of(config)
        bar.start("reading weights", total=sum(path.stat().st_size for path in weight_files(folder)))
        settings = {
            "suite": asdict(chosen),
            "limit": limit or chosen.limit,
            "seed": seed,
            "batch_size": batch_size,
            "dtype": str(models.dtype).removeprefix("torch."),
            "device": models.device.type,
            "window": window[0] if window else None,
            "sinks": window[1] if window else None,
            "weights": fingerprint(folder, bar.advance),
            # Without its path, which would only say where this machine keeps it.
            "source": {key: value for key, value in located.to_dict().items() if key != "path"},
        }
        target = Path(out) if out is not None else Path(folder) / "results.json" if Path(folder).is_dir() else None
        run = _Run(target, settings, resume)
        bar.start("reading tasks")
        work = _Work(chosen, models, settings, include_path, bar)
        run.results |= {
            "model": str(folder),
            "source": located.id,
            "suite": chosen.name,
            "environment": work.environment(),
        }
        for name in names:
            work.column(name, run)
        return run.finish(names)


def _columns(names: list[str], config: Any, explicit: bool, bar: Bar) -> list[str]:
    """Columns in the order that needs each set of weights once, without those that a model cannot have."""
    from linearize.evaluate.columns import without_branches

    names = [name for name in COLUMNS if name in names]
    reason = without_branches(config)
    if reason is None:
        return names
    dropped = [name for name in names if "/" in name]
    if dropped and explicit:
        raise InputError(f"columns: {', '.join(dropped)}: {reason}; leave them out")
    if dropped:
        bar.line(f"without {', '.join(dropped)}: {reason}")
    return [name for name in names if name not in dropped]


class _Run:
    """The results so far, on disk after every finished task."""

    def __init__(self, target: Path | None, settings: dict[str, Any], resume: bool):
        self.target, self.results = target, {"schema": SCHEMA, "complete": False, "settings": settings, "columns": {}}
        if target is None:
            return
        self.partial = target.with_name(f".{target.name}.partial")
        found = next((path for path in (self.partial, target) if path.is_file()), None)
        if resume and found:
            earlier = results_file.read(found)
            differing = [key for key in settings if earlier.get("settings", {}).get(key) != settings[key]]
            if differing:
                raise InputError(
                    f"{found}: was made with other settings ({', '.join(differing)}), so its numbers cannot be taken "
                    "over; leave out --resume, or choose another --out"
                )
            self.results["columns"] = earlier["columns"]

    def column(self, name: str) -> dict[str, Any]:
        return self.results["columns"].setdefault(name, {"tasks": {}, "seconds": 0.0})

    def save(self) -> None:
        if self.target is not None:
            results_file.write(self.results, self.partial)

    def finish(self, names: list[str]) -> dict[str, Any]:
        columns = {name: self.results["columns"][name] for name in COLUMNS if name in self.results["columns"]}
        settings = self.results["settings"]
        head = {key: self.results[key] for key in ("schema", "model", "source", "suite", "settings")}
        self.results = {
            **head,
            "complete": set(names) <= set(columns),
            "columns": columns,
            "summary": summarize(columns, settings["window"], settings["seed"]),
            "environment": self.results["environment"],
        }
        results_file.validate(self.results)
        if self.target is not None:
            results_file.write(self.results, self.target)
            self.partial.unlink(missing_ok=True)
        return self.results


class _Work:
    """Tasks and texts, loaded once, and how a column runs them."""

    def __init__(self, chosen: suites.Suite, models: Any, settings: dict[str, Any], include_path: Any, bar: Bar):
        from linearize.evaluate import compare, perplexity

        self.models, self.settings, self.bar = models, settings, bar
        self.compare, self.perplexity = compare, perplexity
        self.tasks = compare.load(chosen.tasks, include_path, model=models.folder, seed=settings["seed"])
        read = {spec.text: suites.read_text(spec.text) for spec in chosen.perplexity}
        self.texts = [
            (spec.text, perplexity.cut(read[spec.text][0], models.tokenizer, spec.length, spec.blocks))
            for spec in chosen.perplexity
        ]
        self.data = {name: digest for name, (_, digest) in read.items()}
        longest = max((spec.length for spec in chosen.perplexity), default=0)
        context = getattr(models.config, "max_position_embeddings", None) or longest
        if longest > context:
            raise InputError(
                f"perplexity: blocks of {longest} tokens do not fit the model's context of {context}; use shorter "
                "blocks"
            )
        self.probe = None
        if not self.texts:
            self.probe = perplexity.cut(
                suites.read_text("wikitext2_valid")[0], models.tokenizer, min(PROBE, context), 1
            )

    def environment(self) -> dict[str, Any]:
        from linearize.evaluate.environment import embedded_sha256, environment

        items = [entry.embedded for entry in self.tasks if entry.embedded]
        return environment(self.models.device, self.settings["seed"], {**self.data, **embedded_sha256(items)})

    def column(self, name: str, run: _Run) -> None:
        """Run what is missing of a column."""
        column = run.column(name)
        tasks = [entry for entry in self.tasks if entry.name not in column["tasks"]]
        texts = self.texts if "perplexity" not in column else []
        if not tasks and not texts:
            self.bar.line(f"{name}: kept from the earlier run")
            return
        self.bar.start(f"{name}: loading")
        with stopwatch() as loading, self.models.column(name) as model:
            if texts:
                self.bar.start(f"{name}: perplexity", total=sum(len(ids) for _, ids in texts))
                with stopwatch() as seconds:
                    column["perplexity"] = self.perplexity.measure(
                        model, texts, self.settings["window"], self.bar.advance
                    )
                column["seconds"] += seconds[0]
                run.save()
            elif self.probe is not None:
                self.perplexity.losses(model, self.probe)
            scorer = (
                self.compare.Scorer(model, self.models.tokenizer, self.settings["batch_size"], self.bar)
                if tasks
                else None
            )
            for entry in tasks:
                self.bar.start(f"{name}: {entry.label}")
                with stopwatch() as seconds:
                    column["tasks"][entry.name] = self.compare.run(
                        scorer, entry, self.settings["limit"], self.settings["seed"]
                    )
                column["seconds"] += seconds[0]
                run.save()
        self.bar.line(f"{name}: {loading[0]:.0f} s")
