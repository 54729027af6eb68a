"""The run behind `evaluate`: columns one after the other, or shared by processes; every finished task on disk."""

import contextlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from linearize.checkpoint import sources
from linearize.checkpoint.atomic import held
from linearize.checkpoint.describe import mixers_of
from linearize.checkpoint.identity import check_source, files, identity
from linearize.checkpoint.manifest import facts_of
from linearize.checkpoint.open import bases
from linearize.errors import InputError
from linearize.evaluation import speed
from linearize.evaluation.columns import Models, read_config, window_of, without_branches
from linearize.evaluation.environment import environment
from linearize.evaluation.processes import Processes
from linearize.evaluation.quiet import quiet
from linearize.evaluation.saved import Saved
from linearize.evaluation.work import Options, Work, check, fitted
from linearize.model.sizes import text_sizes
from linearize.progress import Bar
from linearize.results.file import check_target
from linearize.results.schema import COLUMNS, Pruning


def run(options: Options) -> dict[str, Any]:
    """Measure all columns and write the results.

    Args:
        options: what was asked for.

    Returns:
        The content of results.json, the same in every process.

    Raises:
        InputError: see the messages; what was finished until then is kept.
    """
    if options.target is not None:
        check_target(options.target)
    processes = Processes()
    alone = held(options.target) if options.target and processes.is_main else contextlib.nullcontext()
    with alone, processes.joined(), quiet(), Bar(options.progress and processes.is_main) as bar:
        with processes.agreed():
            config = read_config(options.folder)
            names = _possible(options, config, bar)
            context = text_sizes(config).context
            if options.shorten:
                suite, lines = fitted(options.suite, context)
                options = replace(options, suite=suite)
                for line in lines:
                    bar.line(line)
            check(options.suite, context)
            source = options.source
            located = sources.locate(source) if source else sources.relocate(config.linearize["source"])
            device = options.device or processes.device
            models = Models(
                options.folder, config, located, options.dtype, device, options.seed, options.against, options.quantize
            )
            bar.start("reading tasks")
            work = Work(options, models, bar)
            if not source and not located.revision and (work.behaviour or {"source", "window", "converted"} & {*names}):
                bar.start("reading the source")
                check_source(located.path, [Path(options.folder), *bases(Path(options.folder))])
            saved = _saved(options, models, work, processes, bar)
        with processes.agreed():  # nobody writes before all have read what an earlier run left
            saved.clear(options.resume)
        columns = saved.results["columns"]
        mine = processes.share(names, [name for name in names if name in columns and work.complete(columns[name])])
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
        spec = options.suite.speed
        if spec is not None:
            speed.section(spec, models, {name: saved.column(name) for name in names}, bar, saved.save)
        done = saved.finish(lambda name, column: work.complete(column) and speed.complete(spec, name, column))
        return processes.gather(done)[0]


def _saved(options: Options, models: Models, work: Work, processes: Processes, bar: Bar) -> Saved:
    """The results so far: what is known before the first column runs, and what an earlier run left."""
    folders = [options.folder, *([options.against] if options.against else [])]
    paths = [path for each in folders for some in files(each).values() for path in some]
    bar.start("reading weights", total=sum(path.stat().st_size for path in paths))
    known = {folder: identity(folder, bar.advance) for folder in folders}
    weights = {folder: each["weights"] or folder for folder, each in known.items()}
    window, sinks = window_of(models.config) or (None, None)
    settings = {
        "suite": asdict(options.suite),
        "limit": options.limit,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "dtype": str(models.dtype).removeprefix("torch."),
        "quantize": models.quantize,
        "device": models.device.type,
        "window": window,
        "sinks": sinks,
        "weights": weights[options.folder],
        "tokenizer": known[options.folder]["tokenizer"],
        "source": _source(models.located, [*(Path(each) for each in folders if Path(each).is_dir())]),
    }
    other = {"model": options.against, "weights": weights[options.against]} if options.against else {}
    saved = Saved(options.target, settings, other, options.resume, processes)
    saved.results |= {
        "model": options.folder,
        "source": models.located.id,
        "layers": mixers_of(models.config),
        "suite": options.suite.name,
        "environment": environment(models.device, options.seed, work.data),
    }
    if pruning := facts_of(Path(options.folder)).get("pruning"):
        saved.results["pruning"] = {key: pruning[key] for key in Pruning.__annotations__}
    return saved


def _source(located: sources.Located, folders: list[Path]) -> dict[str, Any]:
    """The source in the settings, without its path, which would only say where this machine keeps it.

    Args:
        located: the source.
        folders: what is compared with it.

    Returns:
        JSON-safe; with hashes of it, and of models that adapters belong to, where they are local files.
    """
    facts = {key: value for key, value in located.to_dict().items() if key != "path"}
    local = [] if located.revision else [located.path / (located.gguf or "")]
    bases_of = [base for folder in folders for base in bases(folder)]
    known = [identity(each) for each in (*local, *bases_of)]
    return facts | {
        kind: [each[kind] for each in known if each[kind]] for kind in ("weights", "other_weights", "tokenizer")
    }


def _possible(options: Options, config: Any, bar: Bar) -> list[str]:
    """Columns in the order that needs each set of weights once, without those that a model cannot have."""
    explicit, against = options.columns is not None, options.against
    names = options.columns or options.suite.columns
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
