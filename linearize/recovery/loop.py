"""One optimiser step of a training stage, on one process or many, and its checkpoints."""

import math
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linearize.checkpoint import adapters
from linearize.checkpoint.open import is_adapter, open_model
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.recipe.schema import Stage
from linearize.recovery import optim
from linearize.recovery.data import Blocks
from linearize.recovery.losses import Losses, count_targets, token_losses
from linearize.recovery.memory import check_length, drop_windows, position_weights
from linearize.recovery.monitor import SHOWN, first_not_finite
from linearize.recovery.resume import checkpoints
from linearize.recovery.teacher import Teacher
from linearize.recovery.transfer import transfer

DIVIDED = {DistributedType.FSDP: ("adamw", "muon"), DistributedType.DEEPSPEED: ("adamw",)}
"""Ways to divide the weights over processes -> optimisers that work on parts. Adafactor's sums cross them; ZeRO-3 hands
its optimiser flat pieces, of which Muon cannot see the matrices."""
KEPT = 2  # checkpoints: the last one, and the one before in case the disk fails
TRAINED = "trained.safetensors"


class Loop:
    """A model in training: what one optimiser step needs, and its checkpoints.

    Args:
        accelerator: of this process.
        stage: losses, optimiser, precision.
        folder: the model to train.
        data: ``stage.batch`` blocks for each of the ``steps``.
        steps: in the whole run.

    Attributes:
        model: as it is called, wrapped for the processes it runs on.
        plain: the same model unwrapped.
        teacher: what is turned into the source, to learn from it: ``plain``, unless all of it is trained.
        layers: layer index -> its place among the losses of transfer.
        by_position: weights of positions in the losses of tokens, [T].
    """

    def __init__(self, accelerator: Accelerator, stage: Stage, folder: Path, data: Blocks, steps: int):
        self.accelerator, self.stage, self.folder, self.data, self.steps = accelerator, stage, folder, data, steps
        compute = getattr(torch, stage.dtype)
        set_seed(stage.seed)
        # Frozen weights are stored in the compute dtype. What is trained is fp32 always: a small step added to a bf16
        # weight is rounded away.
        shared = adapters.keeps_source(stage.peft)
        model = open_model(folder, compute if shared else torch.float32)
        before = folder if is_adapter(folder) else None
        self.plain: Any = adapters.attach(model, stage.peft, before) if stage.peft else model
        for weight in self.plain.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(compute)
        self.divided = accelerator.distributed_type in DIVIDED
        self.teacher = Teacher(
            self.plain, stage, folder, accelerator.device, self.autocast, data.distinct(),
            lambda mine: bool(self._sum([mine])[0]) if self.divided else mine,
        )  # fmt: skip
        if stage.gradient_checkpointing:
            # transformers has renamed it and warns at the old name, the only one that earlier releases know.
            old = "gradient_checkpointing_enable"
            enable = getattr(self.plain, old.replace("gradient", "activation"), None) or getattr(self.plain, old)
            enable({"use_reentrant": False})
        self.plain.train()
        if stage.watch or stage.beyond > 1:
            check_length(self.plain, stage.seq_len, f"train.{stage.name}")
        self.by_position = position_weights(self.plain, stage.seq_len, stage.beyond).to(accelerator.device)
        self.layers = {m.layer_idx: place for place, m in enumerate(linearized_modules(self.plain))}
        set_seed(stage.seed, device_specific=True)  # dropout differs between processes; the new weights above must not
        # Counted here: what is divided over processes is seen in part only.
        self.size = sum(weight.numel() for weight in self.plain.parameters() if weight.requires_grad)
        self.total = self.plain.num_parameters()
        optimizer, scheduler = optim.build(self.plain, stage, steps)
        self.model, self.optimizer, self.scheduler = accelerator.prepare(self.plain, optimizer, scheduler)
        self.trained = {name: weight for name, weight in self.plain.named_parameters() if weight.requires_grad}
        if not self.divided:  # else accelerate writes and reads all weights, the frozen ones too
            accelerator.register_save_state_pre_hook(self._save_trained)
            accelerator.register_load_state_pre_hook(self._load_trained)

    def step(self, step: int, checkpoint: Path | None) -> dict[str, Any]:
        """Run optimiser step number ``step`` (from 1) and return its record for the log.

        Raises:
            InputError: a loss or gradient is not finite; ``checkpoint`` is the last state before that.
        """
        started = time.perf_counter()
        batches = self._batches(step)
        (targets,) = self._sum([sum(count_targets(ids, self.by_position) for ids in batches)])
        processes, stage = self.accelerator.num_processes, self.stage
        sums = torch.zeros(2 + len(self.layers), device=self.accelerator.device)
        for place, ids in enumerate(batches):
            alone = place < len(batches) - 1 or stage.transfer
            draw = stage.seed, step, place * processes + self.accelerator.process_index
            # Around the backward pass too: gradient checkpointing runs the forward once more in it.
            self.accelerator.sync_gradients = place == len(batches) - 1  # DeepSpeed steps inside `backward`
            with (
                self.accelerator.no_sync(self.model) if alone else nullcontext(),
                drop_windows(self.plain, stage.window_dropout, draw),
            ):
                losses = self.losses(ids, sums)
                if losses:
                    self._check_reach(losses)
                    # Processes average their gradients, so each brings its part of the mean times their number.
                    self.accelerator.backward(losses.total * (processes / targets))
        if stage.transfer:
            self._average_gradients()
        lm, kl, *errors = self._sum(sums)
        found = {"lm": lm / targets, "kl": kl / targets} if stage.lm or stage.kl else {}
        if stage.transfer:
            found["transfer"] = sum(errors) / stage.batch
        weights = list(self.trained.values())
        norm = float(torch.as_tensor(self.accelerator.clip_grad_norm_(weights, self.stage.max_grad_norm)))
        record = {
            "step": step,
            "tokens": step * self.stage.batch * self.stage.seq_len,
            **found,
            "lr": self.scheduler.get_last_lr()[0],
            "grad_norm": norm,
        }
        if not all(map(math.isfinite, (*found.values(), norm))):
            bad = [f"transfer of layer {i}" for i, place in self.layers.items() if not math.isfinite(errors[place])]
            self._stop(record, batches, checkpoint, bad)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return {**record, "tokens_per_second": self.stage.batch * self.stage.seq_len / seconds}

    def losses(self, ids: Tensor, sums: Tensor) -> Losses | None:
        """Losses of the tokens of one micro batch ``ids`` [B, T], if the stage has any.

        The gradients of transfer are made on the way. All is added to ``sums``: lm, kl, and transfer of each layer.
        """
        stage, source = self.stage, None

        def learn(error: Tensor) -> None:
            self.accelerator.backward(error * (stage.transfer * self.accelerator.num_processes / stage.batch))

        if stage.kl or stage.transfer:
            keep = {} if stage.kl else {"logits_to_keep": 1}
            hooks = transfer(self.teacher.model, self.plain, learn) if stage.transfer else nullcontext({})
            with hooks as errors:
                source = self.teacher(ids, **keep)
            for index, error in errors.items():
                sums[2 + self.layers[index]] += error
        if not stage.lm and not stage.kl:
            return None
        with self.autocast():
            logits = self.model(input_ids=ids, use_cache=False).logits
        losses = token_losses(
            logits, ids, source if stage.kl else None, lm=stage.lm, kl=stage.kl, temperature=stage.temperature,
            weights=self.by_position,
        )  # fmt: skip
        sums[:2] += torch.stack([losses.lm, losses.kl])
        return losses

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.stage.dtype == "bfloat16")

    def save(self, work: Path, step: int) -> Path:
        """Write a checkpoint that is either complete or not there, and forget the oldest."""
        checkpoint = work / "checkpoints" / f"step-{step:08d}"
        unfinished = checkpoint.with_name("unfinished")
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            unfinished.rename(checkpoint)
            for old in checkpoints(work)[:-KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return checkpoint

    def load(self, checkpoint: Path) -> int:
        """Go back to a checkpoint; returns its step."""
        self.accelerator.load_state(str(checkpoint))
        return int(checkpoint.name.removeprefix("step-"))

    def weights(self) -> dict[str, Tensor]:
        """The trained weights, whole, on the main process; all processes must ask for them together."""
        state: Any = self.accelerator.get_state_dict(self.model)
        return {name: state[name] for name in self.trained if name in state}

    def bytes(self) -> int:
        """Disk space for checkpoints (fp32 weights and two moments), one more while it is written, best and result."""
        frozen = (KEPT + 1) * 4 * (self.total - self.size) if self.divided else 0
        return (3 * (KEPT + 1) + 2) * 4 * self.size + frozen

    def about(self) -> str:
        """The run in one line."""
        stage, accelerator = self.stage, self.accelerator
        where = f"{accelerator.num_processes} x {accelerator.device.type}, {stage.dtype}"
        passes = ", ".join(f"{epochs:.2f}" for epochs in self.data.epochs)
        return (
            f"{stage.name}: {self.size:,} of {self.total:,} weights on {where}; {self.steps} steps of "
            f"{stage.batch} x {stage.seq_len} tokens; passes over the data: {passes}{self.teacher.about}"
        )

    def _check_reach(self, losses: Losses) -> None:
        if not losses.total.requires_grad:
            raise InputError(
                f"train.{self.stage.name}.seq_len: blocks of {self.stage.seq_len} tokens reach nothing that is "
                "trained: the memory begins behind window and sinks; use longer blocks, or name roles in peft"
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

    def _average_gradients(self) -> None:
        """Over all processes, as the wrapper of the model does it for a backward pass through the whole model only."""
        for weight in self.trained.values():
            if self.accelerator.num_processes > 1 and weight.grad is not None:
                weight.grad = self.accelerator.reduce(weight.grad, "mean")

    def _save_trained(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # the frozen weights are in the model's folder already
        if self.accelerator.is_main_process:
            save_file({n: w.detach().contiguous() for n, w in self.trained.items()}, f"{folder}/{TRAINED}")

    def _load_trained(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        with torch.no_grad():
            for name, value in load_file(f"{folder}/{TRAINED}").items():
                self.trained[name].copy_(value)

    def _stop(self, record: dict[str, Any], batches: list[Tensor], checkpoint: Path | None, bad: list[str]) -> None:
        sums = torch.zeros(2 + len(self.layers), device=self.accelerator.device)
        place = ", ".join(bad + [first_not_finite(self.plain, lambda: [self.losses(ids, sums) for ids in batches])])
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        found = ", ".join(f"{name} {record[name]:g}" for name in (*SHOWN, "grad_norm") if name in record)
        raise InputError(
            f"train.{self.stage.name}: step {record['step']} of {self.steps}: {found} (lr {record['lr']:g}); the first "
            f"value that is not finite: {place}; {kept}. Lower lr or max_grad_norm, and train again"
        )
