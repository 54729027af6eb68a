"""Optimisers and schedules by name: which weights move at which rate."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import Adafactor

from linearize.model.attention import linearized_modules
from linearize.recipe.schema import Stage

CONSTANT = 0.55
"""Rate of the schedule `infinite` after its cooldown, as a share of the peak (arXiv 2403.08763: 1.65e-4 of 3e-4)."""


def build(model: nn.Module, stage: Stage, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimiser of a stage for the weights of a model that want gradients, and the schedule of its rates.

    Args:
        model: linearized, with adapters or without.
        stage: its optimizer, schedule, rates and decay.
        steps: in the whole run.

    Returns:
        Both; the schedule is stepped after each step of the optimiser.
    """
    chosen: list[Any] = groups(model, stage)
    match stage.optimizer:
        case "adafactor":
            # Rates come from the schedule, so Adafactor's own are off.
            optimizer = Adafactor(chosen, lr=stage.lr, scale_parameter=False, relative_step=False)
        case "muon":
            optimizer = Muon(chosen, stage.betas)
        case _:
            optimizer = torch.optim.AdamW(chosen, betas=stage.betas)
    factor = _factor(optimizer, stage, steps)
    # Counted from one: a first step at rate zero would be wasted, and short runs have few.
    return optimizer, LambdaLR(optimizer, lambda done: factor(done + 1))


def groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Parameter groups, the mixers' own weights last.

    Embeddings and the head are tables of vectors, which Muon's authors leave to AdamW.

    Args:
        model: linearized, with adapters or without.
        stage: its rates and decay.

    Returns:
        As for an optimiser: params, lr, weight_decay; and `matrices`, whether they are matrices that act on a vector.
    """
    mixers = {weight for module in linearized_modules(model) for weight in module.mixer.parameters()}
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    tables |= set(head.parameters()) if head is not None else set()
    kinds: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for weight in model.parameters():
        if weight.requires_grad:
            kind = weight in mixers, weight.ndim < 2, weight.ndim == 2 and weight not in tables
            kinds.setdefault(kind, []).append(weight)
    rates = {False: stage.lr, True: stage.mixer_lr or stage.lr}
    return [
        {"params": kinds[kind], "lr": rates[kind[0]], "weight_decay": 0.0 if kind[1] else stage.weight_decay}
        | {"matrices": kind[2]}
        for kind in sorted(kinds)
    ]


class Muon(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982) for groups of matrices and AdamW for the others, as one optimiser with one state.

    Updates are scaled to the size of AdamW's, so that both take the same rates.

    Args:
        groups: with a key `matrices`.
        betas: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]):
        made = {
            True: lambda mine: torch.optim.Muon(mine, adjust_lr_fn="match_rms_adamw"),
            False: lambda mine: torch.optim.AdamW(mine, betas=betas),
        }
        split = {kind: [group for group in groups if group["matrices"] == kind] for kind in made}
        self.parts = {kind: made[kind](mine) for kind, mine in split.items() if mine}
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step, as of any optimiser of torch."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for kind, part in self.parts.items():
            # Anew at each step: loading a checkpoint or sharding the weights replaces both.
            part.param_groups = [group for group in self.param_groups if group["matrices"] == kind]
            part.state = self.state
            part.step()
        return loss


def _factor(optimizer: torch.optim.Optimizer, stage: Stage, steps: int) -> Callable[[int], float]:
    """Step, from one, -> share of the peak rate."""
    warmup, decay = round(stage.warmup * steps), round(stage.decay * steps)
    if stage.schedule == "infinite":
        return lambda step: _infinite(step, warmup, decay)
    # arXiv 2405.18392 compares the shapes of the last phase.
    own = {"num_decay_steps": decay, "decay_type": "1-sqrt"} if stage.schedule == "warmup_stable_decay" else None
    schedule: Any = get_scheduler(
        stage.schedule, optimizer, warmup, num_training_steps=steps + 1, scheduler_specific_kwargs=own
    )
    return schedule.lr_lambdas[0]


def _infinite(step: int, warmup: int, cooldown: int) -> float:
    """Linear warmup, cosine cooldown to a constant that further training can go on with (arXiv 2403.08763)."""
    if step < warmup:
        return step / warmup
    share = min((step - warmup) / cooldown, 1.0) if cooldown else 1.0
    return CONSTANT + (1 - CONSTANT) * (1 + math.cos(math.pi * share)) / 2
