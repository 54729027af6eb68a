"""Recipes: all that decides how a model is converted, recovered and measured, as frozen dataclasses read from YAML.

A recipe is a file; its stem is the name a user types. What the file leaves out takes the defaults written here. Single
values are overridden with dotted keys (``convert.mixer.window=128``, ``train.distil.tokens=1000``). All problems of a
file are reported at once. Importing this module does not import torch; checking the mixer's own settings does.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from linearize.errors import InputError, suggest

STRICT = ConfigDict(extra="forbid")
SUFFIXES = (".yaml", ".yml")
DEFAULT_MIXER = {"name": "gla", "combine": "memory", "window": 64, "sinks": 4}
METHODS = ("lora", "rslora", "dora", "miss", "full")
OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"),
    *("warmup_stable_decay", "infinite"),
)


def parse_layers(value: Any) -> Any:
    """Bring the ways to name layers into one form.

    Args:
        value: ``full``, ``all``, a number, a list of numbers, ``{keep: [numbers]}``, or text: ``0-11,20`` or
            ``keep:20,23``.

    Returns:
        ``"full"`` (layers whose attention sees the whole text), ``"all"`` (also those of a sliding window), a sorted
        list of the layers to convert, or ``{"keep": sorted list of the layers that stay softmax}``.

    Raises:
        ValueError: the value is none of these.
    """
    if value in ("full", "all"):
        return value
    if isinstance(value, Mapping) and set(value) == {"keep"}:
        return {"keep": _numbers(value["keep"])}
    if isinstance(value, str) and value.startswith("keep:"):
        return {"keep": _numbers(value.removeprefix("keep:"))}
    return _numbers(value)


def _numbers(value: Any) -> list[int]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers: set[int] = set()
    for part in parts:
        first, dash, last = str(part).strip().partition("-")
        if isinstance(part, bool) or not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError("allowed: full, all, a list of layer numbers, 0-11,20, or {keep: [numbers]}")
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers:
        raise ValueError("the list of layers is empty; allowed: full, all, or at least one layer number")
    return sorted(numbers)


def _one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(suggest(name, names))
        return name

    return check


Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class Source:
    """The model to convert: Hub id, folder or GGUF file. ``package`` is a pip package that carries the weights too."""

    id: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    package: str | None = None


@dataclass(frozen=True, config=STRICT)
class Convert:
    """What replaces softmax attention, where, and in which dtype the converted folder is written."""

    mixer: dict[str, Any] = Field(default_factory=lambda: dict(DEFAULT_MIXER))
    layers: Annotated[Any, BeforeValidator(parse_layers)] = "full"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True, config=STRICT)
class Data:
    """One part of the training mixture: an embedded text by name, a local file or glob, or a Hub data set."""

    path: Annotated[str, Field(min_length=1)] = "demo-text"
    column: str = "text"
    weight: Annotated[float, Field(gt=0)] = 1.0
    split: str = "train"


@dataclass(frozen=True, config=STRICT)
class Calibrate:
    """How much text the memory is fitted to in closed form, before any training; ``seq_len`` tokens at a time."""

    tokens: Positive = 16_384
    seq_len: Annotated[int, Field(ge=2)] = 1024

    @model_validator(mode="after")
    def _fills_a_block(self) -> "Calibrate":
        if self.tokens < self.seq_len:
            raise ValueError(f"{self.tokens} tokens do not fill one block of {self.seq_len} (seq_len)")
        return self


@dataclass(frozen=True, config=STRICT)
class Peft:
    """Which weights are trained: projections named by role, and the mixers' own weights.

    Attributes:
        method: lora (arXiv 2106.09685), rslora (2312.03732), dora (2402.09353) and miss (2409.15371) leave the source's
            weights as they are and train adapters beside them; full trains the weights themselves.
        r: rank of the adapters. alpha: their scale, of lora, rslora and dora. dropout: in front of them.
        roles: which projections of the linearized layers; with an empty list only the memory is trained.
        mixer: whether the mixers' own weights (a calibrated gate, feature maps, …) are trained too.
    """

    method: Annotated[str, AfterValidator(_one_of(METHODS))] = "lora"
    r: Positive = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    roles: tuple[Literal["q", "k", "v", "o", "mlp"], ...] = ("q", "k", "v", "o")
    mixer: bool = True

    @model_validator(mode="after")
    def _trains(self) -> "Peft":
        if not self.roles and not self.mixer:
            raise ValueError("roles is empty and mixer is false, so nothing is trained; name a role or set mixer: true")
        return self


@dataclass(frozen=True, config=STRICT)
class Stage:
    """One stage of training: the losses, the budget, the optimiser. ``batch`` counts sequences over all processes.

    Attributes:
        lm, kl, transfer: weights of the losses: next token, the source's distribution, the output of each attention
            layer of the source.
        beyond: weighs what is predicted from where the memory can be seen, in lm and kl.
        window_dropout: probability that a micro batch sees a shorter window, and that it sees fewer sinks.
        watch: steps between measurements of what the memory adds, on text held back; 0: never. keep: which of these
            moments becomes the result.
        peft: which weights are trained; None: all.
        lr: peak learning rate. mixer_lr: that of the mixers' own weights; None: the same.
        warmup: share of the steps in which the rates rise to their peak.
        decay: share of the steps in which warmup_stable_decay falls to zero at the end, or infinite falls to its
            constant after the warmup; the other schedules need none.
        weight_decay: of matrices; vectors and scalars have none.
        betas: of AdamW, also where muon leaves a weight to it.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] = "distil"
    lm: NotNegative = 0.0
    kl: NotNegative = 1.0
    transfer: NotNegative = 0.0
    beyond: Annotated[float, Field(ge=1)] = 1.0
    window_dropout: Fraction = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    peft: Peft | None = Field(default_factory=Peft)
    tokens: Positive = 1_000_000
    seq_len: Annotated[int, Field(ge=2)] = 1024
    batch: Positive = 8
    micro_batch: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 5e-4
    mixer_lr: Annotated[float, Field(gt=0)] | None = None
    schedule: Annotated[str, AfterValidator(_one_of(SCHEDULES))] = "cosine"
    warmup: Fraction = 0.1
    decay: Fraction = 0.2
    optimizer: Annotated[str, AfterValidator(_one_of(OPTIMIZERS))] = "adamw"
    weight_decay: NotNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    save_every: Positive = 100
    watch: Annotated[int, Field(ge=0)] = 0
    keep: Literal["last", "memory", "loss"] = "last"

    @model_validator(mode="after")
    def _agrees(self) -> "Stage":
        problems = []
        if self.batch % self.micro_batch:
            problems.append(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.tokens < self.batch * self.seq_len:
            problems.append(
                f"tokens {self.tokens} is less than one step, batch x seq_len = {self.batch * self.seq_len}"
            )
        if not self.lm and not self.kl and not self.transfer:
            problems.append("lm, kl and transfer are all 0, so there is nothing to learn from; set one of them above 0")
        if self.keep != "last" and not self.watch:
            problems.append(f"keep: {self.keep} needs what watch measures; set watch above 0")
        if self.schedule in ("warmup_stable_decay", "infinite") and self.warmup + self.decay > 1:
            problems.append(f"warmup {self.warmup} and decay {self.decay} are together more than all steps")
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass(frozen=True, config=STRICT)
class Eval:
    """What the finished model is measured with."""

    suite: str = "smoke"


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A whole recipe. ``name`` is the stem of its file, ``status`` says whether it has been run at full size."""

    source: Source
    name: str = ""
    description: str = ""
    status: Literal["run", "not yet run at full size"] = "not yet run at full size"
    convert: Convert = Field(default_factory=Convert)
    data: tuple[Data, ...] = Field(default_factory=lambda: (Data(),))
    calibrate: Calibrate | None = None
    train: tuple[Stage, ...] = Field(default_factory=lambda: (Stage(),))
    eval: Eval = Field(default_factory=Eval)

    @model_validator(mode="after")
    def _stages_differ(self) -> "Recipe":
        names = [stage.name for stage in self.train]
        if len(set(names)) < len(names):
            raise ValueError(f"train: two stages share a name ({', '.join(names)}); each stage needs its own")
        if (self.train or self.calibrate) and not self.data:
            raise ValueError("data: found no entry; training needs at least one")
        return self

    def stage(self, name: str | None = None) -> Stage:
        """Find a training stage by name; without a name, the only or first one.

        Raises:
            InputError: the recipe has no such stage.
        """
        for stage in self.train:
            if name in (None, stage.name):
                return stage
        raise InputError(
            f"recipe {self.name or self.source.id}: there is no training stage {name or 'at all'}. "
            f"{suggest(name or '', [stage.name for stage in self.train])}"
        )


STAGES = {
    "transfer": Stage(name="transfer", transfer=1.0, kl=0.0),
    "distil": Stage(name="distil"),
    "long": Stage(name="long", seq_len=4096),
}
"""Stages that have a verb of their own, as they are where a recipe says nothing about them."""


def package_folder(name: str) -> Path:
    """Folder of data that ships with the package (``recipes``, ``eval``): inside it once installed, else beside it."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


def names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in package_folder("recipes").glob("*.yaml"))


def path_of(name: str) -> Path:
    """File of a shipped recipe.

    Raises:
        InputError: no shipped recipe has this name.
    """
    if name not in names():
        raise InputError(f"unknown recipe {name!r}. {suggest(name, names())}. A file is named with its ending, .yaml")
    return package_folder("recipes") / f"{name}.yaml"


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
    path, where = Path(name_or_path), str(name_or_path)
    if path.suffix not in SUFFIXES:
        path, where = path_of(where), f"recipes/{where}.yaml"
    elif not path.is_file():
        raise InputError(f"{where}: there is no such recipe file. Shipped recipes: {', '.join(names())}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(
            f"{where}: found {type(raw).__name__}; a recipe is a mapping with at least source: {{id: ...}}"
        )
    return from_dict({"name": path.stem, **raw}, overrides, where)


def default(source_id: str, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """Recipe for a model that was named without one: the shipped recipe with this source, else this file's defaults."""
    for name in names():
        if yaml.safe_load(path_of(name).read_text(encoding="utf-8"))["source"]["id"] == source_id:
            return load(name, overrides)
    return from_dict({"source": {"id": source_id}}, overrides, where="defaults")


def resolve(model: str, overrides: Mapping[str, Any] | Iterable[str] = (), recipe: str | Path | None = None) -> Recipe:
    """Recipe for whatever a user names as a model.

    Args:
        model: a recipe, a recipe file, a Hub id, a folder or a GGUF file.
        overrides: as in :func:`load`.
        recipe: a recipe to use for this model instead of its own.

    Raises:
        InputError: as :func:`load`.
    """
    if recipe is not None:
        there = load(recipe, overrides)
        return replace(there, source=resolve(model).source)
    if Path(model).suffix in SUFFIXES or model in names():
        return load(model, overrides)
    return default(model, overrides)


def run_folder(recipe: Recipe) -> Path:
    """Where the stages of a recipe go when the user names no folder."""
    return Path("runs") / (recipe.name or Path(recipe.source.id).stem)


def with_stage(recipe: Recipe, name: str) -> Recipe:
    """The same recipe; behind its own stages one of `STAGES`, where it has none of that name."""
    known = any(stage.name == name for stage in recipe.train)
    return recipe if known else replace(recipe, train=(*recipe.train, STAGES[name]))


def switch_mixer(recipe: Recipe, name: str) -> Recipe:
    """The same recipe with another mixer, which keeps the settings of the old one that it knows too.

    Raises:
        InputError: no mixer has this name.
    """
    from linearize.mixers import MIXERS  # imports torch

    if name not in MIXERS:
        raise InputError(f"unknown mixer {name!r}. {suggest(name, MIXERS)}")
    known = {field.name for field in fields(MIXERS[name].Config)}
    kept = {key: value for key, value in recipe.convert.mixer.items() if key in known}
    if kept.get("combine") not in MIXERS[name].combines:
        kept.pop("combine", None)
    return replace(recipe, convert=replace(recipe.convert, mixer={**kept, "name": name}))


def from_dict(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | Iterable[str] = (), where: str = "recipe"
) -> Recipe:
    """Build and check a recipe from plain values.

    Args:
        values: the content of a recipe file.
        overrides: as in :func:`load`.
        where: named at the start of every error.

    Raises:
        InputError: one line per problem.
    """
    values = _override(values, overrides)
    try:
        recipe = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors(include_url=False)]
        convert = values.get("convert")
        mixer = convert.get("mixer") if isinstance(convert, dict) else None
        problems += _mixer_problems(mixer) if isinstance(mixer, dict) else []
        raise InputError("\n".join(f"{where}: {problem}" for problem in problems)) from error
    validate(recipe, where)
    return recipe


def validate(recipe: Recipe, where: str = "recipe") -> None:
    """Check what the types cannot: the settings of the mixer, by the mixer itself.

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
    from linearize.mixers import build_config  # imports torch

    try:
        build_config(mixer)
    except InputError as error:
        return [f"convert.{error}"]
    return []


def _explain(problem: Any) -> str:
    """One problem as pydantic reports it, as ``key: found; allowed``."""
    location = [str(part) for part in problem["loc"]]
    key, found = ".".join(location), problem["input"]
    message = problem["msg"].removeprefix("Value error, ").replace("a dictionary or an instance of", "a mapping, see")
    match problem["type"]:
        case "unexpected_keyword_argument":
            return f"{key}: unknown key. {suggest(location[-1], _fields(location[:-1]))}"
        case "missing":
            return f"{key}: missing; it has no default"
        case "value_error" if isinstance(found, ArgsKwargs):  # a check of several keys, whose text says what was found
            return f"{key}: {message}" if key else message
    return f"{key}: found {found!r}; {message[0].lower()}{message[1:]}"


def _fields(location: list[str]) -> list[str]:
    """Keys that are allowed at a place of the recipe."""
    kinds: dict[str, Any] = {"source": Source, "convert": Convert, "data": Data, "calibrate": Calibrate}
    kinds |= {"train": Stage, "eval": Eval, "peft": Peft}
    parts = [part for part in location if part in kinds]
    return [field.name for field in fields(kinds[parts[-1]] if parts else Recipe)]


def _override(values: Mapping[str, Any], overrides: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    if not isinstance(overrides, Mapping):
        overrides = dict(_split(text) for text in overrides)
    result = copy.deepcopy(dict(values))
    if overrides:  # a key may reach into a part that the file leaves to the defaults
        result = {"data": [_plain(asdict(Data()))], "train": [_plain(asdict(Stage()))], "convert": {}, **result}
        if isinstance(result["convert"], dict):
            result["convert"].setdefault("mixer", dict(DEFAULT_MIXER))
    for key, value in overrides.items():
        try:
            _set(result, key, yaml.safe_load(value) if isinstance(value, str) else value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {key}={value}: the value is not valid YAML; put it in quotes") from error
    return result


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {text}: expected KEY=VALUE with a dotted key, such as convert.mixer.window=128")
    return key.strip(), value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key in place; an entry of a list is named by its number or its name (``train.distil.lr``)."""
    *parents, last = key.split(".")
    at: Any = values
    for depth, name in enumerate([*parents, last]):
        part: Any = name
        if isinstance(at, list):
            entries = {str(i): i for i in range(len(at))}
            entries |= {
                str(entry["name"]): i for i, entry in enumerate(at) if isinstance(entry, dict) and "name" in entry
            }
            if name not in entries:
                raise InputError(f"--set {key}: there is no entry {name!r}. {suggest(name, entries)}")
            part = entries[name]
        elif not isinstance(at, dict):
            raise InputError(f"--set {key}: {'.'.join(parents[:depth])} holds {at!r}, which has no keys below it")
        elif depth < len(parents) and at.get(name) is None:
            at[name] = {}
        if depth == len(parents):
            at[part] = value
        at = at[part]
