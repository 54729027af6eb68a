"""What a recipe takes on a device: memory by stage and by part, time, disk; for one device and for many."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from linearize.checkpoint.room import memory
from linearize.errors import InputError, suggest
from linearize.formats import aligned, format_bytes
from linearize.model import architectures
from linearize.model.sizes import state_bytes
from linearize.recipe.schema import Recipe, Stage
from linearize.recovery.footprint import Footprint, footprint
from linearize.recovery.resume import disk_bytes


class Device(NamedTuple):
    """A device as its maker describes it: bytes of memory, and operations per second of dense products by dtype."""

    memory: float
    bfloat16: float
    float32: float


DEVICES = {
    "h100": Device(80e9, 989e12, 67e12),
    "h200": Device(141e9, 989e12, 67e12),
    "a100": Device(80e9, 312e12, 19.5e12),
    "a100-40": Device(40e9, 312e12, 19.5e12),
    "l40s": Device(48e9, 362e12, 91.6e12),
    "l4": Device(24e9, 121e12, 30.3e12),
    "rtx4090": Device(24e9, 165e12, 82.6e12),
    "rtx3090": Device(24e9, 71e12, 35.6e12),
}
"""Products in fp32 without TF32, which training does not use."""
EFFICIENCY = 0.35
"""Share of those operations that training reaches; of a CPU, share of what a large product reaches here."""
LAUNCH = 5e-6
"""Seconds that a GPU takes for one operation at least, however small."""
RUNTIME = {"cuda": 0.8e9, "cpu": 0.58e9}
"""Bytes of the process itself: the CUDA context and workspaces of its libraries, or an interpreter with all imports."""
DISK = 1e9
"""Bytes per second that a disk reads or writes."""
SERVED = 32768
"""Tokens of the text of one row that the cache is given for."""


@dataclass(frozen=True)
class Row:
    """A stage of a recipe on one device.

    Attributes:
        stage: its name.
        weights: bytes.
        trained: numbers that are trained.
        state: bytes of gradients and optimiser.
        source, student, backward: bytes at most in these parts of a step, see `Footprint`.
        cache: bytes of one row's cache.
        peak: bytes at most, the process included.
        divided: the same where weights are divided over the devices (FSDP2); None for one device.
        disk: bytes that it leaves on disk, or needs while it runs.
        seconds: of the whole stage on all devices.
        step_seconds: of one optimiser step; None where there are none.
    """

    stage: str
    weights: float = 0
    trained: float = 0
    state: float = 0
    source: float = 0
    student: float = 0
    backward: float = 0
    cache: float = 0
    peak: float = 0
    divided: float | None = None
    disk: float = 0
    seconds: float = 0
    step_seconds: float | None = None


@dataclass(frozen=True)
class Budget:
    """What a recipe takes.

    Attributes:
        source: id of the model.
        gpu: name of the device, or `cpu`.
        gpus: how many.
        memory: bytes of one.
        efficiency: share of its operations that the times assume.
        rollback: bytes that the slots of tokens to be taken back add to the cache while a draft is checked.
        rows: the stages.
        needs: what to change where it does not fit; empty where it does.
    """

    source: str
    gpu: str
    gpus: int
    memory: float
    efficiency: float
    rollback: int
    rows: list[Row]
    needs: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return asdict(self)

    def text(self) -> str:
        """For a terminal: a table of the stages, and what it rests on."""
        head: tuple[str, ...] = ("stage", "weights", "trained", "source", "student", "backward", "peak", "disk", "time")
        table: list[tuple[str, ...]] = [head if self.gpus == 1 else (*head[:7], "divided", *head[7:])]
        for row in self.rows:
            state = f"{row.trained / 1e6:,.1f} M: {format_bytes(row.state)}" if row.trained else ""
            parts = [format_bytes(part) if part else "" for part in (row.source, row.student, row.backward)]
            divided = [] if self.gpus == 1 else [format_bytes(row.divided) if row.divided else ""]
            table.append(
                (row.stage, format_bytes(row.weights) if row.weights else "", state, *parts)
                + (format_bytes(row.peak), *divided, format_bytes(row.disk) if row.disk else "", _duration(row))
            )
        served = self.rows[-1].cache
        lines = [
            f"{self.source} on {self.gpus} x {self.gpu}, {format_bytes(self.memory)} each",
            "",
            *aligned(table),
            "",
            f"cache of one row at {SERVED // 1024}K: {format_bytes(served)}; while drafts are checked "
            f"{format_bytes(self.rollback)} more, for tokens that may be taken back",
            f"times assume {self.efficiency:.0%} of the device's peak, {LAUNCH * 1e6:.0f} us an operation or more on a "
            f"GPU, and a disk of {format_bytes(DISK)} a second; memory is that of the PyTorch forms of the mixers",
        ]
        if self.gpu == "cpu":
            lines.append("malloc may hold half as much again or more, unless MALLOC_MMAP_THRESHOLD_=65536 is set")
        return "\n".join([*lines, *self.needs])


def budget(
    build: Callable[[], PreTrainedModel], wanted: Recipe, gpu: str = "h100", gpus: int = 1, source: str = ""
) -> Budget:  # fmt: skip
    """Work out what a recipe takes.

    Args:
        build: makes the linearized model on the meta device.
        wanted: the recipe.
        gpu: a name of `DEVICES`, or cpu: this machine.
        gpus: how many.
        source: id of the model, for the text.

    Raises:
        InputError: an unknown device, or a batch that so many cannot share.
    """
    if gpu != "cpu" and gpu not in DEVICES:
        raise InputError(f"gpu: found {gpu!r}. {suggest(gpu, [*DEVICES, 'cpu'])}")
    if gpus < 1:
        raise InputError(f"gpus: found {gpus}; expected 1 or more")
    device = DEVICES[gpu] if gpu != "cpu" else _machine()
    model = build()
    total = sum(weight.numel() for weight in model.parameters())
    stored = total * _itemsize(wanted.convert.dtype, model)
    rows = [Row("convert", peak=RUNTIME["cpu"] + _largest(model), disk=stored, seconds=2 * stored / DISK)]
    needs = []
    for stage in wanted.train:
        row = _stage(build, model, stage, device, gpu, gpus, total)
        rows.append(row)
        needs += _advice(row, stage, device)
    cache = state_bytes(model.config, SERVED)
    runtime = RUNTIME["cpu" if gpu == "cpu" else "cuda"]
    whole = not wanted.train or wanted.train[-1].peft is not None
    if whole and wanted.train:
        peak = RUNTIME["cpu"] + stored + 4 * _largest(model, matrices=True)
        rows.append(Row("merge", weights=stored, peak=peak, disk=stored, seconds=2 * stored / DISK))
    served = cache["linearized"]
    rows.append(Row("generate", weights=stored, cache=served, peak=runtime + stored + served))
    return Budget(source, gpu, gpus, device.memory, EFFICIENCY, cache["rollback"], rows, needs)


def _stage(
    build: Callable[[], PreTrainedModel], model: Any, stage: Stage, device: Device, gpu: str, gpus: int, total: int
) -> Row:  # fmt: skip
    if stage.batch % (stage.micro_batch * gpus):
        raise InputError(
            f"gpus: {gpus} cannot share train.{stage.name}.batch {stage.batch} in micro batches of "
            f"{stage.micro_batch}; it must be a multiple of {gpus * stage.micro_batch}"
        )
    made = footprint(build, stage)
    micro_batches, steps = stage.batch // (stage.micro_batch * gpus), stage.tokens // (stage.batch * stage.seq_len)
    seconds = made.flops / (EFFICIENCY * getattr(device, stage.dtype))
    if gpu != "cpu":
        seconds = max(seconds, LAUNCH * made.operations)
    runtime, accumulates = RUNTIME["cpu" if gpu == "cpu" else "cuda"], micro_batches > 1
    disk = disk_bytes(round(made.trained), total)
    if stage.top_k:
        disk += steps * stage.batch * stage.seq_len * (6 * stage.top_k + 4)
    return Row(
        f"train.{stage.name}",
        weights=made.weights,
        trained=made.trained,
        state=4 * made.trained + made.optimiser,
        source=made.source,
        student=made.student,
        backward=made.backward,
        # Where every process has all weights, the gradients that they exchange are in buffers of their own.
        peak=runtime + made.peak(accumulates) + (4 * made.trained if gpus > 1 else 0),
        divided=None if gpus == 1 else runtime + _divided(footprint(build, stage, divided=True), model, stage, gpus),
        disk=disk,
        seconds=steps * micro_batches * seconds,
        step_seconds=micro_batches * seconds,
    )


def _divided(made: Footprint, model: Any, stage: Stage, gpus: int) -> float:
    """Bytes at most where FSDP2 divides weights, gradients and optimiser: its share, what stands outside the layers,
    and two layers, of which one is being fetched."""
    blocks = [path.rpartition(".")[0] for path in architectures.attention_layers(model).values()]
    sizes = [sum(w.numel() for w in model.get_submodule(block).parameters()) for block in blocks]
    scale = made.weights / sum(weight.numel() for weight in model.parameters())
    gathered = scale * (sum(w.numel() for w in model.parameters()) - sum(sizes) + 2 * max(sizes))
    kept = (made.weights + made.optimiser + 4 * made.trained) / gpus
    return kept + gathered + max(made.source, made.student, made.backward - 4 * made.trained)


def _advice(row: Row, stage: Stage, device: Device) -> list[str]:
    if min(row.peak, row.divided or row.peak) <= device.memory:
        return []
    tried = [] if stage.gradient_checkpointing else [f"--set train.{stage.name}.gradient_checkpointing=true"]
    tried += [f"--set train.{stage.name}.micro_batch=1"] if stage.micro_batch > 1 else []
    tried += [f"--set train.{stage.name}.dtype=bfloat16"] if stage.dtype != "bfloat16" else []
    tried += [f"a shorter train.{stage.name}.seq_len, or more devices with FSDP2"]
    return [f"{row.stage} does not fit in {format_bytes(device.memory)}: try {', '.join(tried)}"]


def _itemsize(dtype: str, model: Any) -> int:
    return (model.config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)).itemsize


def _largest(model: Any, matrices: bool = False) -> int:
    """Numbers of the largest weight, in bytes of fp32; `matrices`: of those in layers."""
    table = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    return 4 * max(w.numel() for w in model.parameters() if not matrices or id(w) not in table)


def _machine() -> Device:
    """This machine; its speed is that of a product here and now."""
    a = torch.ones(1024, 1024)
    torch.mm(a, a)
    started = time.perf_counter()
    for _ in range(3):
        torch.mm(a, a)
    rate = 3 * 2 * 1024**3 / (time.perf_counter() - started)
    return Device(memory(), rate, rate)


def _duration(row: Row) -> str:
    if not row.seconds:
        return ""
    total = row.seconds
    text = f"{total / 3600:.1f} h" if total >= 3600 else f"{total / 60:.1f} min" if total >= 60 else f"{total:.0f} s"
    return text if row.step_seconds is None else f"{text}, {row.step_seconds:.2f} s a step"
