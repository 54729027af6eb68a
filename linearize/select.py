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

Predicted KL of a choice: the sum of the KLs of the layers that stay replaced, each measured alone. Errors of layers
need not add up, so it is an estimate; for none kept and for the choice itself the KL is measured too.
"""

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from linearize import files, prepare, recipe, weights
from linearize.errors import InputError
from linearize.inspection import aligned, is_new, layer_of, ranges
from linearize.losses import IGNORE, count_targets, token_losses
from linearize.modeling import branches, linearized_modules, state_bytes

CONTEXT = 32768
"""Tokens of context at which a choice is priced."""
GREEDY = 1
"""Blocks that greedy reads."""


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    ids: Tensor,
    candidates: Sequence[Collection[int]],
    labels: Tensor | None = None,
    about: str = "measuring",
) -> tuple[Tensor, Tensor]:
    """Run a model with only some of its layers replaced, for several choices of them.

    Args:
        model: linearized.
        ids: int64 [blocks, T].
        candidates: for each, the layers that have their mixer; all others have their source's attention.
        labels: like `ids`, -100 where nothing is measured; None: `ids`.
        about: shown beside the bar.

    Returns:
        Next-token loss, and KL(source ‖ model), both fp64 [candidates], in nats per target.
    """
    labels = ids if labels is None else labels
    sums = torch.zeros(2, len(candidates), dtype=torch.float64)
    with prepare.progress(about, len(ids) * len(candidates)) as advance, branches(model, "source"):
        # Candidates inside blocks: the source's logits of one block are all that is kept.
        for block, targets in zip(ids[:, None].to(model.device), labels[:, None].to(model.device), strict=True):
            source = model(block, use_cache=False).logits
            for place, layers in enumerate(candidates):
                with branches(model, "all", layers):
                    losses = token_losses(model(block, use_cache=False).logits, targets, source, kl=1.0)
                sums[:, place] += torch.stack([losses.lm, losses.kl]).cpu()
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


def greedy(model: PreTrainedModel, ids: Tensor, layers: list[int], keep: int) -> list[int]:
    """The layers to restore, the first one first, each the best one beside those before it."""
    chosen: list[int] = []
    for step in range(keep):
        rest = [i for i in layers if i not in chosen]
        without = [[j for j in rest if j != i] for i in rest]
        _, kl = measure(model, ids, without, about=f"greedy, layer {step + 1} of {keep}")
        chosen.append(rest[int(kl.argmin())])
    return chosen


def evenly(layers: list[int], keep: int) -> list[int]:
    """`keep` of the layers, each in the middle of an equal share of them."""
    return [layers[(2 * i + 1) * len(layers) // (2 * keep)] for i in range(keep)]


def choose(model: PreTrainedModel, ids: Tensor, keep: int, by: str) -> dict[str, Any]:
    """Choose the layers that become softmax again, and say what every budget would cost.

    Args:
        model: linearized.
        ids: int64 [blocks, T] of text, T beyond window + sinks; twice as far for `recall`.
        keep: K.
        by: the criterion.

    Returns:
        JSON-safe. layers: the K chosen ones, ascending. alone: of each replaced layer `layer`, `kl` of it alone, and
        `score`, by which the criterion ranks it (None: it ranks no single layers). budgets: for each K' from 0 on
        `keep`, `layers`, `predicted_kl`, `kl` (measured, or None) and `cache_32k` in bytes of one row.

    Raises:
        InputError: K is not in 0 … L, no layer is replaced, or the blocks are too short.
    """
    mixers = {m.layer_idx: m.mixer for m in linearized_modules(model) if m.mixer.name != "softmax"}
    layers = sorted(mixers)
    if not 0 <= keep <= len(layers):
        raise InputError(
            f"select.keep: found {keep}; the folder has {len(layers)} replaced layers, so from 0 to {len(layers)} of "
            "them can become softmax again (a layer that was left softmax by the conversion does not count)"
        )
    reach = min((m.window + m.sinks if m.windowed else 0 for m in mixers.values()), default=0)
    needed = max(8, 2 * reach + 1) if by == "recall" else reach + 1
    if ids.shape[1] < needed:
        raise InputError(
            f"select.seq_len: found {ids.shape[1]}; the criterion {by} sees no layer leave its window and sinks in "
            f"blocks of less than {needed} tokens; use longer ones"
        )
    _, kl = measure(model, ids, [[i] for i in layers], about="layers, one at a time")
    alone = dict(zip(layers, kl.tolist(), strict=True))
    scores: dict[int, float] = {}
    if by == "sensitivity":
        scores = alone
    elif by == "recall":
        again, labels = repeats(ids)
        (whole, *loss), _ = measure(model, again, [[], *([i] for i in layers)], labels, "layers, on repeated text")
        cost = (torch.stack(loss) - whole).clamp(min=0) / (kl + kl.mean()).clamp(min=torch.finfo(kl.dtype).tiny)
        scores = dict(zip(layers, cost.tolist(), strict=True))
    first = greedy(model, ids[:GREEDY], layers, keep) if by == "greedy" else []
    ranks = scores or alone
    order = first + sorted((i for i in layers if i not in first), key=lambda i: ranks[i], reverse=True)
    choices = [sorted(evenly(layers, k) if by == "uniform" else order[:k]) for k in range(len(layers) + 1)]
    _, kl = measure(model, ids, [layers, [i for i in layers if i not in choices[keep]]], about="the choice")
    measured = {0: float(kl[0]), keep: float(kl[1])}
    cache = caches(model.config, choices)
    return {
        "layers": choices[keep],
        "alone": [{"layer": i, "kl": alone[i], "score": scores.get(i)} for i in layers],
        "budgets": [
            {
                "keep": k,
                "layers": chosen,
                "predicted_kl": sum(alone[i] for i in layers if i not in chosen),
                "kl": measured.get(k),
                "cache_32k": cache[k],
            }
            for k, chosen in enumerate(choices)
        ],
    }


def caches(config: PreTrainedConfig, choices: list[list[int]]) -> list[int]:
    """Bytes of cache of one row of 32K tokens, for each choice of layers that are softmax again."""
    plain = copy.copy(config)
    plain.linearize = {**config.linearize, "layers": {}}  # type: ignore[attr-defined]
    replaced, restored = (state_bytes(each, CONTEXT)["per_layer"] for each in (config, plain))
    return [sum(restored[i] if i in chosen else now for i, now in enumerate(replaced)) for chosen in choices]


def write(folder: Path, work: Path, chosen: Collection[int]) -> dict[str, str | None]:
    """Copy configuration and weights of a linearized folder without the mixers of some layers; bytes stay as they are.

    Returns:
        File name -> sha256, as for `write_manifest`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    block = config["linearize"]
    block["layers"] = {i: values for i, values in block["layers"].items() if int(i) not in chosen}
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = weights.read_folder(folder)
    kept = [t for t in tensors.values() if not (is_new(t.name) and layer_of(t.name) in chosen)]
    hashes: dict[str, str | None] = {}
    for file in dict.fromkeys(tensor.file for tensor in kept):
        own = [tensor for tensor in kept if tensor.file == file]
        target = work / file.name
        if len(own) == sum(tensor.file == file for tensor in tensors.values()):
            hashes[file.name] = files.copy(file, target)
        else:
            weights.write_shard(target, [(t, weights.cast_tensor(t, t, lambda count: None)) for t in own])
            hashes[file.name] = files.sha256(target)
    if (folder / weights.INDEX).is_file():
        weights.write_index(work, {tensor.name: tensor for tensor in kept})
    return hashes


def select(
    model_dir: str | Path,
    wanted: recipe.Recipe,
    out: str | Path | None = None,
    *,
    keep: int | None = None,
    by: str | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Choose which layers of a converted folder become softmax again, on the recipe's data.

    Args:
        model_dir: a converted folder, calibrated or not; it must not hold adapters.
        wanted: the recipe that names the data.
        out: folder to appear, without the mixers of the chosen layers and else the same, every tensor byte for byte;
            None: only measure.
        keep, by, tokens, seq_len: how many layers, by which criterion, on how much text, in blocks of how many tokens.
            None: as the recipe's `select` says.
        overwrite: replace a model folder in the place of `out`.

    Returns:
        What `choose` returns, with keep, by, tokens and seq_len.

    Raises:
        InputError: bad input; see `choose`.

    Example:
        >>> select("runs/demo/0-calibrated", recipe.load("smollm2-135m"), "runs/demo/0-selected", keep=4)["layers"]
    """
    folder = Path(model_dir)
    if out is not None:
        files.check_output(Path(out), overwrite)
    wanted, settings = prepare.settle(wanted, "select", keep=keep, by=by, tokens=tokens, seq_len=seq_len)
    model, ids = prepare.read(folder, wanted, settings)
    found = {**asdict(settings), **choose(model, ids, settings.keep, settings.by)}
    if out is not None:
        with files.output_folder(out, overwrite) as work:
            hashes = write(folder, work, found["layers"])
            prepare.finish(folder, work, wanted, "selection", found, hashes)
    return found


def text(found: dict[str, Any]) -> str:
    """What `select` found, for a terminal: the choice, each layer alone, and what every budget costs."""
    ranked = any(row["score"] not in (None, row["kl"]) for row in found["alone"])
    layers = [("layer", "KL alone", *(["score"] if ranked else []), "stays")]
    for row in sorted(found["alone"], key=lambda row: -(row["score"] if ranked else row["kl"])):
        score = [f"{row['score']:.4g}"] if ranked else []
        stays = "softmax" if row["layer"] in found["layers"] else ""
        layers.append((str(row["layer"]), f"{row['kl']:.4g}", *score, stays))
    budgets = [("keep", "predicted KL", "measured KL", f"cache at {CONTEXT // 1024}K", "layers")]
    for row in found["budgets"]:
        kl = "" if row["kl"] is None else f"{row['kl']:.4g}"
        numbers = str(row["keep"]), f"{row['predicted_kl']:.4g}", kl, files.format_bytes(row["cache_32k"])
        budgets.append((*numbers, ranges(row["layers"])))
    chosen = f"softmax in {ranges(found['layers'])}" if found["layers"] else "softmax in none"
    return "\n".join(
        [
            f"{found['keep']} of {len(found['alone'])} replaced layers by {found['by']}: {chosen}",
            f"KL to the source in nats per token, {found['tokens']} tokens in blocks of {found['seq_len']}; predicted: "
            "sum over the layers that stay replaced, each measured alone, an estimate",
            "",
            *aligned(layers),
            "",
            *aligned(budgets),
        ]
    )
