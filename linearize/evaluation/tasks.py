"""Tasks of lm-eval on a model that is already in memory. The only file that imports lm_eval."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from math import isclose, isfinite
from numbers import Real
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.api.model import CacheHook
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from linearize.errors import InputError, suggest
from linearize.evaluation import rotation
from linearize.evaluation.suite import TaskSpec, names
from linearize.progress import Bar
from linearize.recipe.resources import package_folder

# Only perplexity-like metrics have no closed form for their standard error; lm-eval resamples those in plain Python.
BOOTSTRAP = 200
RULER = ("wonderwords", "nltk", "scipy")
"""Packages of lm-eval's extra `ruler`."""


@dataclass(frozen=True)
class Loaded:
    """A task or group that lm-eval can run, how it is shown, and whether it is asked in all rotations too."""

    name: str
    label: str
    metric: str | None
    item: Task | Group
    rotate: bool = False

    @property
    def tasks(self) -> dict[str, Task]:
        """The task, or all of the group, by name."""
        tasks = self.item.get_all_tasks() if isinstance(self.item, Group) else [self.item]
        return {task.task_name: task for task in tasks}

    @property
    def embedded(self) -> str | None:
        """Name of the embedded item file, if it reads one."""
        arguments = self.item.get_config("dataset_kwargs") if isinstance(self.item, Task) else None
        return (arguments or {}).get("items")


def load(specs: list[TaskSpec], include_path: str | Path | None = None, model: str = "", seed: int = 0) -> list[Loaded]:
    """Find tasks by name and load their items.

    lm-eval's own index, whose 14,000 tasks take a quarter of a minute to read, is opened only for names that neither
    eval/tasks nor `include_path` has.

    Args:
        specs: what to load; a tag stands for each of its tasks.
        include_path: a folder with task files of the user's own.
        model: folder of the model; tasks that generate their items by length take its tokenizer.
        seed: of the choice of few-shot examples, and of tasks that generate their items.

    Returns:
        The tasks and groups, in order.

    Raises:
        InputError: an unknown task (with the nearest names) or metric, or items that cannot be loaded or rotated.
    """
    if not specs:
        return []
    manager = _known(specs, include_path, model, seed)
    loaded = [entry for spec in specs for entry in _load(manager, spec, seed)]
    twice = {entry.name for entry in loaded if sum(other.name == entry.name for other in loaded) > 1}
    if twice:
        raise InputError(f"tasks: {', '.join(sorted(twice))} would run twice; name each task once")
    return loaded


def check(specs: list[TaskSpec]) -> None:
    """Refuse names that lm-eval does not have, without loading items.

    Raises:
        InputError: names the nearest ones.
    """
    if specs:
        _known(specs, None, "", 0)


def _known(specs: list[TaskSpec], include_path: str | Path | None, model: str, seed: int) -> TaskManager:
    """The index of tasks, which has all of these; arguments as of `load`."""
    folders: list[str | Path] = [package_folder("eval") / "tasks"]
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise InputError(f"{include_path}: no such folder; --include-path names a folder of lm-eval task files")
        folders.append(include_path)
    metadata: dict[str, Any] = {"pretrained": model, "tokenizer": model, "seed": seed}
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if any(spec.task not in manager.task_index for spec in specs):
        manager = TaskManager(include_path=folders, metadata=metadata)
    unknown = [spec.task for spec in specs if spec.task not in manager.task_index]
    if unknown:
        near = [
            f"{name!r} (nearest: {', '.join(get_close_matches(name, manager.all_tasks, 5, 0.5)) or 'none'})"
            for name in unknown
        ]
        raise InputError(
            f"tasks: lm-eval has no {'; no '.join(near)}; `lm_eval ls tasks` lists its {len(manager.all_tasks)} names, "
            f"and --include-path adds a folder of your own. Suites: {', '.join(names())}"
        )
    return manager


def _load(manager: TaskManager, spec: TaskSpec, seed: int) -> list[Loaded]:
    _seed(seed)  # of items that are drawn while they are loaded, as RULER's are
    try:
        with mock.patch.object(AutoTokenizer, "from_pretrained", _without_code(AutoTokenizer.from_pretrained)):
            named = manager.load([spec.task])
    except InputError:
        raise
    except ImportError as error:
        wanted = _package(error)
        named = "'lm_eval[ruler]'" if wanted in RULER else wanted
        raise InputError(
            f"tasks: {spec.task!r} needs the package {wanted}, which is not installed; run `pip install {named}`"
        ) from error
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"tasks: the items of {spec.task!r} could not be loaded ({reason}); check the network and HF_HUB_OFFLINE, "
            "or give a folder of task files that read local data by --include-path"
        ) from error
    for task in named["tasks"].values():
        if spec.fewshot is not None:
            task.set_config("num_fewshot", spec.fewshot)
        task.set_fewshot_seed(seed)
        metrics: dict[str, Any] = task.aggregation() or {}
        if spec.metric is not None and spec.metric not in metrics:
            raise InputError(f"tasks: {task.task_name} has no metric {spec.metric!r}. {suggest(spec.metric, metrics)}")
        if spec.rotate and spec.metric not in (None, "acc", "acc_norm"):
            raise InputError(
                f"tasks: {task.task_name}: cannot be rotated: {spec.metric!r} is no share of items right; use acc"
            )
        if spec.rotate:
            rotation.check(task.task_name, task)
    groups = named.get("groups", {})
    whole = spec.task in groups and groups[spec.task].has_aggregation
    items = {spec.task: groups[spec.task]} if whole else named["tasks"]
    return [
        Loaded(name, spec.label if spec.label and len(items) == 1 else name, spec.metric, item, spec.rotate)
        for name, item in items.items()
    ]


def _without_code(opening: Callable[..., Any]) -> Callable[..., Any]:
    """How a tokenizer is opened, for tasks that would run code that a folder brings along: RULER's."""
    return lambda *arguments, **options: opening(*arguments, **{**options, "trust_remote_code": False})


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _package(error: BaseException) -> str:
    """The package whose absence an error is about, which lm-eval may have wrapped in one of its own."""
    while getattr(error, "name", None) is None and error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "name", None) or str(error)


_HFLM: Any = HFLM  # its registration hides the signature


def _counted(name: str) -> Any:
    """A method of lm-eval's model that first tells the bar how many requests it answers."""

    def method(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        self.bar.expect(len(requests))
        try:
            return getattr(super(Scorer, self), name)(requests, disable_tqdm)
        except AssertionError as error:  # lm-eval's way to say that an answer alone is longer than the context
            raise InputError(
                f"tasks: an item of {requests[0].task_name} does not fit the model's context of {self.max_length} "
                "tokens; take a suite without it: --suite with tasks of your choice"
            ) from error

    return method


class Scorer(_HFLM):
    """lm-eval's own Hugging Face model around one in memory, with our progress bar in place of its own.

    Raises:
        InputError: from the request whose log-likelihood is not a number.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, bar: Bar):
        # An explicit backend: otherwise lm-eval looks the model type up and warns that it does not know it.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self.bar = bar
        self.set_cache_hook(_EachRequest(bar))

    loglikelihood, loglikelihood_rolling, generate_until = map(
        _counted, ("loglikelihood", "loglikelihood_rolling", "generate_until")
    )


class _EachRequest(CacheHook):
    """lm-eval hands every finished answer to a cache; this one keeps nothing and checks them."""

    def __init__(self, bar: Bar):
        super().__init__(None)
        self.bar = bar

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        value = res[0] if attr == "loglikelihood" else res
        if isinstance(value, float) and not isfinite(value):
            raise InputError(
                f"tasks: the log-likelihood of {str(req[-1])[:40]!r} is {value}; the model's weights are damaged or "
                "its dtype is too narrow: check them with `linearize inspect`, or evaluate in float32 (--dtype float32)"
            )
        self.bar.advance()


def run(scorer: Scorer, loaded: Loaded, limit: int | None, seed: int) -> dict[str, Any]:
    """Score one task or group.

    Args:
        scorer: the model.
        loaded: see `load`.
        limit: items per task; None means all.
        seed: of Python, numpy and torch, as `lm_eval --seed` sets them.

    Returns:
        The score, as in `linearize.results.schema`.
    """
    _seed(seed)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(seed)  # an earlier column has drawn examples from the same generator
    groups = {}
    if isinstance(loaded.item, Group):
        groups = {group.name: group for group in [loaded.item, *loaded.item.get_all_groups()]}
    output = _evaluate(scorer, loaded.tasks, groups, limit)
    score = _score(output, loaded)
    if loaded.rotate:
        scorer.bar.start(f"{loaded.label}: rotations")
        score["rotation"] = _rotation(scorer, loaded, output["samples"], score["metric"], seed)
    return score


def _evaluate(scorer: Scorer, tasks: dict[str, Task], groups: dict[str, Group], limit: int | None) -> dict[str, Any]:
    wanted: Any = {"tasks": tasks, "groups": groups}
    return cast(Any, evaluator.evaluate(lm=scorer, task_dict=wanted, limit=limit, bootstrap_iters=BOOTSTRAP))


def _rotation(scorer: Scorer, loaded: Loaded, asked: dict[str, Any], metric: str, seed: int) -> dict[str, Any]:
    """Score the items that were asked in their other rotations; `asked` are the samples of rotation 0 by task."""
    right, chosen = [], []
    for name, task in loaded.tasks.items():
        first = [(sample, others) for sample in asked[name] if (others := rotation.rotations(task, sample["doc"]))]
        task.set_fewshot_seed(seed)
        rotated = rotation.with_items(task, [doc for _, docs in first for doc in docs])
        others = iter(_evaluate(scorer, {name: rotated}, {}, None)["samples"][name])
        for sample, docs in first:
            samples = [sample, *(next(others) for _ in docs)]
            right.append([float(each[metric]) for each in samples])
            chosen += [_chosen(task, metric, each) for each in samples]
    return rotation.summarize(right, chosen)


def _score(output: dict[str, Any], loaded: Loaded) -> dict[str, Any]:
    results = output["results"][loaded.name]
    metrics = [key for key in results if "," in key and "_stderr" not in key and isinstance(results[key], Real)]
    key = next(key for key in metrics if loaded.metric in (None, key.split(",")[0]))
    metric, selected = key.split(",")
    samples = [sample for name in loaded.tasks for sample in output["samples"][name] if sample["filter"] == selected]
    samples = samples or [sample for name in loaded.tasks for sample in output["samples"][name]]
    better = output["higher_is_better"][loaded.name].get(metric) is not False
    value, stderr = float(results[key]), results.get(f"{metric}_stderr,{selected}")
    items = [sample.get(metric) for sample in samples]
    # Scores that are no mean over items (perplexities, F1 over a corpus) cannot be compared item by item.
    mean = all(isinstance(item, Real) for item in items) and isclose(np.mean(items), value, rel_tol=1e-6, abs_tol=1e-9)
    return {
        "label": loaded.label,
        "metric": metric,
        "value": value,
        "stderr": float(stderr) if isinstance(stderr, Real) else None,
        "n": len(samples),
        "higher_is_better": better,
        "chance": _chance(loaded, metric, samples) if better else None,
        "prompts": _digest(samples),
        "choices": _choices(loaded, metric, samples),
        "items": [float(item) for item in items] if mean else None,
    }


def _chance(loaded: Loaded, metric: str, samples: list[dict[str, Any]]) -> float | None:
    """Score of guessing: 1 / choices, 0 where the answer is free text, None where it has no meaning."""
    kinds = {task.OUTPUT_TYPE for task in loaded.tasks.values()}
    if kinds != {"multiple_choice"}:
        return None if "loglikelihood_rolling" in kinds else 0.0
    return float(np.mean([1 / len(sample["arguments"]) for sample in samples])) if metric.startswith("acc") else None


def _choices(loaded: Loaded, metric: str, samples: list[dict[str, Any]]) -> dict[str, list[int]] | None:
    """How often each position is chosen, as the metric chooses, and how often it is right.

    None where nothing is chosen, or where an item has no choice or several that are right.
    """
    tasks: list[Any] = list(loaded.tasks.values())
    kinds = {task.OUTPUT_TYPE for task in tasks}
    if kinds != {"multiple_choice"} or metric not in ("acc", "acc_norm") or any(task.multiple_target for task in tasks):
        return None
    task, chosen, gold = tasks[0], Counter(), Counter()
    for sample in samples:
        chosen[_chosen(task, metric, sample)] += 1
        position = rotation.gold(task, sample["doc"], sample["target"])
        if position is None:
            return None  # lm-eval itself counts such an item as wrong
        gold[position] += 1
    positions = range(max(*chosen, *gold) + 1)
    return {"chosen": [chosen[i] for i in positions], "gold": [gold[i] for i in positions]}


def _chosen(task: Any, metric: str, sample: dict[str, Any]) -> int:
    """Position that `metric`, acc or acc_norm, takes."""
    choices = task.doc_to_choice(sample["doc"])
    # lm-eval divides by the length of a choice without the blank that joins it to the prompt.
    sizes = [len(choice) if metric == "acc_norm" else 1 for choice in choices]
    answers = sample["filtered_resps"][: len(choices)]
    return int(np.argmax([float(answer[0]) / size for answer, size in zip(answers, sizes, strict=True)]))


def _digest(samples: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for arguments in sample["arguments"]:
            digest.update(repr([part for part in arguments if isinstance(part, str)]).encode())
    return digest.hexdigest()
