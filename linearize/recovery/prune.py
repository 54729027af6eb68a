"""Wanda (arXiv 2306.11695): weights that matter least go to zero, without training.

A weight w_ij of a linear layer is worth |w_ij| · ‖x_j‖₂, x_j being what its input channel j carried over a little text.
In each row the least goes: a share of it, or two of every four (2:4, which sparse tensor cores run faster).

All text runs through the model once, in one batch: a layer is pruned just before it runs, so that the layers behind see
what the pruned ones before them give, as in the paper. Embeddings, the output layer and the mixers' own weights stay.
Zeros are stored as zeros: files and dense products become neither smaller nor faster by themselves.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize import progress
from linearize.checkpoint.atomic import check_output, held, output_folder
from linearize.checkpoint.open import needed
from linearize.checkpoint.quantize import linear_layers
from linearize.errors import InputError
from linearize.recipe import load as recipes
from linearize.recovery import reading
from linearize.recovery.documents import local_files


def parse_pattern(sparsity: str) -> tuple[float, int | None]:
    """What is asked for: the share of zeros, and of how many neighbours it is taken (None: of the row).

    Args:
        sparsity: a share such as ``0.5``, or ``N:M``, of which N in M stay.

    Raises:
        InputError: it is neither.
    """
    if match := re.fullmatch(r"(\d{1,3}):(\d{1,3})", sparsity):
        kept, group = int(match[1]), int(match[2])
        if 0 < kept < group:
            return 1 - kept / group, group
    elif re.fullmatch(r"0?\.\d{1,6}", sparsity) and float(sparsity) > 0:
        return float(sparsity), None
    raise InputError(
        f"prune: sparsity is {sparsity!r}; expected a share between 0 and 1, such as 0.5, or N:M such as 2:4"
    )


def least(weight: Tensor, norms: Tensor, share: float, group: int | None) -> Tensor:
    """Which weights go.

    Args:
        weight: [out, in].
        norms: of the inputs, fp32 [in].
        share: of each row, or of each group of neighbours in it.
        group: how many neighbours; None: the row.

    Returns:
        bool [out, in].
    """
    worth = (weight.abs().float() * norms).unflatten(1, (-1, group or weight.shape[1]))
    count = round(share * worth.shape[2])
    order = worth.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(worth, dtype=torch.bool).scatter_(2, order, True).flatten(1)


@torch.no_grad()
def prune_(
    model: Any, ids: Tensor, share: float, group: int | None = None, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Prune the linear layers of a model in place.

    Args:
        model: plain or linearized.
        ids: int64 [rows, T] of text, one batch.
        share: of the weights that go.
        group: of how many neighbours; None: of each row.
        advance: called after each layer.

    Returns:
        Path of each layer -> its share of zeros.

    Raises:
        InputError: a layer's inputs do not divide into groups, or no layer of the model is linear.
    """
    layers = linear_layers(model)
    odd = [path for path, layer in layers.items() if group and layer.in_features % group]
    if odd or not layers:
        what = f"{odd[0]} has {layers[odd[0]].in_features} inputs, no multiple of {group}" if odd else "it has none"
        raise InputError(f"prune: the weights of linear layers are pruned, and of this model {what}")
    done: dict[str, float] = {}

    def before(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: Any, inputs: tuple[Tensor, ...]) -> None:
            if path not in done:  # a layer that runs twice is pruned by what it reads first
                norms = inputs[0].flatten(0, -2).float().norm(dim=0)
                layer.weight.masked_fill_(least(layer.weight, norms, share, group), 0)
                done[path] = float((layer.weight == 0).float().mean())
                advance()

        return hook

    hooks = [layer.register_forward_pre_hook(before(path)) for path, layer in layers.items()]
    try:
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return done


def prune(
    model_dir: str | Path, wanted: recipes.Recipe, out: str | Path, *,
    sparsity: str = "0.5", tokens: int | None = None, seq_len: int | None = None, overwrite: bool = False,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Prune a converted or merged folder.

    Args:
        model_dir: the folder.
        wanted: the recipe that names the text.
        out: folder to appear.
        sparsity: a share, or N:M.
        tokens: how much text is read, all at once; one block more measures the loss. None: the recipe's `calibrate`.
        seq_len: tokens in a block; None: as the recipe says.
        overwrite: replace a model folder in the place of `out`.

    Returns:
        `out`, and what its manifest tells: share of zeros, loss of other text before and after.

    Raises:
        InputError: bad input; see `prune_`.

    Example:
        >>> prune("runs/demo/merged", recipe.load("smollm2-135m"), "runs/demo/pruned", sparsity="2:4")
    """
    folder, out = Path(model_dir), Path(out)
    share, group = parse_pattern(sparsity)
    check_output(out, overwrite, [*needed(folder), *local_files(wanted.data)])
    with held(out):
        _, settings = reading.settle(wanted, "calibrate", tokens=tokens, seq_len=seq_len)
        model, ids = reading.read(folder, wanted, replace(settings, tokens=settings.tokens + settings.seq_len))
        with output_folder(out, overwrite) as work:
            before = _loss(model, ids[-1:])
            with progress.step_progress("pruning", len(linear_layers(model))) as advance:
                zeros = prune_(model, ids[:-1], share, group, advance)
            made = {"sparsity": sparsity, "zeros": sum(zeros.values()) / len(zeros), "layers": len(zeros)}
            made |= {"loss_before": before, "loss_after": _loss(model, ids[-1:]), **asdict(settings)}
            model.save_pretrained(work)
            reading.finish(folder, work, wanted, "pruning", made)
    return out, made


@torch.no_grad()
def _loss(model: Any, ids: Tensor) -> float:
    ids = ids.to(model.device)
    return float(model(ids, labels=ids, use_cache=False).loss)
