"""The run behind `evaluate`: columns one after the other, or shared by processes; every finished task on disk."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linearize.checkpoint import sources
from linearize.checkpoint.describe import mixers_of
from linearize.errors import InputError
from linearize.evaluation import perplexity, recall, speed, tasks
from linearize.evaluation import suite as suites
from linearize.evaluation.behaviour import Behaviour
from linearize.evaluation.clock import stopwatch
from linearize.evaluation.columns import Models, fingerprint, read_config, weight_files, window_of, without_branches
from linearize.evaluation.environment import embedded_sha256, environment
from linearize.evaluation.processes import Processes
from linearize.evaluation.quiet import quiet
from linearize.progress import Bar
from linearize.results import file as results_file
from linearize.results.schema import COLUMNS, SCHEMA
from linearize.results.summary import summarize

BLOCK = 512  # tokens of a block on which distributions are compared, where the suite has no text of its own
PROBE = 256  # tokens of the forward pass that looks for broken numbers, where the suite has no text of its own


def run(
    folder: str,
    chosen: suites.Suite,
    *,
    source: str | None,
    against: str | None,
    target: Path | None,
    limit: int | None,
    columns: list[str] | None,
    batch_size: int,
    seed: int,
    dtype: str,
    device: str | None,
    include_path: str | Path | None,
    resume: bool,
    progress: bool,
) -> dict[str, Any]:
    """See `linearize.evaluation.evaluate`."""
    processes = Processes()
    with processes.joined(), quiet(), Bar(progress and processes.is_main) as bar:
        with processes.agreed():
            config = read_config(folder)
            names = _possible(columns or chosen.columns, config, against, explicit=columns is not None, bar=bar)
            located = sources.locate(source) if source else sources.relocate(config.linearize["source"])
            models = Models(folder, config, located, dtype, device or processes.device, seed, against)
            folders = [folder, against] if against else [folder]
            size = sum(path.stat().st_size for each in folders for path in weight_files(each))
            bar.start("reading weights", total=size)
            window = window_of(config)
            settings = {
                "suite": asdict(chosen),
                "limit": limit,
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
            other = {"model": against, "weights": fingerprint(against, bar.advance)} if against else {}
            saved = _Saved(target, settings, other, resume, processes)
            bar.start("reading tasks")
            work = _Work(chosen, models, settings, include_path, bar)
            saved.results |= {
                "model": folder,
                "source": located.id,
                "layers": mixers_of(config),
                "suite": chosen.name,
                "environment": environment(models.device, seed, work.data),
            }
        with processes.agreed():  # nobody writes before all have read what an earlier run left
            saved.clear(resume)
        found = saved.results["columns"]
        mine = processes.share(names, [name for name in names if name in found and work.complete(found[name])])
        with contextlib.closing(work):
            work.refer(mine, saved)
            for name in mine:
                work.column(name, saved)
        for theirs in processes.gather({name: saved.column(name) for name in mine}):
            saved.take(theirs)
        for name in names:
            if name not in mine:
                bar.line(f"{name}: {saved.column(name)['seconds']:.0f} s")
        if not processes.is_main:
            models.close()
            return processes.gather(None)[0]
        if chosen.speed is not None:
            asked = {name: saved.column(name) for name in names}
            speed.section(chosen.speed, models, asked, bar, saved.save)
        done = saved.finish(lambda name, column: work.complete(column) and speed.complete(chosen.speed, name, column))
        return processes.gather(done)[0]


def _possible(names: list[str], config: Any, against: str | None, explicit: bool, bar: Bar) -> list[str]:
    """Columns in the order that needs each set of weights once, without those that a model cannot have."""
    if explicit and "other" in names and against is None:
        raise InputError("columns: other: there is no other student; name one by --against, or leave this column out")
    names = [name for name in COLUMNS if (against is not None if name == "other" else name in names)]
    reason = without_branches(config)
    dropped = [name for name in names if "/" in name] if reason else []
    if dropped and explicit:
        raise InputError(f"columns: {', '.join(dropped)}: {reason}; leave them out")
    if dropped:
        bar.line(f"without {', '.join(dropped)}: {reason}")
    return [name for name in names if name not in dropped]


class _Saved:
    """The results so far, in a hidden file beside the target after every finished task; one file for each process.

    Args:
        target: the file to come; None keeps nothing.
        settings: see `linearize.results.schema`.
        other: model and weights of the column `other`; empty without one.
        resume: take over what an earlier run left, in however many processes.
        processes: of this run.
    """

    def __init__(
        self,
        target: Path | None,
        settings: dict[str, Any],
        other: dict[str, Any],
        resume: bool,
        processes: Processes,
    ):
        self.results = {"schema": SCHEMA, "complete": False, "settings": settings, "columns": {}}
        self.target, self.other, self.processes = target, other, processes
        self.partial = None
        if target is not None:
            number = "" if processes.is_main else f".{processes.rank}"
            self.partial = target.with_name(f".{target.name}{number}.partial")
        finished = [target] if target is not None and target.is_file() else []
        for found in (self._partials() or finished) if resume else []:
            earlier = results_file.read(found)
            differing = [key for key in settings if earlier.get("settings", {}).get(key) != settings[key]]
            if differing:
                raise InputError(
                    f"{found}: was made with other settings ({', '.join(differing)}), so its numbers cannot be taken "
                    "over; leave out --resume, or choose another --out"
                )
            measured = earlier["columns"].get("other")
            if measured and other and measured.get("weights") != other["weights"]:
                raise InputError(
                    f"{found}: its column other was measured on another model, {measured.get('model')}; leave out "
                    "--resume, or choose another --out"
                )
            self.take(earlier["columns"])

    def _partials(self) -> list[Path]:
        """What an interrupted run left, or this one has: the file of each process."""
        if self.target is None or not self.target.parent.is_dir():
            return []
        names = re.compile(rf"\.{re.escape(self.target.name)}(\.\d+)?\.partial")
        return sorted(path for path in self.target.parent.iterdir() if names.fullmatch(path.name))

    def clear(self, resume: bool) -> None:
        """Remove what an earlier run left, if it is not taken over; a process alone will write over its own file."""
        if self.processes.is_main and not resume:
            for path in self._partials():
                if self.processes.count > 1 or path != self.partial:
                    path.unlink()

    def take(self, columns: dict[str, Any]) -> None:
        """Add the tasks and sections of columns that are not here yet."""
        for name, theirs in columns.items():
            own = self.results["columns"].setdefault(name, {**theirs})
            own["tasks"] = theirs["tasks"] | own["tasks"]
            own["seconds"] = max(own["seconds"], theirs["seconds"])
            own |= {key: value for key, value in theirs.items() if key not in own}

    def column(self, name: str) -> dict[str, Any]:
        facts = self.other if name == "other" else {}
        return self.results["columns"].setdefault(name, {**facts, "tasks": {}, "seconds": 0.0})

    def save(self) -> None:
        if self.partial is not None:
            results_file.write(self.results, self.partial)

    def finish(self, complete: Callable[[str, dict[str, Any]], bool]) -> dict[str, Any]:
        """Summarise the complete columns and let the file appear. Half a column of an earlier run is dropped."""
        found, settings = self.results["columns"], self.results["settings"]
        columns = {name: found[name] for name in COLUMNS if name in found and complete(name, found[name])}
        self.results = {
            **{key: self.results[key] for key in ("schema", "model", "source", "layers", "suite", "settings")},
            "complete": True,
            "columns": columns,
            "summary": summarize(columns, settings["window"], settings["seed"]),
            "environment": self.results["environment"],
        }
        if self.target is not None:
            results_file.write(self.results, self.target)
            for path in self._partials():
                path.unlink()
        return self.results


class _Work:
    """Tasks and texts, loaded once, and how a column runs them.

    Attributes:
        data: name -> sha256 of the texts and embedded items.
    """

    def __init__(
        self, chosen: suites.Suite, models: Models, settings: dict[str, Any], include_path: str | Path | None, bar: Bar
    ):
        self.models, self.settings, self.bar = models, settings, bar
        self.recall = chosen.recall
        if self.recall is not None:
            recall.check(self.recall)
        context = getattr(models.config, "max_position_embeddings", None)
        for spec in chosen.perplexity:
            if context is not None and spec.length > context:
                raise InputError(
                    f"perplexity: blocks of {spec.length} tokens do not fit the model's context of {context}; use "
                    "shorter blocks"
                )
        read = {spec.text: suites.read_text(spec.text) for spec in chosen.perplexity}
        if chosen.behaviour and not read:
            read[suites.DEFAULT_TEXT] = suites.read_text(suites.DEFAULT_TEXT)
        self.texts = [
            (spec.text, perplexity.cut(read[spec.text][0], models.tokenizer, spec.length, spec.blocks))
            for spec in chosen.perplexity
        ]
        self.probe = None
        if not self.texts:
            text, _ = suites.read_text(suites.DEFAULT_TEXT)
            self.probe = perplexity.cut(text[: 100 * PROBE], models.tokenizer, min(PROBE, context or PROBE), 1)
        self.behaviour, self.referring = None, {"seconds": 0.0}
        if chosen.behaviour:
            text = next(iter(read.values()))[0]
            length = min(BLOCK, context or BLOCK)
            self.behaviour = Behaviour(
                chosen.behaviour,
                self.texts[0][1]
                if self.texts
                else perplexity.cut(text, models.tokenizer, length, chosen.behaviour.kl_blocks),
                text,
                models.tokenizer,
                window=settings["window"],
                batch_size=settings["batch_size"],
                seed=settings["seed"],
                context=context,
            )
        self.tasks = tasks.load(chosen.tasks, include_path, model=models.folder, seed=settings["seed"])
        items = [entry.embedded for entry in self.tasks if entry.embedded]
        self.data = {**{name: digest for name, (_, digest) in read.items()}, **embedded_sha256(items)}

    def close(self) -> None:
        if self.behaviour:
            self.behaviour.close()

    def complete(self, column: dict[str, Any]) -> bool:
        sections = {"perplexity": self.texts, "recall": self.recall, "behaviour": self.behaviour}
        return not self._missing(column) and all(name in column for name, asked in sections.items() if asked)

    def _missing(self, column: dict[str, Any]) -> list[tasks.Loaded]:
        return [entry for entry in self.tasks if entry.name not in column["tasks"]]

    def refer(self, names: list[str], saved: _Saved) -> None:
        """See what the source does, if a column is still to be compared with it: first of all, because its weights then
        get other mixers."""
        done = saved.results["columns"]
        if self.behaviour and any("behaviour" not in done.get(name, {}) for name in names):
            self.bar.start("source: loading")
            with self.models.column("source") as model:
                self.bar.start("source: reference", total=self.behaviour.steps(refers=True))
                with stopwatch(self.referring):
                    self.behaviour.refer(model, self.bar.advance)

    def column(self, name: str, saved: _Saved) -> None:
        """Run what is missing of a column."""
        column = saved.column(name)
        if self.complete(column):
            if self.tasks or self.texts or self.recall or self.behaviour:
                self.bar.line(f"{name}: kept from the earlier run")
            return
        self.bar.start(f"{name}: loading")
        with self.models.column(name) as model:
            if self.probe is not None:
                perplexity.losses(model, self.probe)
            elif "perplexity" not in column:
                self.bar.start(f"{name}: perplexity", total=sum(len(ids) for _, ids in self.texts))
                with stopwatch(column):
                    column["perplexity"] = perplexity.measure(
                        model, self.texts, self.settings["window"], self.bar.advance
                    )
                saved.save()
            if self.recall is not None and "recall" not in column:
                self.bar.start(f"{name}: recall", total=recall.total(self.recall))
                with stopwatch(column):
                    column["recall"] = recall.measure(
                        model,
                        self.models.tokenizer,
                        self.recall,
                        self.settings["window"],
                        self.settings["seed"],
                        self.settings["batch_size"],
                        self.bar.advance,
                    )
                saved.save()
            if self.behaviour and "behaviour" not in column:
                is_source = name == "source"
                self.bar.start(f"{name}: behaviour", total=self.behaviour.steps(is_source=is_source))
                with stopwatch(column):
                    column["behaviour"] = self.behaviour.measure(model, is_source, self.bar.advance)
                if is_source:
                    column["seconds"] += self.referring["seconds"]
                saved.save()
            missing = self._missing(column)
            if missing:
                scorer = tasks.Scorer(model, self.models.tokenizer, self.settings["batch_size"], self.bar)
            for entry in missing:
                self.bar.start(f"{name}: {entry.label}")
                with stopwatch(column):
                    score = tasks.run(scorer, entry, self.settings["limit"], self.settings["seed"])
                column["tasks"][entry.name] = score
                saved.save()
        self.bar.line(f"{name}: {column['seconds']:.0f} s")
