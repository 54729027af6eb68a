"""Which of the replaced layers become softmax again, for a budget of K: measured, written as a folder, and priced.

A layer that is softmax again has its source's attention and its source's growing cache. Criteria, by name:

- uniform: evenly spaced.
- sensitivity: the K layers with the largest KL(source ‖ model in which this layer alone is replaced), per token.
- greedy: from all replaced, K times the layer whose restoration leaves the smallest KL (as arXiv 2512.20569 adds
  layers, there with training in between). It costs about K · L forwards, so it reads GREEDY blocks only.
- recall: what a layer alone costs recall, divided by what it costs plain text (HALO, arXiv 2601.22156). There both are
  accuracies of tasks. Here recall is the loss on text that repeats what left the window, which is continuous, and plain
  text is the KL, which is never negative; the mean KL is added to it, so that noise does not choose a layer that costs
  neither anything.

Per heads, the same is asked of key/value heads with their query heads instead of layers: a head that is chosen stays
softmax inside its layer (model/softmax_heads.py), and a layer of which all are chosen becomes softmax again as a whole.

Predicted KL of a choice: the sum of the KLs of the layers that stay replaced, each measured alone. Errors of layers
need not add up, so it is an estimate; for none kept and for the choice itself the KL is measured too.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize import progress
from linearize.errors import InputError
from linearize.model import architectures
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches
from linearize.recipe import load as recipes
from linearize.recovery import reading
from linearize.recovery.head import logits_of
from linearize.recovery.losses import IGNORE, count_targets, token_losses
from linearize.recovery.parts import Part, by_layer, caches, only, write_without

GREEDY = 1
"""Blocks that greedy reads."""


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    ids: Tensor,
    candidates: Sequence[Collection[Part]],
    labels: Tensor | None = None,
    about: str = "measuring",
) -> tuple[Tensor, Tensor]:
    """Run a model with only some of its layers replaced, for several choices of them.

    Args:
        model: linearized.
        ids: int64 [blocks, T].
        candidates: for each, the parts that have their mixer; all others have their source's attention.
        labels: like `ids`, -100 where nothing is measured; None: `ids`.
        about: shown beside the bar.

    Returns:
        Next-token loss, and KL(source ‖ model), both fp64 [candidates], in nats per target.
    """
    labels = ids if labels is None else labels
    sums = torch.zeros(2, len(candidates), dtype=torch.float64)
    with progress.step_progress(about, len(ids) * len(candidates)) as advance, branches(model, "source"):
        # Candidates inside blocks: the source's logits of one block are all that is kept.
        for block, targets in zip(ids[:, None].to(model.device), labels[:, None].to(model.device), strict=True):
            source = logits_of(model, block)
            for index, parts in enumerate(candidates):
                with only(model, parts):
                    losses = token_losses(logits_of(model, block), targets, source, kl=1.0)
                sums[:, index] += torch.stack([losses.lm, losses.kl]).cpu()
                advance()
    loss, kl = sums / count_targets(labels)
    return loss, kl.clamp(min=0)  # of equal distributions it is 0 up to rounding


def repeats(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Text whose last quarter says again what its second quarter said, T/2 tokens before.

    Args:
        ids: int64 [blocks, T], T at least 8.

    Returns:
        The blocks; and labels, -100 but for the repeated tokens that follow a repeated one.
    """
    n = ids.shape[1] // 4
    again, labels = ids.clone(), torch.full_like(ids, IGNORE)
    again[:, -n:] = ids[:, n : 2 * n]
    labels[:, 1 - n :] = again[:, 1 - n :]
    return again, labels


def greedy(model: PreTrainedModel, ids: Tensor, parts: list[Part], keep: int) -> list[Part]:
    """The parts to restore, each the best one beside those before it (as arXiv 2512.20569 adds layers).

    Args:
        model: linearized.
        ids: int64 [blocks, T].
        parts: to choose from.
        keep: how many.
    """
    chosen: list[Part] = []
    for step in range(keep):
        rest = [i for i in parts if i not in chosen]
        without = [[j for j in rest if j != i] for i in rest]
        _, kl = measure(model, ids, without, about=f"greedy, {step + 1} of {keep}")
        chosen.append(rest[int(kl.argmin())])
    return chosen


def evenly(parts: list[Part], keep: int) -> list[Part]:
    """Spread a choice.

    Args:
        parts: to choose from.
        keep: how many, from 0 to all.

    Returns:
        The parts in the middle of equal shares of them.
    """
    return [parts[(2 * i + 1) * len(parts) // (2 * keep)] for i in range(keep)]


def choose(model: PreTrainedModel, ids: Tensor, keep: int, by: str, per: str = "layers") -> dict[str, Any]:
    """Choose the layers, or heads, that become softmax again, and say what every budget would cost.

    Args:
        model: linearized.
        ids: int64 [blocks, T] of text, T beyond window + sinks; twice as far for `recall`.
        keep: K.
        by: the criterion.
        per: layers, or key/value heads.

    Returns:
        JSON-safe. layers: the K chosen ones, ascending; per heads instead `heads`, layer -> those chosen in it. alone:
        of each replaced layer `layer`, and `head`, `kl` of it alone, and `score`, by which the criterion ranks it
        (None: it ranks none alone). budgets: for each K' from 0 on `keep`, `layers` or `heads`, `predicted_kl`, `kl`
        (measured, or None) and `cache_32k` in bytes of one row.

    Raises:
        InputError: K is not in 0 … L, no layer is replaced, or the blocks are too short; per heads, some were chosen
            before, or no layer sees the whole text.
    """
    parts = _candidates(model, per)
    if not 0 <= keep <= len(parts):
        raise InputError(
            f"select.keep: found {keep}; the folder has {len(parts)} replaced {per}, so from 0 to {len(parts)} of "
            "them can become softmax again (a layer that was left softmax by the conversion does not count)"
        )
    _check_length(model, ids, by)
    _, kl = measure(model, ids, [[part] for part in parts], about=f"{per}, one at a time")
    alone = dict(zip(parts, kl.tolist(), strict=True))
    scores = alone if by == "sensitivity" else {}
    if by == "recall":
        scores = dict(zip(parts, _recall_scores(model, ids, parts, kl, f"{per}, on repeated text"), strict=True))
    first = greedy(model, ids[:GREEDY], parts, keep) if by == "greedy" else []
    ranks = scores or alone
    order = first + sorted((part for part in parts if part not in first), key=lambda part: ranks[part], reverse=True)
    choices = [sorted(evenly(parts, k) if by == "uniform" else order[:k]) for k in range(len(parts) + 1)]
    _, kl = measure(model, ids, [parts, [part for part in parts if part not in choices[keep]]], about="the choice")
    measured = {0: float(kl[0]), keep: float(kl[1])}
    cache = caches(model.config, choices)
    return {
        **_named(choices[keep], per),
        "alone": [{**_name(part), "kl": alone[part], "score": scores.get(part)} for part in parts],
        "budgets": [
            {
                "keep": k,
                **_named(chosen, per),
                "predicted_kl": sum(alone[part] for part in parts if part not in chosen),
                "kl": measured.get(k),
                "cache_32k": cache[k],
            }
            for k, chosen in enumerate(choices)
        ],
    }


def _replaced(model: PreTrainedModel) -> dict[int, Any]:
    """Layer -> its attention module, of the layers that have a mixer, ascending."""
    modules = {m.layer_idx: m for m in linearized_modules(model) if not m.mixer.keeps_source_cache}
    return dict(sorted(modules.items()))


def _candidates(model: PreTrainedModel, per: str) -> list[Part]:
    """The replaced layers, or key/value heads of those that see the whole text.

    Raises:
        InputError: per heads, some were chosen before, or no layer sees the whole text.
    """
    modules = _replaced(model)
    if per == "layers":
        return [*modules]
    if any(module.softmax_heads for module in modules.values()):
        raise InputError(
            "select.per: the folder has layers in which some heads stay softmax already; choose heads in the folder "
            "that it was made from, or more layers as a whole (per: layers)"
        )
    unlimited = [layer for layer in modules if architectures.reach(model.config, layer) is None]
    if not unlimited:
        raise InputError(
            "select.per: the source's attention slides a window in every replaced layer, so that no head has a cache "
            "of the whole text to keep; choose layers (per: layers)"
        )
    return [(layer, head) for layer in unlimited for head in range(modules[layer].mixer.geometry.kv_heads)]


def _check_length(model: PreTrainedModel, ids: Tensor, by: str) -> None:
    """Refuse blocks so short that the criterion would see no memory at work."""
    mixers = [module.mixer for module in _replaced(model).values()]
    reach = min((mixer.window + mixer.sinks if mixer.windowed else 0 for mixer in mixers), default=0)
    needed = max(8, 2 * reach + 1) if by == "recall" else reach + 1
    if ids.shape[1] < needed:
        raise InputError(
            f"select.seq_len: found {ids.shape[1]}; the criterion {by} sees no layer leave its window and sinks in "
            f"blocks of less than {needed} tokens; use longer ones"
        )


def _recall_scores(model: PreTrainedModel, ids: Tensor, parts: list[Part], kl: Tensor, about: str) -> list[float]:
    """What each part alone costs on repeated text, divided by its `kl` [parts] on plain text plus the mean of all."""
    again, labels = repeats(ids)
    (source, *loss), _ = measure(model, again, [[], *([part] for part in parts)], labels, about)
    cost = (torch.stack(loss) - source).clamp(min=0)
    return (cost / (kl + kl.mean()).clamp(min=torch.finfo(kl.dtype).tiny)).tolist()


def _name(part: Part) -> dict[str, int]:
    return {"layer": part} if isinstance(part, int) else {"layer": part[0], "head": part[1]}


def _named(parts: Collection[Part], per: str) -> dict[str, Any]:
    """A choice in JSON."""
    layers = by_layer(parts)
    return {per: list(layers) if per == "layers" else {str(i): heads for i, heads in layers.items()}}


def _parts(choice: dict[str, Any]) -> list[Part]:
    """The parts in what `choose` returned, or in one of its budgets."""
    return choice["layers"] if "layers" in choice else [(int(i), h) for i, hs in choice["heads"].items() for h in hs]


def select(
    model_dir: str | Path,
    wanted: recipes.Recipe,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """Choose which layers, or heads, of a converted folder become softmax again, on the recipe's data.

    Args:
        model_dir: a converted folder, calibrated or not; it must not hold adapters.
        wanted: the recipe that names the data.
        out: folder to appear, without the mixers of the chosen layers and else the same, every tensor byte for byte;
            None: only measure.
        overwrite: replace a model folder in the place of `out`.
        **given: keep, by, per, tokens, seq_len: how many, by which criterion, layers or heads, on how much text, in
            blocks of how many tokens. None, or left out: as the recipe's `select` says.

    Returns:
        What `choose` returns, with keep, by, per, tokens and seq_len.

    Raises:
        InputError: bad input; see `choose`.

    Example:
        >>> select("runs/demo/0-calibrated", recipe.load("smollm2-135m"), "runs/demo/0-selected", keep=4)["layers"]
    """
    folder = Path(model_dir)

    def pick(model: Any, ids: Tensor, settings: Any) -> dict[str, Any]:
        return choose(model, ids, settings.keep, settings.by, settings.per)

    def write(model: Any, choice: dict[str, Any], work: Path) -> dict[str, str | None]:
        return write_without(folder, work, _parts(choice))

    return reading.chosen(folder, wanted, out, overwrite, ("select", "selection"), given, pick, write)
