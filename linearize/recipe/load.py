"""Recipes: all that decides how a model is converted, recovered and measured, read from YAML.

A recipe is a file; its stem is the name a user types. What the file leaves out takes the defaults in schema.py. Single
values are overridden with dotted keys (``convert.mixer.window=128``, ``train.distil.tokens=1000``). All problems
of a file are reported at once. Importing this module does not import torch; checking the mixer's own settings does.
"""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from linearize.errors import InputError, suggest
from linearize.formats import plain, quoted
from linearize.recipe.schema import (
    DEFAULT_MIXER,
    STAGES,
    Allocate,
    Calibrate,
    Convert,
    Data,
    Eval,
    Peft,
    Recipe,
    Select,
    Source,
    Stage,
    own_size,
)
from linearize.recipe.templates import find, names, shipped, source_of
from linearize.recipe.templates import plain as plain_recipe
from linearize.recipe.text import parse_yaml, read_yaml

SUFFIXES = (".yaml", ".yml")
NAME, CACHE = "convert.mixer.name", "convert.cache"
"""Keys that, overridden, also drop settings: what the new mixer does not know; the size that a budget decides."""
MIXER = ("convert", "mixer")
DEFAULTS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
}
"""Source of several shipped recipes -> the one that it gets unasked."""


def load(name_or_path: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """Read, complete and check a recipe.

    Args:
        name_or_path: name of a shipped recipe, or a YAML file.
        overrides: ``{"convert.mixer.window": 128}`` or ``["convert.mixer.window=128"]``.

    Returns:
        The resolved recipe.

    Raises:
        InputError: the file is missing or not YAML, or one line per problem in it.

    Example:
        >>> load("smollm2-135m", ["convert.mixer.window=128"]).convert.mixer["window"]
        128
    """
    path, where, changes = Path(name_or_path), str(name_or_path), {}
    name = path.stem
    if path.suffix not in SUFFIXES:
        name, (path, changes, _) = where, find(where)
        where = f"recipes/{path.name}"
    elif not os.path.exists(path):  # unlike Path.exists, False for a name that no file can have
        raise InputError(f"{where}: there is no such recipe file. Shipped recipes: {', '.join(names())}")
    values = {"name": name, **plain_recipe(read_yaml(path, where))}
    return from_dict(_override(values, changes)[0] if changes else values, overrides, where)


def default(source_id: str, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """The recipe for a model that was named without one.

    Args:
        source_id: a Hub id, a folder or a GGUF file.
        overrides: as in :func:`load`.

    Returns:
        The shipped recipe with exactly this source, where several have it the one in `DEFAULTS`; else the defaults.

    Raises:
        InputError: as :func:`load`.
    """
    for name in [DEFAULTS[source_id]] if source_id in DEFAULTS else names():
        if source_of(name) == source_id:
            return load(name, overrides)
    return from_dict({"source": {"id": source_id}}, overrides, where="defaults")


def resolve(model: str, overrides: Mapping[str, Any] | Iterable[str] = (), recipe: str | Path | None = None) -> Recipe:
    """The recipe for whatever a user names as a model.

    Args:
        model: a recipe, a recipe file, a Hub id, a folder or a GGUF file.
        overrides: as in :func:`load`.
        recipe: a recipe to use for this model instead of its own.

    Returns:
        The resolved recipe.

    Raises:
        InputError: as :func:`load`.
    """
    if recipe is not None:
        return replace(load(recipe, overrides), source=resolve(model).source)
    if Path(model).suffix in SUFFIXES or model in shipped():
        return load(model, overrides)
    return default(model, overrides)


def with_flags(
    model: str, recipe: str | Path | None, mixer: str | None, flags: Mapping[str, Any], overrides: Iterable[str]
) -> Recipe:
    """The recipe for what a command line says; a key that is given two values is refused.

    Args:
        model: as for `resolve`.
        recipe: as for `resolve`.
        mixer: name of another mixer than the recipe's.
        flags: dotted key -> value; None where it was not given.
        overrides: ``KEY=VALUE`` each.

    Raises:
        InputError: as `load`.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    layers = given.get("convert.layers")
    if layers is not None and not isinstance(layers, str):
        given["convert.layers"] = list(layers)  # as YAML has it
    named = {} if mixer is None else {NAME: mixer}
    own = without(overrides, given | named)
    changes = [*(f"{key}={value}" for key, value in named.items()), *own]
    if CACHE in given:  # beside a size that was asked for by name
        sizes = [pair for pair in map(_split, own) if pair[0].startswith("convert.mixer.")]
        given |= {key: parse_yaml(value, f"--set {key}") for key, value in sizes}
    return from_dict(to_dict(resolve(model, changes, recipe)), given, "command line")


def run_folder(recipe: Recipe) -> Path:
    """Where the stages of a recipe go when the user names no folder."""
    name = recipe.name or Path(recipe.source.id).stem
    return Path("runs") / (name if name not in ("", ".", "..") else Path(recipe.source.id).resolve().name or "model")


def with_stage(recipe: Recipe, name: str) -> Recipe:
    """Add a stage to a recipe.

    Args:
        recipe: the recipe.
        name: of one of `STAGES`.

    Returns:
        The same recipe, with that stage after its own ones where it has none of the name.
    """
    known = any(stage.name == name for stage in recipe.train)
    return recipe if known else replace(recipe, train=(*recipe.train, STAGES[name]))


def from_dict(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | Iterable[str] = (), where: str = "recipe"
) -> Recipe:
    """Build and check a recipe from plain values.

    Args:
        values: the content of a recipe file.
        overrides: as in :func:`load`.
        where: named at the start of every error.

    Returns:
        The resolved recipe.

    Raises:
        InputError: one line per problem.
    """
    values, given = _override(values, overrides)
    try:
        recipe = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        problems = [f"{_blamed(problem['loc'], given, where)}: {_explain(problem)}" for problem in _problems(error)]
        convert = values.get("convert")
        mixer = convert.get("mixer") if isinstance(convert, dict) else None
        if isinstance(mixer, dict):
            problems += [f"{_blamed(MIXER, given, where)}: {problem}" for problem in _mixer_problems(mixer)]
        raise InputError("\n".join(problems)) from error
    validate(recipe, _blamed(MIXER, given, where))
    return recipe


def _problems(error: ValidationError) -> list[Any]:
    return error.errors(include_url=False)


def _blamed(location: Sequence[int | str], given: Mapping[tuple[int | str, ...], str], where: str) -> str:
    """Where a problem comes from: the overrides that set it, a part of it or what it is a part of; else `where`."""
    location = tuple(location)
    those = [text for key, text in given.items() if location[: len(key)] == key or key[: len(location)] == location]
    return f"{', '.join(those)} (on {where})" if those else where


def validate(recipe: Recipe, where: str = "recipe") -> None:
    """Check what the types cannot: the settings of the mixer, by the mixer itself.

    Args:
        recipe: built.
        where: named at the start of every error.

    Raises:
        InputError: one line per problem.
    """
    problems = _mixer_problems(recipe.convert.mixer)
    if problems:
        raise InputError("\n".join(f"{where}: {problem}" for problem in problems))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values; ``from_dict(to_dict(recipe)) == recipe``."""
    return _plain(asdict(recipe))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as the text of a file that :func:`load` reads."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _mixer_problems(mixer: dict[str, Any]) -> list[str]:
    from linearize.model.mixers import build_config  # imports torch

    try:
        build_config(mixer)
    except InputError as error:
        return [f"convert.{error}"]
    return []


def _explain(problem: Any) -> str:
    """A problem that pydantic reports, as ``key: found; allowed``."""
    location = [str(part) for part in problem["loc"]]
    key, value = ".".join(location), problem["input"]
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("a dictionary or an instance of", "a mapping, see").replace("a valid tuple", "a list")
    match problem["type"]:
        case "unexpected_keyword_argument":
            return f"{key}: unknown key. {suggest(location[-1], _fields(location[:-1]))}"
        case "missing":
            return f"{key}: missing; it has no default"
        # A check of several keys, whose text says what was found.
        case "value_error" if isinstance(value, ArgsKwargs) or isinstance(value, dict) and location[-1:] != ["layers"]:
            return f"{key}: {message}" if key else message
    return f"{key}: found {quoted(value)}; {message[0].lower()}{message[1:]}"


def _fields(location: list[str]) -> list[str]:
    """The keys that are allowed at a location in the recipe."""
    kinds: dict[str, Any] = {"source": Source, "convert": Convert, "data": Data, "calibrate": Calibrate}
    kinds |= {"allocate": Allocate, "select": Select, "train": Stage, "eval": Eval, "peft": Peft}
    parts = [part for part in location if part in kinds]
    return [field.name for field in fields(kinds[parts[-1]] if parts else Recipe)]


def _override(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | Iterable[str]
) -> tuple[dict[str, Any], dict[tuple[int | str, ...], str]]:
    """The values with the overrides in them; and for those given as text, the location of each and how it was given."""
    named = isinstance(overrides, Mapping)
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else [_split(text) for text in overrides]
    result = copy.deepcopy(dict(values))
    own = result.get("convert")
    if isinstance(own, dict) and own.get("cache") is not None and "mixer" not in own:
        own["mixer"] = _without_size(dict(DEFAULT_MIXER), {})
    if pairs:  # a key may reach into a part that the file leaves to the defaults
        result = {"data": [_plain(asdict(Data()))], "train": [_plain(asdict(Stage()))], "convert": {}, **result}
        if isinstance(result["convert"], dict):
            result["convert"].setdefault("mixer", dict(DEFAULT_MIXER))
            if NAME in dict(pairs) and isinstance(result["convert"]["mixer"], dict):
                result["convert"]["mixer"] = _switched(result["convert"]["mixer"], dict(pairs)[NAME])
            if dict(pairs).get(CACHE) is not None and isinstance(result["convert"]["mixer"], dict):
                result["convert"]["mixer"] = _without_size(result["convert"]["mixer"], dict(pairs))
    given: dict[tuple[int | str, ...], str] = {}
    for key, value in pairs:
        location = _set(result, key, parse_yaml(value, f"--set {key}") if isinstance(value, str) else value)
        text = f"--set {key}={plain(str(value))[:60]}"
        if given.setdefault(location, text) != text:
            raise InputError(f"{given[location]} and {text}: one key is given two values; keep one of them")
    return result, {} if named else given


def _switched(mixer: dict[str, Any], name: Any) -> dict[str, Any]:
    """Settings of another mixer: those of the old one that it knows too, but how the state is kept."""
    from linearize.model.mixers import MIXERS  # imports torch

    if name not in MIXERS or name == mixer.get("name"):
        return mixer
    known = {field.name for field in fields(MIXERS[name].Config)} - {"state_dtype"}
    kept = {key: value for key, value in mixer.items() if key in known}
    if kept.get("combine") not in MIXERS[name].combines:
        kept.pop("combine", None)
    return {**own_size(name), **kept}


def _without_size(mixer: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the number that a budget of cache decides, unless it is given beside the budget."""
    from linearize.model.mixers import MIXERS  # imports torch

    size = MIXERS[mixer["name"]].Config.sized if mixer.get("name") in MIXERS else None
    return {key: value for key, value in mixer.items() if not size or key != size[0] or f"convert.mixer.{key}" in given}


def without(overrides: Iterable[str], flags: Mapping[str, Any]) -> list[str]:
    """The overrides without those that a flag gives too.

    Raises:
        InputError: a flag and an override give one key two values.
    """
    kept = []
    for text in overrides:
        key, value = _split(text)
        if key not in flags:
            kept.append(text)
        elif parse_yaml(value, f"--set {key}") != flags[key]:
            option = f"--{key.split('.')[-1].replace('name', 'mixer')} {flags[key]}"
            raise InputError(f"{option} and --set {text}: one key is given two values; keep one of them")
    return kept


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {text}: expected KEY=VALUE with a dotted key, such as convert.mixer.window=128")
    return key.strip(), value


def _set(values: dict[str, Any], key: str, value: Any) -> tuple[int | str, ...]:
    """Set one dotted key in place, and return where; an entry of a list is named by its number or its name
    (``train.distil.lr``)."""
    names, location = key.split("."), []
    inner: Any = values
    for depth, name in enumerate(names):
        part: Any = name
        if isinstance(inner, list):
            named = {
                str(entry["name"]): i for i, entry in enumerate(inner) if isinstance(entry, dict) and "name" in entry
            }
            entries = {str(i): i for i in range(len(inner))} | named
            if name not in entries:
                raise InputError(f"--set {key}: there is no entry {name!r}. {suggest(name, entries)}")
            part = entries[name]
        elif not isinstance(inner, dict):
            raise InputError(
                f"--set {key}: {'.'.join(names[:depth])} holds {quoted(inner)}, which has no keys below it"
            )
        elif depth < len(names) - 1 and inner.get(name) is None:
            inner[name] = {}
        location.append(part)
        if depth == len(names) - 1:
            inner[part] = value
        inner = inner[part]
    return tuple(location)


def recipe_of(folder: Path, name: str | None, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe for a stage after the conversion: the folder's own, or a named one with the folder's conversion.

    Args:
        folder: what `convert` or a later stage has written.
        name: a recipe or recipe file; of it, source and conversion do not count. None: the folder's recipe.yaml.
        overrides: as in :func:`load`.

    Returns:
        The resolved recipe.

    Raises:
        InputError: bad recipe, or the folder holds none and none is named.
    """
    own = folder / "recipe.yaml"
    if not own.is_file():
        if name is None:
            raise InputError(
                f"{folder}: holds no recipe.yaml, so was not written by linearize; name a recipe by --recipe"
            )
        return load(name, overrides)
    if name is None:
        return load(own, overrides)
    made = load(own)
    return replace(load(name, overrides), source=made.source, convert=made.convert)
