"""Dividing a budget of cache over the layers: each gets as many clusters as it gains from.

What a layer gains is measured in two passes. The source reads a text once, and beside each of its attention layers the
memory is computed at every size of LEVELS from the same queries, keys and values: the error of the layer's output at
that size, relative to the error at the equal share. And with the equal share in one layer alone, KL(source ‖ model) is
measured, layer by layer. Their product predicts the KL of a layer at every size; sizes are then raised where a byte
lowers the sum of the predictions most. (That errors of layers add up is an estimate, as in select.py.)

The control is the equal division of the same bytes: both are measured on text that neither pass has seen, and the one
with the smaller KL is written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize import progress
from linearize.checkpoint.budget import cache_of, sized
from linearize.checkpoint.reading import read_json
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.model.mixers import Context, Mixer, build_config
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recovery import reading
from linearize.recovery.parts import write_without
from linearize.recovery.select import measure

LEVELS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Sizes that are tried, in equal shares. Layers of one size decode together, so few sizes are fast."""


class Tried(nn.Module):
    """In the stead of a mixer: returns the source's own attention and sums the error of its mixer at several sizes.

    Args:
        mixers: of the same layer, by size.
    """

    keeps_source_cache = True

    def __init__(self, mixers: dict[int, Mixer]):
        super().__init__()
        self.sizes, self.mixers = list(mixers), nn.ModuleList(mixers.values())
        self.errors = torch.zeros(len(mixers), dtype=torch.float64)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """As of a mixer: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V] -> [B, H, T, V]."""
        target = context.attend(q, k, v)
        errors = [(mixer(q, k, v, context) - target).float().square().sum() for mixer in self.mixers]
        self.errors += torch.stack(errors).double().cpu()
        return target


@torch.inference_mode()
def errors(
    model: PreTrainedModel, ids: Tensor, sizes: list[int], advance: Callable[[], None] = lambda: None
) -> dict[int, list[float]]:
    """The error of each layer's output at several sizes, with the source's own input.

    Args:
        model: linearized, with a mixer whose size can be chosen.
        ids: int64 [blocks, T].
        sizes: the numbers tried.
        advance: called after each block.

    Returns:
        Layer -> sum of squares at each size.
    """
    modules = [m for m in linearized_modules(model) if not m.mixer.keeps_source_cache]
    before = [m.mixer for m in modules]
    for module in modules:
        mixers = {}
        for size in sizes:
            values = module.mixer.config.to_dict() | {_key(module.mixer): size}
            mixers[size] = type(module.mixer)(build_config(values), module.mixer.geometry)
            mixers[size].load_state_dict(module.mixer.state_dict())
            mixers[size].to(ids.device)
        module.mixer = Tried(mixers)
    try:
        for block in ids:
            model(block[None], use_cache=False, logits_to_keep=1)
            advance()
        return {m.layer_idx: m.mixer.errors.tolist() for m in modules}
    finally:
        for module, mixer in zip(modules, before, strict=True):
            module.mixer = mixer


def divide(costs: dict[int, list[float]], sizes: list[int], total: int) -> dict[int, int]:
    """Sizes of the layers whose sum is at most `total`: from the smallest everywhere, always the step that lowers the
    sum of the costs most for what it adds.

    Args:
        costs: layer -> its cost at each size.
        sizes: ascending.
        total: of all layers.

    Returns:
        Layer -> its size.
    """
    at = dict.fromkeys(costs, 0)
    left = total - len(costs) * sizes[0]
    while True:
        steps = [
            ((costs[layer][now] - costs[layer][to]) / (sizes[to] - sizes[now]), layer, to)
            for layer, now in at.items()
            for to in range(now + 1, len(sizes))
            if sizes[to] - sizes[now] <= left
        ]
        if not steps or max(steps)[0] <= 0:
            return {layer: sizes[index] for layer, index in at.items()}
        _, layer, to = max(steps)
        left -= sizes[to] - sizes[at[layer]]
        at[layer] = to


def choose(model: PreTrainedModel, ids: Tensor, cache: str | int) -> dict[str, Any]:
    """Divide a budget, and compare the division with the equal one; the model keeps the better.

    Args:
        model: linearized, one mixer in all its linearized layers.
        ids: int64 [blocks, T], at least two; the last quarter of them is held back for the comparison.
        cache: bytes of cache of one row, or text such as ``8MiB``.

    Returns:
        JSON-safe. key: the number that was chosen; equal: its equal share; sizes: layer -> number; kl: of both
        divisions on the text held back; cache: bytes of both; better: allocated | equal; curves: of each layer
        `layer`, and its predicted `kl` at each of `tried`; budgets: for each total, `cache` in bytes and the predicted
        KL of both.

    Raises:
        InputError: no size can be chosen, layers have different mixers, or there is one block alone.
    """
    modules = {m.layer_idx: m for m in linearized_modules(model) if not m.mixer.keeps_source_cache}
    kinds = {json.dumps({**m.mixer.config.to_dict(), _key(m.mixer): 0}) for m in modules.values()}
    if len(kinds) != 1:
        raise InputError("allocate: the linearized layers have different mixers; a budget is divided over alike ones")
    if len(ids) < 2:
        raise InputError(f"allocate: found {len(ids)} block of text; two or more are needed, one to compare on")
    first = next(iter(modules.values())).mixer
    key, step = _key(first), first.config.sized[1]
    values = first.config.to_dict()
    del values[key]
    equal = sized(model.config, values, cache)[key]
    sizes = sorted({max(first.config.least, round(equal * level / step) * step) for level in LEVELS} | {equal})
    layers = sorted(modules)
    linearize_(model, build_config({**values, key: equal}), layers)
    held = max(len(ids) // 4, 1)
    read, other = ids[:-held], ids[-held:]
    with progress.step_progress(f"{len(sizes)} sizes of each layer", len(read)) as advance:
        seen = errors(model, read, sizes, advance)
    _, kl = measure(model, read[:2], [[layer] for layer in layers], about="layers, one at a time")
    alone = dict(zip(layers, kl.tolist(), strict=True))
    share = sizes.index(equal)
    costs = {i: [alone[i] * error / max(seen[i][share], 1e-30) for error in seen[i]] for i in layers}
    chosen = divide(costs, sizes, equal * len(layers))
    divisions = {"equal": dict.fromkeys(layers, equal), "allocated": chosen}
    kls, caches = {}, {}
    for name, division in divisions.items():
        _resize(model, values, key, division)
        kls[name] = float(measure(model, other, [layers], about=name)[1][0])
        caches[name] = cache_of(model.config, model.config.linearize["layers"])
    better = min(kls, key=lambda name: kls[name])
    _resize(model, values, key, divisions[better])
    return {
        "key": key, "equal": equal, "sizes": {str(i): size for i, size in divisions[better].items()}, "kl": kls,
        "cache": caches, "better": better, "tried": sizes,
        "curves": [{"layer": i, "kl": costs[i]} for i in layers],
        "budgets": [
            {"share": size, "equal": sum(costs[i][index] for i in layers), "allocated": _predicted(costs, sizes, size)}
            for index, size in enumerate(sizes)
        ],
    }  # fmt: skip


def _key(mixer: Mixer) -> str:
    """The number that decides the size of a mixer's state."""
    if mixer.config.sized is None:
        raise InputError(f"allocate: the state of {mixer.name} has a fixed size, so there is nothing to divide")
    return mixer.config.sized[0]


def _predicted(costs: dict[int, list[float]], sizes: list[int], share: int) -> float:
    chosen = divide(costs, sizes, share * len(costs))
    return sum(costs[layer][sizes.index(size)] for layer, size in chosen.items())


def _resize(model: PreTrainedModel, values: dict[str, Any], key: str, division: dict[int, int]) -> None:
    for size in set(division.values()):
        linearize_(model, {**values, key: size}, [layer for layer, own in division.items() if own == size])


def allocate(
    model_dir: str | Path,
    wanted: recipes.Recipe,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """Divide a budget of cache over the layers of a converted folder, on the recipe's data.

    Args:
        model_dir: a converted folder, not calibrated yet; it must not hold adapters.
        wanted: the recipe that names the data.
        out: folder to appear, every tensor byte for byte; None: only measure.
        overwrite: replace a model folder in the place of `out`.
        **given: cache, tokens, seq_len: bytes of cache, on how much text, in blocks of how many tokens. None, or left
            out: as the recipe's `allocate` says; without a budget, the bytes that the folder has now.

    Returns:
        What `choose` returns, with tokens and seq_len.

    Raises:
        InputError: bad input; see `choose`.

    Example:
        >>> allocate("runs/best/0-converted", recipe.load("smollm2-135m-best"), tokens=1024, seq_len=256)["kl"]
    """
    folder = Path(model_dir)

    def pick(model: Any, ids: Tensor, settings: Any) -> dict[str, Any]:
        if any(module.mixer.gate is not None for module in linearized_modules(model) if module.mixer.weighted):
            raise InputError(f"{folder}: is calibrated for the sizes it has; allocate first, then calibrate")
        return choose(model, ids, settings.cache or cache_of(model.config, model.config.linearize["layers"]))

    def write(model: Any, choice: dict[str, Any], work: Path) -> dict[str, str | None]:
        hashes = write_without(folder, work, [])
        config = read_json(work / "config.json")
        config["linearize"]["layers"] = model.config.linearize["layers"]
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return hashes

    return reading.chosen(folder, wanted, out, overwrite, ("allocate", "allocation"), given, pick, write)
