"""The results of a run so far: on disk after every finished task, taken over by a later run, summed up at the end."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.evaluation.processes import Processes
from linearize.results import file as results_file
from linearize.results.schema import COLUMNS, SCHEMA
from linearize.results.summary import summarize


class Saved:
    """Results in a hidden file beside the target, one for each process.

    Args:
        target: the file to come; None keeps nothing.
        settings: see `linearize.results.schema`.
        other: model and weights of the column `other`; empty without one.
        resume: take over what an earlier run left, in however many processes.
        processes: of this run.

    Raises:
        InputError: the earlier run had other settings, or its column `other` is of another model.
    """

    def __init__(
        self, target: Path | None, settings: dict[str, Any], other: dict[str, Any], resume: bool, processes: Processes
    ):
        self.results = {"schema": SCHEMA, "complete": False, "settings": settings, "columns": {}}
        self.target, self.other, self.processes = target, other, processes
        self.partial = None
        if target is not None:
            number = "" if processes.is_main else f".{processes.rank}"
            self.partial = target.with_name(f".{target.name}{number}.partial")
        finished = [target] if target is not None and target.is_file() else []
        for file in (self._partials() or finished) if resume else []:
            earlier = results_file.read(file)
            before = earlier.get("settings", {})
            known = before.get("source") or {}  # earlier versions did not say of which weights
            now = settings | {"source": {key: value for key, value in settings["source"].items() if key in known}}
            now["tokenizer"] = settings.get("tokenizer") if "tokenizer" in before else None
            differing = [key for key in settings if before.get(key) != now[key]]
            if differing:
                raise InputError(
                    f"{file}: was made with other settings ({', '.join(differing)}), so its numbers cannot be taken "
                    "over; leave out --resume (`linearize run`: pass --overwrite), or choose another --out"
                )
            measured = earlier["columns"].get("other")
            if measured and other and measured.get("weights") != other["weights"]:
                raise InputError(
                    f"{file}: its column other was measured on another model, {measured.get('model')}; leave out "
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
        """The entry of a column, made where there is none yet."""
        facts = self.other if name == "other" else {}
        return self.results["columns"].setdefault(name, {**facts, "tasks": {}, "seconds": 0.0})

    def save(self) -> None:
        """Write what is finished."""
        if self.partial is not None:
            results_file.write(self.results, self.partial)

    def finish(self, complete: Callable[[str, dict[str, Any]], bool]) -> dict[str, Any]:
        """Summarise the complete columns and let the file appear. Half a column of an earlier run is dropped.

        Args:
            complete: whether a column, by name and entry, has all that it should.
        """
        measured, settings = self.results["columns"], self.results["settings"]
        columns = {name: measured[name] for name in COLUMNS if name in measured and complete(name, measured[name])}
        told = ("schema", "model", "source", "layers", "pruning", "suite", "settings")
        self.results = {
            **{key: self.results[key] for key in told if key in self.results},
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
