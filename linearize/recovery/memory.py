"""What makes a memory used, and what shows that it is: random shorter windows, and its gain on text held back."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from linearize.checkpoint.atomic import sync
from linearize.errors import InputError
from linearize.model.branches import branches, reaches, windows
from linearize.recovery.head import logits_of
from linearize.recovery.losses import count_targets, token_losses
from linearize.recovery.resume import read_into


def drop_windows(model: nn.Module, probability: float, seed: tuple[int, ...]) -> AbstractContextManager[None]:
    """Cut the window of a model for one micro batch, at random, so that its memory is needed.

    With the probability, a window of random length in [1, W]; drawn on its own with the same probability, a random
    number of sinks in [0, s].

    Args:
        model: linearized. W and s are the largest of its layers; a layer with less keeps its own.
        probability: 0 leaves the model as it is.
        seed: alone decides the draw.

    Returns:
        A context in which the window is cut.
    """
    pairs = reaches(model)
    if not probability or not pairs:
        return nullcontext()
    W, s = (max(values) for values in zip(*pairs, strict=True))
    random = np.random.default_rng(seed)
    cut_window, cut_sinks = random.random(2) < probability
    window, sinks = int(random.integers(1, W, endpoint=True)), int(random.integers(0, s, endpoint=True))
    return windows(model, window if cut_window else None, sinks if cut_sinks else None)


def position_weights(model: nn.Module, seq_len: int, far: float, near: float = 1.0) -> Tensor:
    """Weights of the positions in a block, for `token_losses`.

    Args:
        model: linearized.
        seq_len: T.
        far: the weight where the memory can be seen.
        near: the weight before.

    Returns:
        fp32 [T].
    """
    weights = torch.full((seq_len,), near)
    weights[_first_beyond(model, seq_len) :] = far
    return weights


def check_length(model: nn.Module, seq_len: int, where: str) -> None:
    """Refuse blocks in which nothing is predicted from where a memory can be seen.

    Args:
        model: linearized.
        seq_len: tokens in a block.
        where: of the recipe, for the error.

    Raises:
        InputError: the blocks are too short, or there is no memory behind a window.
    """
    if _first_beyond(model, seq_len) >= seq_len - 1:  # the last token of a block predicts nothing
        raise InputError(
            f"{where}: beyond and watch are about what is predicted from beyond window and sinks, and blocks of "
            f"seq_len {seq_len} do not reach beyond them in any layer with a memory; use longer blocks or a shorter "
            "window, or leave beyond at 1 and watch at 0"
        )


def _first_beyond(model: nn.Module, seq_len: int) -> int:
    return min([seq_len, *map(sum, reaches(model))])


@torch.no_grad()
def gain(model: Any, block: Tensor) -> dict[str, float]:
    """What the memory adds on one block of text, to what is predicted from where the memory can be seen.

    Args:
        model: linearized.
        block: token ids int64 [T], T beyond window + sinks.

    Returns:
        held_loss: next-token loss there in nats. memory_gain: the same without memory, minus held_loss.
    """
    training = model.training
    model.eval()
    ids, weights = block[None], position_weights(model, len(block), 1.0, 0.0).to(block.device)
    try:
        losses = {}
        for branch in ("all", "window"):
            with branches(model, branch):
                summed = token_losses(logits_of(model, ids), ids, weights=weights)
            losses[branch] = float(summed.lm) / count_targets(ids, weights)
    finally:
        model.train(training)
    return {"held_loss": losses["all"], "memory_gain": losses["window"] - losses["all"]}


class Watch:
    """Measures what the memory adds in the course of a run, and keeps the weights of the best moment in a file.

    Args:
        model: linearized.
        trained: its trained weights by name, on which the model runs.
        block: text held back, token ids int64 [T].
        keep: what is best: `memory` the largest gain, `loss` the lowest loss; `last` keeps nothing.
        folder: of the file, which a resumed run finds again.
    """

    def __init__(self, model: Any, trained: dict[str, Tensor], block: Tensor, keep: str, folder: Path):
        self.model, self.trained, self.block, self.keep = model, trained, block, keep
        self.file = folder / "best.safetensors"

    def step(self, step: int, write: bool = True) -> dict[str, float]:
        """Measure, and keep the weights if they are the best so far.

        Args:
            step: number of the step that was just taken.
            write: whether this process writes the file.

        Returns:
            As `gain`.
        """
        measured = gain(self.model, self.block.to(next(self.model.parameters()).device))
        if self.keep != "last" and write:
            score = measured["memory_gain"] if self.keep == "memory" else -measured["held_loss"]
            best = self._best()
            # A resumed run repeats steps, and may come to its own best again: that changes nothing.
            if best is None or score > best[0]:
                unfinished = self.file.with_suffix(".unfinished")
                weights = {name: weight.detach().contiguous() for name, weight in self.trained.items()}
                save_file(weights, unfinished, {"score": repr(score), "step": str(step)})
                sync(unfinished)
                unfinished.rename(self.file)
        return measured

    def restore(self) -> int:
        """Put the best weights back into the model; returns the step after which they were measured.

        Raises:
            InputError: their file is gone, or holds other weights than those of the model.
        """
        best = self._best()
        if best is None:
            raise InputError(f"{self.file}: the weights to keep are gone; pass --overwrite to start anew")
        read_into(self.trained, self.file)
        return best[1]

    def _best(self) -> tuple[float, int] | None:
        """Score and step."""
        if not self.file.is_file():
            return None
        with safe_open(self.file, "pt") as file:
            facts = file.metadata()
        return float(facts["score"]), int(facts["step"])
