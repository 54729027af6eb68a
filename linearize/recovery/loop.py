"""One optimiser step of a training stage, on one process or many."""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor

from linearize.checkpoint import adapters
from linearize.checkpoint.describe import check_positions
from linearize.checkpoint.open import is_adapter, open_model
from linearize.checkpoint.quantize import quantize_
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.recipe.schema import Stage
from linearize.recovery import optim
from linearize.recovery.data import Blocks
from linearize.recovery.head import logits_of, splits
from linearize.recovery.losses import Losses, count_targets, token_losses
from linearize.recovery.memory import check_length, drop_windows, position_weights
from linearize.recovery.monitor import SHOWN, first_not_finite
from linearize.recovery.teacher import Teacher
from linearize.recovery.transfer import transfer

DIVIDED = {DistributedType.FSDP: ("adamw", "muon"), DistributedType.DEEPSPEED: ("adamw",)}
"""Ways to divide the weights over processes -> optimisers that work on parts. Adafactor's sums cross them; ZeRO-3 hands
its optimiser flat pieces, of which Muon cannot see the matrices."""


def open_student(folder: Path, stage: Stage) -> Any:
    """The model to train, with its adapters, in training mode.

    Frozen weights are stored in the compute dtype. What is trained is fp32 always: a small step added to a bf16 weight
    is rounded away.

    Args:
        folder: a linearized model, or adapters to go on with.
        stage: what is trained, in which dtype.

    Raises:
        InputError: there is no such model, or it does not fit the stage.
    """
    model = open_model(folder, getattr(torch, stage.dtype) if adapters.keeps_source(stage.peft) else torch.float32)
    return prepare(model, stage, folder if is_adapter(folder) else None)


def prepare(model: Any, stage: Stage, trained: Path | None = None) -> Any:
    """A linearized model with what the stage trains, in training mode; arguments and errors as of `adapters.attach`."""
    compute = getattr(torch, stage.dtype)
    quantize_(model, stage.quantize)
    if stage.peft:
        model = adapters.attach(model, stage.peft, trained)
    for weight in model.parameters():
        if not weight.requires_grad and weight.is_floating_point():  # else 4 bits, packed
            weight.data = weight.data.to(compute)
    if stage.gradient_checkpointing:
        # transformers has renamed it and warns at the old name, the only one that earlier releases know.
        old = "gradient_checkpointing_enable"
        enable = getattr(model, old.replace("gradient", "activation"), None) or getattr(model, old)
        enable({"use_reentrant": False})
    return model.train()


class Loop:
    """A model in training, and what one optimiser step needs.

    Args:
        accelerator: of this process.
        stage: losses, optimiser, precision.
        folder: the model to train.
        data: ``stage.batch`` blocks for each of the ``steps``.
        steps: in the whole run.

    Attributes:
        model: as it is called, wrapped for the processes it runs on.
        plain: the same model unwrapped.
        trained: its trained weights by name. size: how many numbers they are, of the model's total.
        divided: whether weights are divided over processes.
        teacher: the source, to learn from.
        layers: layer index -> its index among the losses of transfer.
        by_position: weights of positions in the losses of tokens, [T].
    """

    def __init__(self, accelerator: Accelerator, stage: Stage, folder: Path, data: Blocks, steps: int):
        self.accelerator, self.stage, self.data, self.steps = accelerator, stage, data, steps
        self.divided = accelerator.distributed_type in DIVIDED
        set_seed(stage.seed)
        self.plain = open_student(folder, stage)
        check_positions(self.plain, stage.seq_len, f"train.{stage.name}")
        self.teacher = Teacher(
            self.plain, stage, folder, accelerator.device, self.autocast, data.distinct(),
            lambda mine: bool(self._sum([mine])[0]) if self.divided else mine, accelerator.is_main_process,
            self.divided,
        )  # fmt: skip
        if stage.watch or stage.beyond > 1:
            check_length(self.plain, stage.seq_len, f"train.{stage.name}")
        self.by_position = position_weights(self.plain, stage.seq_len, stage.beyond).to(accelerator.device)
        self.layers = {module.layer_idx: index for index, module in enumerate(linearized_modules(self.plain))}
        set_seed(stage.seed, device_specific=True)  # dropout differs between processes; the new weights above must not
        names = [name for name, weight in self.plain.named_parameters() if weight.requires_grad]
        # Counted here: what is divided over processes is seen in part only.
        self.size = sum(self.plain.get_parameter(name).numel() for name in names)
        self.total = self.plain.num_parameters()
        optimizer, scheduler = optim.build(self.plain, stage, steps)
        self.model, self.optimizer, self.scheduler = accelerator.prepare(self.plain, optimizer, scheduler)
        self.trained = {name: weight for name, weight in self.plain.named_parameters() if weight.requires_grad}
        advice = "so they could not be saved: divide them in another way (fsdp_version: 2)"
        adapters.same_names("the model as the launcher has wrapped it", self.trained, names, advice)

    def step(self, step: int, checkpoint: Path | None) -> dict[str, Any]:
        """Run one optimiser step.

        Args:
            step: its number, from 1.
            checkpoint: the last state that was saved, for the error.

        Returns:
            Its record for the log.

        Raises:
            InputError: a loss or gradient is not finite.
        """
        started, stage = time.perf_counter(), self.stage
        batches = self._batches(step)
        (targets,) = self._sum([sum(count_targets(ids, self.by_position) for ids in batches)])
        lm, kl, *errors = self._sum(self._accumulate(step, batches, targets))
        means = {"lm": lm / targets, "kl": kl / targets} if stage.lm or stage.kl else {}
        if stage.transfer:
            means["transfer"] = sum(errors) / stage.batch
        norm = self.accelerator.clip_grad_norm_(list(self.trained.values()), stage.max_grad_norm)
        record = {
            "step": step,
            "tokens": step * stage.batch * stage.seq_len,
            **means,
            "lr": self.scheduler.get_last_lr()[0],
            "grad_norm": float(torch.as_tensor(norm)),
        }
        if not all(map(math.isfinite, (*means.values(), record["grad_norm"]))):
            bad = [f"transfer of layer {i}" for i, index in self.layers.items() if not math.isfinite(errors[index])]
            self._stop(record, batches, checkpoint, bad)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return {**record, "tokens_per_second": stage.batch * stage.seq_len / (time.perf_counter() - started)}

    def _accumulate(self, step: int, batches: list[Tensor], targets: float) -> Tensor:
        """Add the gradients of this process's micro batches, divided by the targets of all processes.

        Returns:
            Sums over them: lm, kl, and transfer of each layer, fp32 [2 + layers].
        """
        accelerator, stage = self.accelerator, self.stage
        sums = torch.zeros(2 + len(self.layers), device=accelerator.device)
        for index, ids in enumerate(batches):
            last = index == len(batches) - 1
            draw = stage.seed, step, index * accelerator.num_processes + accelerator.process_index
            accelerator.sync_gradients = last  # DeepSpeed steps inside `backward`
            with (
                nullcontext() if last and not stage.transfer else accelerator.no_sync(self.model),
                # Around the backward pass too: gradient checkpointing runs the forward once more in it.
                drop_windows(self.plain, stage.window_dropout, draw),
            ):
                losses = self.losses(ids, sums)
                if losses and not losses.total.requires_grad:
                    raise InputError(
                        f"train.{stage.name}.seq_len: blocks of {stage.seq_len} tokens reach nothing that is trained: "
                        "the memory begins behind window and sinks; use longer blocks, or name roles in peft"
                    )
                if losses:
                    # Processes average their gradients, so each brings its part of the mean times their number.
                    accelerator.backward(losses.total * (accelerator.num_processes / targets))
        # The wrapper averages at a backward pass through the whole model only.
        if stage.transfer and accelerator.num_processes > 1:
            for weight in self.trained.values():
                if weight.grad is not None:
                    weight.grad = accelerator.reduce(weight.grad, "mean")  # pyright: ignore[reportAttributeAccessIssue]
        return sums

    def losses(self, ids: Tensor, sums: Tensor) -> Losses | None:
        """The losses of the tokens of one micro batch, if the stage has any. Gradients of transfer are made on the way.

        Args:
            ids: int64 [B, T].
            sums: fp32 [2 + layers], to which lm, kl, and transfer of each layer are added.
        """
        stage, source = self.stage, None

        def learn(error: Tensor) -> None:
            self.accelerator.backward(error * (stage.transfer * self.accelerator.num_processes / stage.batch))

        if stage.kl or stage.transfer:
            if stage.kl and not self.divided:
                splits(self.teacher.model, ids, self.autocast)  # tried here: transfer watches every forward
            hooks = transfer(self.teacher.model, self.plain, learn) if stage.transfer else nullcontext({})
            with hooks as errors:
                source = self.teacher(ids) if stage.kl else self.teacher.logits(ids, logits_to_keep=1)
            for layer, error in errors.items():
                sums[2 + self.layers[layer]] += error
        if not stage.lm and not stage.kl:
            return None
        if self.divided:
            with self.autocast():
                logits = self.model(input_ids=ids, use_cache=False).logits
        else:
            logits = logits_of(self.plain, ids, self.model, self.autocast)
        losses = token_losses(
            logits, ids, source if stage.kl else None, lm=stage.lm, kl=stage.kl, temperature=stage.temperature,
            weights=self.by_position,
        )  # fmt: skip
        sums[:2] += torch.stack([losses.lm, losses.kl])
        return losses

    def autocast(self) -> torch.autocast:
        """The precision that the stage computes in."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.stage.dtype == "bfloat16")

    def weights(self) -> dict[str, Tensor]:
        """The trained weights, whole, on the main process; all processes must ask for them together.

        Raises:
            InputError: one of them is not among what the processes bring together.
        """
        state: Any = self.accelerator.get_state_dict(self.model)
        if not self.accelerator.is_main_process:
            return {}
        there = self.trained.keys() & state.keys()  # frozen weights come along where processes divide all of them
        adapters.same_names("the trained model", there, self.trained, "resume without FSDP or DeepSpeed")
        return {name: state[name] for name in self.trained}

    def about(self) -> str:
        """The run in one line."""
        stage, accelerator = self.stage, self.accelerator
        where = f"{accelerator.num_processes} x {accelerator.device.type}, {stage.dtype}"
        passes = ", ".join(f"{epochs:.2f}" for epochs in self.data.epochs)
        return (
            f"{stage.name}: {self.size:,} of {self.total:,} weights on {where}; {self.steps} steps of "
            f"{stage.batch} x {stage.seq_len} tokens; passes over the data: {passes}{self.teacher.about}"
        )

    def _batches(self, step: int) -> list[Tensor]:
        """This process's micro batches of a step: which blocks the step has does not depend on how it is divided."""
        size, processes = self.stage.micro_batch, self.accelerator.num_processes
        first = (step - 1) * self.stage.batch + self.accelerator.process_index * size
        starts = range(first, step * self.stage.batch, size * processes)
        return [self.data[start : start + size].to(self.accelerator.device) for start in starts]

    def _sum(self, values: Any) -> list[float]:
        """Sums over all processes."""
        mine = torch.as_tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return torch.as_tensor(self.accelerator.reduce(mine, "sum")).tolist()

    def _stop(self, record: dict[str, Any], batches: list[Tensor], checkpoint: Path | None, bad: list[str]) -> None:
        sums = torch.zeros(2 + len(self.layers), device=self.accelerator.device)
        where = ", ".join(bad + [first_not_finite(self.plain, lambda: [self.losses(ids, sums) for ids in batches])])
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        values = ", ".join(f"{name} {record[name]:g}" for name in (*SHOWN, "grad_norm") if name in record)
        raise InputError(
            f"train.{self.stage.name}: step {record['step']} of {self.steps}: {values} (lr {record['lr']:g}); the "
            f"first value that is not finite: {where}; {kept}. Lower lr or max_grad_norm, and train again"
        )
