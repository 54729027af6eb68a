"""What a recipe may say: frozen dataclasses, with the defaults of all that a file leaves out. Imports no torch."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from linearize.errors import InputError, suggest
from linearize.formats import parse_bytes, plain

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
LARGEST = 10**15
"""Of every whole number: more than any number of tokens, few enough digits to print."""
MOST_LAYERS = 1000
DEFAULT_MIXER = {
    "name": "clusters", "combine": "memory", "window": 64, "sinks": 4, "clusters": 704, "state_dtype": "int4",
}  # fmt: skip
"""What remembers most per byte in the committed results (eval/results/bench-memory.md)."""
CRITERIA = ("uniform", "sensitivity", "greedy", "recall")
PER = ("layers", "heads")
METHODS = ("lora", "rslora", "dora", "miss", "full")
OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"),
    *("warmup_stable_decay", "infinite"),
)


def own_size(name: str) -> dict[str, Any]:
    """How large the state of a mixer is, and how it is kept, where that was chosen by measurement."""
    return {key: DEFAULT_MIXER[key] for key in ("clusters", "state_dtype")} if name == DEFAULT_MIXER["name"] else {}


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
    if len(parts) > MOST_LAYERS:
        raise ValueError(f"found {len(parts)} entries; allowed: at most {MOST_LAYERS}")
    for part in parts:
        part = MOST_LAYERS if isinstance(part, int) and part > MOST_LAYERS else part  # too many digits to write
        first, dash, last = str(part).strip().partition("-") if isinstance(part, int | str) else ("", "", "")
        if isinstance(part, bool) or not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError("allowed: full, all, a list of layer numbers, 0-11,20, or {keep: [numbers]}")
        if max(len(first), len(last)) > 6 or not int(first) <= int(last or first) < MOST_LAYERS:
            raise ValueError(f"layers are numbered from 0, below {MOST_LAYERS}, ranges from the lower to the higher")
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


def _bytes(text: str | int) -> str | int:
    parse_bytes(text)
    return text


def one_folder(name: str) -> str:
    """A name that becomes that of a folder or file: one part of a path, never a way to another place.

    Raises:
        ValueError: it is none.
    """
    if name in (".", "..") or re.search(r"[/\\:\x00]", name) or name != plain(name) or len(name.encode()) > 100:
        raise ValueError(
            "it becomes the name of a folder; allowed: up to 100 letters without /, \\, : and control characters"
        )
    return name


FolderName = Annotated[str, AfterValidator(one_folder)]
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
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
    """What replaces softmax attention, where, and in which dtype the converted folder is written. ``cache``: bytes that
    the linearized layers' cache of one row takes, such as 8MiB, in the place of the mixer's own number."""

    mixer: dict[str, Any] = Field(default_factory=lambda: dict(DEFAULT_MIXER))
    layers: Annotated[Any, BeforeValidator(parse_layers)] = "full"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    cache: Annotated[str | int, AfterValidator(_bytes)] | None = None


@dataclass(frozen=True, config=STRICT)
class Data:
    """One part of the training mixture: an embedded text by name, a local file or glob, or a Hub data set."""

    path: Annotated[str, Field(min_length=1)] = "demo-text"
    column: str = "text"
    weight: Annotated[float, Field(gt=0)] = 1.0
    split: str = "train"


@dataclass(frozen=True, config=STRICT)
class Reading:
    """How much text a stage before training reads, ``seq_len`` tokens at a time."""

    tokens: Positive = 16_384
    seq_len: Annotated[int, Field(ge=2, le=LARGEST)] = 1024

    @model_validator(mode="after")
    def _fills_a_block(self) -> "Reading":
        if self.tokens < self.seq_len:
            raise ValueError(
                f"found too little text: {self.tokens} tokens do not fill one block of {self.seq_len} (seq_len)"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class Calibrate(Reading):
    """How much text the memory is fitted to in closed form."""


@dataclass(frozen=True, config=STRICT)
class Select(Reading):
    """How many replaced layers, or key/value heads of them, become softmax again, by which criterion of
    `linearize.select`, on how much text."""

    tokens: Positive = 8192
    keep: Annotated[int, Field(ge=0, le=LARGEST)] = 4
    by: Annotated[str, AfterValidator(_one_of(CRITERIA))] = "sensitivity"
    per: Annotated[str, AfterValidator(_one_of(PER))] = "layers"


@dataclass(frozen=True, config=STRICT)
class Allocate(Reading):
    """How many bytes of cache are divided over the layers, on how much text.

    Attributes:
        cache: as ``convert.cache``; None: as many as the folder has.
    """

    tokens: Positive = 8192
    seq_len: Annotated[int, Field(ge=2, le=LARGEST)] = 2048
    cache: Annotated[str | int, AfterValidator(_bytes)] | None = None


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
        temperature: of both distributions in kl.
        top_k: kl over the source's k likeliest tokens and one outcome for all others; the source is run once per block
            of text, and what it said is kept in LINEARIZE_CACHE for later epochs, runs and students. None: all tokens.
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
        quantize: nf4 holds the frozen weights in 4 bits while adapters are trained (QLoRA, arXiv 2305.14314), those of
            the source in kl and transfer too; merging folds the adapters into the weights as they were.
        betas: of AdamW, also where muon leaves a weight to it.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)] = "distil"
    lm: NotNegative = 0.0
    kl: NotNegative = 1.0
    transfer: NotNegative = 0.0
    beyond: Annotated[float, Field(ge=1)] = 1.0
    window_dropout: Fraction = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Positive | None = None
    peft: Peft | None = Field(default_factory=Peft)
    tokens: Positive = 1_000_000
    seq_len: Annotated[int, Field(ge=2, le=LARGEST)] = 1024
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
    quantize: Literal["nf4"] | None = None
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    save_every: Positive = 100
    watch: Annotated[int, Field(ge=0, le=LARGEST)] = 0
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
        if self.top_k and (self.transfer or not self.kl):
            problems.append(
                "top_k is about kl, which must be above 0, and spares the run of the source, which transfer needs in "
                "every step; set transfer to 0 or leave top_k out"
            )
        if self.quantize and (self.peft is None or self.peft.method not in ("lora", "rslora")):
            problems.append("quantize keeps frozen weights in 4 bits, which goes with peft.method lora or rslora")
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
    name: FolderName = ""
    description: str = ""
    status: Literal["run", "not yet run at full size"] = "not yet run at full size"
    convert: Convert = Field(default_factory=Convert)
    data: tuple[Data, ...] = Field(default_factory=lambda: (Data(),))
    allocate: Allocate | None = None
    calibrate: Calibrate | None = None
    select: Select | None = None
    train: tuple[Stage, ...] = Field(default_factory=lambda: (Stage(),))
    eval: Eval = Field(default_factory=Eval)

    @model_validator(mode="after")
    def _stages_differ(self) -> "Recipe":
        names = [stage.name for stage in self.train]
        if len(set(names)) < len(names):
            raise ValueError(f"train: two stages share a name ({', '.join(names)}); each stage needs its own")
        if (self.train or self.allocate or self.calibrate or self.select) and not self.data:
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
