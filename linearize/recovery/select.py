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
softmax inside its layer (mixers/heads.py), and a layer of which all are chosen becomes softmax again as a whole.

Predicted KL of a choice: the sum of the KLs of the layers that stay replaced, each measured alone. Errors of layers
need not add up, so it is an estimate; for none kept and for the choice itself the KL is measured too.
"""

import copy
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from linearize import formats, progress
from linearize.checkpoint import atomic, copying, shards
from linearize.checkpoint.describe import is_new, layer_of
from linearize.errors import InputError
from linearize.formats import aligned, ranges
from linearize.model import architectures
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches
from linearize.model.mixers import Context, Geometry
from linearize.model.sizes import state_bytes
from linearize.recipe import load as recipes
from linearize.recovery import reading
from linearize.recovery.losses import IGNORE, count_targets, token_losses

CONTEXT = 32768
"""Tokens of context at which a choice is priced."""
GREEDY = 1
"""Blocks that greedy reads."""
Part = int | tuple[int, int]
"""What is replaced or softmax: a layer; or a layer and one of its key/value heads."""


class Partly(nn.Module):
    """In the place of a mixer: some key/value heads have it, the others their source's attention.

    Args:
        mixer: of the whole layer.
        replaced: its heads.
    """

    name = "softmax"

    def __init__(self, mixer: Any, replaced: list[int]):
        super().__init__()
        self.mixer, self.replaced = mixer, replaced

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        y = context.attend(q, k, v).unflatten(1, (k.shape[1], -1)).clone()
        y[:, self.replaced] = self.mixer(q, k, v, context).unflatten(1, (k.shape[1], -1))[:, self.replaced]
        return y.flatten(1, 2)


@contextmanager
def only(model: PreTrainedModel, parts: Collection[Part]) -> Iterator[None]:
    """Within `branches(model, "source")`: these parts have their mixer for a while."""
    chosen = _by_layer(parts)
    modules = {m.layer_idx: m for m in linearized_modules(model) if m.layer_idx in chosen}
    mixers = {i: m.mixer for i, m in modules.items()}
    try:
        for i, heads in chosen.items():
            if heads:
                modules[i].mixer = Partly(mixers[i], heads)
        with branches(model, "all", chosen):
            yield
    finally:
        for i, m in modules.items():
            m.mixer = mixers[i]


def _by_layer(parts: Collection[Part]) -> dict[int, list[int]]:
    """Layer -> its heads, ascending; no heads where the layer is meant as a whole."""
    found: dict[int, list[int]] = {}
    for part in parts:
        layer, heads = (part, []) if isinstance(part, int) else (part[0], [part[1]])
        found[layer] = sorted(found.get(layer, []) + heads)
    return dict(sorted(found.items()))


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
            source = model(block, use_cache=False).logits
            for place, parts in enumerate(candidates):
                with only(model, parts):
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


def greedy(model: PreTrainedModel, ids: Tensor, parts: list[Part], keep: int) -> list[Part]:
    """The parts to restore, the first one first, each the best one beside those before it."""
    chosen: list[Part] = []
    for step in range(keep):
        rest = [i for i in parts if i not in chosen]
        without = [[j for j in rest if j != i] for i in rest]
        _, kl = measure(model, ids, without, about=f"greedy, {step + 1} of {keep}")
        chosen.append(rest[int(kl.argmin())])
    return chosen


def evenly(parts: list[Part], keep: int) -> list[Part]:
    """`keep` of the parts, each in the middle of an equal share of them."""
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
    modules = [m for m in linearized_modules(model) if m.mixer.name != "softmax"]
    mixers = {m.layer_idx: m.mixer for m in modules}
    if per == "heads" and any(m.softmax_heads for m in modules):
        raise InputError(
            "select.per: the folder has layers in which some heads stay softmax already; choose heads in the folder "
            "that it was made from, or more layers as a whole (per: layers)"
        )
    layers: list[Part] = sorted(mixers)
    if per == "heads":
        whole = [i for i in layers if isinstance(i, int) and architectures.reach(model.config, i) is None]
        if not whole:
            raise InputError(
                "select.per: the source's attention slides a window in every replaced layer, so that no head has a "
                "cache of the whole text to keep; choose layers (per: layers)"
            )
        layers = [(i, head) for i in whole for head in range(mixers[i].geometry.kv_heads)]
    if not 0 <= keep <= len(layers):
        raise InputError(
            f"select.keep: found {keep}; the folder has {len(layers)} replaced {per}, so from 0 to {len(layers)} of "
            "them can become softmax again (a layer that was left softmax by the conversion does not count)"
        )
    reach = min((m.window + m.sinks if m.windowed else 0 for m in mixers.values()), default=0)
    needed = max(8, 2 * reach + 1) if by == "recall" else reach + 1
    if ids.shape[1] < needed:
        raise InputError(
            f"select.seq_len: found {ids.shape[1]}; the criterion {by} sees no layer leave its window and sinks in "
            f"blocks of less than {needed} tokens; use longer ones"
        )
    _, kl = measure(model, ids, [[i] for i in layers], about=f"{per}, one at a time")
    alone = dict(zip(layers, kl.tolist(), strict=True))
    scores: dict[Part, float] = {}
    if by == "sensitivity":
        scores = alone
    elif by == "recall":
        again, labels = repeats(ids)
        (whole, *loss), _ = measure(model, again, [[], *([i] for i in layers)], labels, f"{per}, on repeated text")
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
        **_named(choices[keep], per),
        "alone": [{**_name(i), "kl": alone[i], "score": scores.get(i)} for i in layers],
        "budgets": [
            {
                "keep": k,
                **_named(chosen, per),
                "predicted_kl": sum(alone[i] for i in layers if i not in chosen),
                "kl": measured.get(k),
                "cache_32k": cache[k],
            }
            for k, chosen in enumerate(choices)
        ],
    }


def _name(part: Part) -> dict[str, int]:
    return {"layer": part} if isinstance(part, int) else {"layer": part[0], "head": part[1]}


def _named(parts: Collection[Part], per: str) -> dict[str, Any]:
    """A choice in JSON."""
    found = _by_layer(parts)
    return {per: list(found) if per == "layers" else {str(i): heads for i, heads in found.items()}}


def _blocks(layers: dict[str, Any], parts: Collection[Part], groups: int) -> dict[str, Any]:
    """The layers of a configuration's `linearize` block when these parts, of so many heads each, are softmax again."""
    found = dict(layers)
    for i, heads in _by_layer(parts).items():
        values = found.pop(str(i))
        if heads and len(heads) < groups:
            found[str(i)] = {**values, "softmax_heads": heads}
    return {i: found[i] for i in layers if i in found}


def caches(config: PreTrainedConfig, choices: Sequence[Collection[Part]]) -> list[int]:
    """Bytes of cache of one row of 32K tokens, for each choice of parts that are softmax again."""
    groups = architectures.geometry(config).kv_heads
    sizes = []
    for chosen in choices:
        changed = copy.copy(config)
        layers = config.linearize["layers"]  # type: ignore[attr-defined]
        changed.linearize = {**config.linearize, "layers": _blocks(layers, chosen, groups)}  # type: ignore[attr-defined]
        sizes.append(state_bytes(changed, CONTEXT)["linearized"])
    return sizes


def write(folder: Path, work: Path, chosen: Collection[Part]) -> dict[str, str | None]:
    """Copy configuration and weights of a linearized folder without the mixers of some layers or heads; bytes stay as
    they are. Weights of a mixer have a row per query head or per key/value head; those of chosen heads are left out.

    Returns:
        File name -> sha256, as for `write_manifest`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    block, g = config["linearize"], architectures.geometry(AutoConfig.from_pretrained(folder))
    block["layers"] = _blocks(block["layers"], chosen, g.kv_heads)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors, heads = shards.read_folder(folder), _by_layer(chosen)
    kept: dict[str, tuple[shards.Tensor, Callable[[BinaryIO], None]]] = {}
    for name, tensor in tensors.items():
        layer = layer_of(name)
        if not is_new(name) or layer not in heads:
            kept[name] = tensor, shards.cast_tensor(tensor, tensor, lambda count: None)
        elif str(layer) in block["layers"]:
            with safe_open(tensor.file, "pt") as file:
                kept[name] = _without(tensor, file.get_tensor(name), heads[layer], g)
    hashes: dict[str, str | None] = {}
    for file in dict.fromkeys(tensor.file for tensor, _ in kept.values()):
        own = [pair for pair in kept.values() if pair[0].file == file]
        target = work / file.name
        if [tensor for tensor, _ in own] == [tensor for tensor in tensors.values() if tensor.file == file]:
            hashes[file.name] = copying.copy(file, target)
        else:
            shards.write_shard(target, own)
            hashes[file.name] = copying.sha256(target)
    if (folder / shards.INDEX).is_file():
        shards.write_index(work, {name: tensor for name, (tensor, _) in kept.items()})
    return hashes


def _without(
    tensor: shards.Tensor, x: Tensor, heads: list[int], g: Geometry
) -> tuple[shards.Tensor, Callable[[BinaryIO], None]]:
    """A mixer's weight x without the rows of some key/value heads, and what writes it."""
    rows = x.unflatten(0, (g.kv_heads, -1))[[i for i in range(g.kv_heads) if i not in heads]].flatten(0, 1)
    content = rows.contiguous().view(torch.uint8).numpy().tobytes()

    def write(file: BinaryIO) -> None:
        file.write(content)

    return replace(tensor, shape=tuple(rows.shape), size=len(content)), write


def select(
    model_dir: str | Path,
    wanted: recipes.Recipe,
    out: str | Path | None = None,
    *,
    keep: int | None = None,
    by: str | None = None,
    per: str | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Choose which layers, or heads, of a converted folder become softmax again, on the recipe's data.

    Args:
        model_dir: a converted folder, calibrated or not; it must not hold adapters.
        wanted: the recipe that names the data.
        out: folder to appear, without the mixers of the chosen layers and else the same, every tensor byte for byte;
            None: only measure.
        keep, by, per, tokens, seq_len: how many, by which criterion, layers or heads, on how much text, in blocks of
            how many tokens. None: as the recipe's `select` says.
        overwrite: replace a model folder in the place of `out`.

    Returns:
        What `choose` returns, with keep, by, per, tokens and seq_len.

    Raises:
        InputError: bad input; see `choose`.

    Example:
        >>> select("runs/demo/0-calibrated", recipe.load("smollm2-135m"), "runs/demo/0-selected", keep=4)["layers"]
    """
    folder = Path(model_dir)
    if out is not None:
        atomic.check_output(Path(out), overwrite)
    wanted, settings = reading.settle(wanted, "select", keep=keep, by=by, per=per, tokens=tokens, seq_len=seq_len)
    model, ids = reading.read(folder, wanted, settings)
    found = {**asdict(settings), **choose(model, ids, settings.keep, settings.by, settings.per)}
    if out is not None:
        with atomic.output_folder(out, overwrite) as work:
            hashes = write(folder, work, _parts(found))
            reading.finish(folder, work, wanted, "selection", found, hashes)
    return found


def _parts(found: dict[str, Any]) -> list[Part]:
    """The choice in what `choose` returned, or one of its budgets."""
    return found["layers"] if "layers" in found else [(int(i), h) for i, hs in found["heads"].items() for h in hs]


def _shown(found: dict[str, Any]) -> str:
    """The same for people: layers as ranges, heads as ``3:0,2 5:1``."""
    if "layers" in found:
        return ranges(found["layers"])
    return " ".join(f"{i}:{','.join(map(str, heads))}" for i, heads in found["heads"].items())


def text(found: dict[str, Any]) -> str:
    """What `select` found, for a terminal: the choice, each layer alone, and what every budget costs."""
    ranked = any(row["score"] not in (None, row["kl"]) for row in found["alone"])
    per = found.get("per", "layers")
    headed, chosen_parts = per == "heads", _parts(found)
    layers: list[tuple[str, ...]] = [
        ("layer", *(["head"] if headed else []), "KL alone", *(["score"] if ranked else []), "stays")
    ]
    for row in sorted(found["alone"], key=lambda row: -(row["score"] if ranked else row["kl"])):
        score = [f"{row['score']:.4g}"] if ranked else []
        part = (row["layer"], row["head"]) if headed else row["layer"]
        place = [str(row[key]) for key in ("layer", "head") if key in row]
        layers.append((*place, f"{row['kl']:.4g}", *score, "softmax" if part in chosen_parts else ""))
    budgets = [("keep", "predicted KL", "measured KL", f"cache at {CONTEXT // 1024}K", per)]
    for row in found["budgets"]:
        kl = "" if row["kl"] is None else f"{row['kl']:.4g}"
        numbers = str(row["keep"]), f"{row['predicted_kl']:.4g}", kl, formats.format_bytes(row["cache_32k"])
        budgets.append((*numbers, _shown(row)))
    chosen = f"softmax in {_shown(found)}" if chosen_parts else "softmax in none"
    return "\n".join(
        [
            f"{found['keep']} of {len(found['alone'])} replaced {per} by {found['by']}: {chosen}",
            f"KL to the source in nats per token, {found['tokens']} tokens in blocks of {found['seq_len']}; predicted: "
            f"sum over the {per} that stay replaced, each measured alone, an estimate",
            "",
            *aligned(layers),
            "",
            *aligned(budgets),
        ]
    )
