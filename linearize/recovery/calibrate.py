"""Closed-form calibration: how much each head should trust its memory, from one pass of the source over a little text.

Every attention layer of the source is watched while it reads: its own output is the target, window and memory of the
student are computed beside it from the same queries, keys and values (so no layer sees another's error), and one number
per head is chosen that brings the student's output nearest to the source's, in squared error:

- a memory with a log weight w: the shift c of w among GRID that is best, error (y + σ(w + c − lse)(m − y) − target)²;
  for clusters together with γ among MASSES, how much their spread adds to their weight;
- any other memory: the factor γ of y + γ m, which is a regression of target − y on m.

The best fit of each layer need not be the best for the whole model: all numbers are scaled by that one of SCALES with
which the model predicts a block of other text best, 0 where they do not help.

No gradient, no change of any source weight. The numbers are the weights `gate` and `mass` [H] of each layer's mixer.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize import progress
from linearize.checkpoint.atomic import check_output, held, output_folder
from linearize.checkpoint.open import needed
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.mixers import Context, Mixer
from linearize.model.modeling import linearize_
from linearize.model.passes import Branch
from linearize.recipe import load as recipes
from linearize.recovery import reading
from linearize.recovery.documents import local_files

GRID = torch.arange(-6.0, 6.01, 0.25)
MASSES = (0.0, 0.25, 0.5, 0.75)
LARGEST = 0.99
"""Of |γ|, because a gate is tanh of its weight."""
SCALES = (1.0, 0.5, 0.0)
"""How far to go towards the fit."""


class Watched(nn.Module):
    """In the stead of a mixer: returns the source's own attention and sums what the fit needs.

    Args:
        mixer: whose branches are fitted.
    """

    keeps_source_cache = True

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer
        self.sums: Tensor | float = 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """As of a mixer: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V] -> [B, H, T, V]."""
        target, mass = context.attend(q, k, v), getattr(self.mixer, "mass", None)
        sums = []
        for value in (None,) if mass is None else MASSES:
            if mass is not None and value is not None:
                mass.data.fill_(value)
            sums.append(self._sums(target, *self.mixer.branches(q, k, v, context)))
        if sums[0] is not None:
            self.sums = self.sums + torch.stack(sums)
        return target

    def _sums(self, target: Tensor, near: Branch | None, far: Branch | None) -> Tensor | None:
        """What the fit needs of one block, [·, H]; None where nothing lay behind the window."""
        if near is None or far is None:
            return None
        reach = self.mixer.config.window + self.mixer.config.sinks
        y, m, wanted = (x[:, :, reach:].float() for x in (near.y, far.y, target))
        miss, step = y - wanted, m - y
        if far.log_weight is None or near.log_weight is None:
            return torch.stack([-(m * miss).sum((0, 2, 3)), (m * m).sum((0, 2, 3))])
        weight, lse = far.log_weight[:, :, reach:], near.log_weight[:, :, reach:]
        share = (weight - lse + GRID.to(lse.device).view(-1, 1, 1, 1)).sigmoid()
        products = (miss * step).sum(-1), (step * step).sum(-1)
        return (2 * share * products[0] + share.square() * products[1]).sum((1, 3))

    def weights(self) -> dict[str, Tensor]:
        """The gate that fits best, [H], and where there is one the mass.

        Raises:
            InputError: no text reached beyond window and sinks.
        """
        if not isinstance(self.sums, Tensor):
            raise InputError(
                "calibrate: no text reached beyond window and sinks; use longer blocks (--seq-len) than they are"
            )
        if self.mixer.weighted:
            best = self.sums.flatten(0, 1).argmin(0)
            device, masses = best.device, torch.tensor(MASSES)
            fitted = {"gate": GRID.to(device)[best % len(GRID)], "mass": masses.to(device)[best // len(GRID)]}
            return {name: fitted[name] for name in fitted if getattr(self.mixer, name, None) is not None}
        ((toward, size),) = self.sums
        return {"gate": (toward / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(-LARGEST, LARGEST).atanh()}


@torch.inference_mode()
def fit(model: PreTrainedModel, ids: Tensor, advance: Callable[[], None] = lambda: None) -> dict[int, list[float]]:
    """Calibrate a converted model in place.

    Args:
        model: with `combine: memory` in every layer that has a mixer other than a control.
        ids: int64 [blocks, T] of text, T beyond window + sinks.
        advance: called after each block.

    Returns:
        Layer index -> its gate, one number per head.

    Raises:
        InputError: no layer has a memory, or the blocks are too short.
    """
    chosen = [m for m in linearized_modules(model) if m.mixer.delayed]
    if not chosen:
        raise InputError("calibrate: no layer of this model has a memory (combine: memory); there is nothing to fit")
    for module in chosen:
        # From zero, so that a model that was calibrated before is calibrated anew.
        config = replace(module.mixer.config, calibrated=True)
        linearize_(model, config, [module.layer_idx])
        module.mixer = Watched(module.mixer)
    try:
        for block in ids:
            model(block[None].to(model.device), use_cache=False, logits_to_keep=1)
            advance()
        fitted = {module.layer_idx: module.mixer.weights() for module in chosen}
    finally:
        for module in chosen:
            module.mixer = module.mixer.mixer
    for module in chosen:
        for name, weight in fitted[module.layer_idx].items():
            getattr(module.mixer, name).data.copy_(weight)
    return {index: weights["gate"].tolist() for index, weights in fitted.items()}


@torch.inference_mode()
def scale(model: PreTrainedModel, block: Tensor) -> dict[float, float]:
    """Scale what was fitted in place, away from where it was, by the factor with which the model predicts other text
    best.

    Args:
        model: as `fit` leaves it.
        block: int64 [T].

    Returns:
        Each of SCALES -> the loss of the next token, the best first.
    """
    block = block[None].to(model.device)
    mixers = [m.mixer for m in linearized_modules(model) if m.mixer.delayed]
    weights = [(mixer.gate.data, mixer.gate.data.clone(), 0.0) for mixer in mixers]
    masses = [mixer for mixer in mixers if getattr(mixer, "mass", None) is not None]
    weights += [(mixer.mass.data, mixer.mass.data.clone(), mixer.config.mass) for mixer in masses]

    def set_gates(factor: float) -> None:
        for weight, fitted, before in weights:
            weight.copy_(before + factor * (fitted - before))

    losses = {}
    for factor in SCALES:
        set_gates(factor)
        losses[factor] = float(model(block, labels=block, use_cache=False).loss)
    losses = dict(sorted(losses.items(), key=lambda item: item[1]))
    set_gates(next(iter(losses)))
    return losses


def calibrate(
    model_dir: str | Path,
    wanted: recipes.Recipe,
    out: str | Path,
    *,
    tokens: int | None = None,
    seq_len: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Fit the memory of a converted folder to its source, on the recipe's data.

    Args:
        model_dir: a converted folder.
        wanted: the recipe that names the data.
        out: folder to appear.
        tokens: how much text to fit to; one block more is read for `scale`. None: as the recipe's `calibrate` says.
        seq_len: tokens in a block; None: as the recipe says.
        overwrite: replace a model folder in the place of `out`.

    Returns:
        `out`.

    Raises:
        InputError: bad input; see `fit`.

    Example:
        >>> calibrate("runs/demo/0-converted", recipe.load("smollm2-135m"), "runs/demo/calibrated")
    """
    folder, out = Path(model_dir), Path(out)
    check_output(out, overwrite, [*needed(folder), *local_files(wanted.data)])
    with held(out):
        return _calibrate(folder, wanted, out, tokens, seq_len, overwrite)


def _calibrate(
    folder: Path, wanted: recipes.Recipe, out: Path, tokens: int | None, seq_len: int | None, overwrite: bool
) -> Path:
    wanted, settings = reading.settle(wanted, "calibrate", tokens=tokens, seq_len=seq_len)
    model, ids = reading.read(folder, wanted, replace(settings, tokens=settings.tokens + settings.seq_len))
    with output_folder(out, overwrite) as work:
        with progress.step_progress("calibrating", len(ids)) as advance:
            fit(model, ids[:-1], advance)
            losses = scale(model, ids[-1])
            advance()
        model.save_pretrained(work)
        reading.finish(folder, work, wanted, "calibration", asdict(settings) | {"loss_by_scale": losses})
    return out
