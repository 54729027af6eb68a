"""What a training run tells: a bar on stderr, one JSON line per step, TensorBoard; and where a NaN came from."""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from linearize.progress import Bar

LOG = "train_log.jsonl"
BOARD = "tb"
SHOWN = ("lm", "kl", "transfer")


class Monitor:
    """Reports steps. A resumed run goes on as if it had not been interrupted: later lines of the old one are dropped.

    Args:
        folder: where the log and TensorBoard's files are written.
        steps: in the whole run.
        done: steps that a checkpoint has.
        about: one line for people, printed first.
    """

    def __init__(self, folder: Path, steps: int, done: int, about: str):
        self.steps, self.gain = steps, ""
        log = folder / LOG
        kept = [line for line in read_log(log) if line["step"] <= done]
        log.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._open = ExitStack()
        self.log = self._open.enter_context(log.open("a"))
        board = SummaryWriter(str(folder / BOARD), purge_step=done + 1 if done else None, flush_secs=10)
        self.board, self.bar = self._open.enter_context(board), self._open.enter_context(Bar())
        self.bar.line(about)
        self.bar.start("", steps, done=done)

    def step(self, record: dict[str, Any]) -> None:
        """Report one step: ``step``, ``tokens_per_second``, some of `SHOWN`, and whatever else was measured."""
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(f"train/{name}", value, record["step"])
        if "memory_gain" in record:
            self.gain = f"  memory gain {record['memory_gain']:.4f}"
        losses = "  ".join(f"{name} {record[name]:.4f}" for name in SHOWN if name in record)
        text = f"{losses}{self.gain}  {record['tokens_per_second']:,.0f} tokens/s"
        self.bar.advance(text=text)
        if record["step"] == self.steps:
            self.bar.line(f"step {self.steps}/{self.steps}  {text}")

    def close(self) -> None:
        """End the bar, and close the files."""
        self._open.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log, without one that a killed run or a full disk did not let it finish."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    records = []
    for line in lines:
        with suppress(ValueError):
            records.append(json.loads(line if line.endswith("\n") else ""))
    return [record for record in records if isinstance(record, dict) and "step" in record]


def first_not_finite(model: nn.Module, run: Callable[[], Any]) -> str:
    """Find what made a loss NaN or infinite: a weight, else an output in forward order, else a gradient.

    Args:
        model: after the backward pass of the step.
        run: repeats the forward pass.

    Returns:
        Which it is, by name.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return f"weight {name}"
    culprits: list[str] = []

    def check(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all() for x in tensors):
                culprits.append(f"output of {name}")

        return hook

    hooks = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = ((name, weight.grad) for name, weight in reversed(list(model.named_parameters())))
    culprits += [f"gradient of {name}" for name, grad in gradients if grad is not None and not grad.isfinite().all()]
    return culprits[0] if culprits else "not seen when the step was repeated"
