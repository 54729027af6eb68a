"""What each mixer is, and what it costs in a model: bytes of state, operations per token, new weights.

Operations are counted, not estimated: one decoding step of the mixer runs on zeros of the model's shapes, and every
multiplication and addition of its matrix products is counted, and one operation per number that anything else computes.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

from linearize.checkpoint import sources
from linearize.conversion import plan
from linearize.formats import format_bytes
from linearize.model import architectures, ops
from linearize.model.cache import cache_layer
from linearize.model.mixers import MIXERS, Context, Geometry, Mixer, build_config
from linearize.model.ops import fla_backend
from linearize.model.ops.window import slot_attention
from linearize.recipe.schema import Recipe, own_size

CONTEXT = 8192
"""Tokens in the source's cache that a mixer is compared with."""
ELEMENT = 2
"""Bytes of a cached key or value element: models are served in 16 bits."""
EVIDENCE = Path(__file__).with_name("evidence.json")

# --- what they are


def describe() -> dict[str, dict[str, Any]]:
    """Every mixer.

    Returns:
        JSON-safe, by name: about; rule, the update; papers, arXiv ids; state, of a layer; combine, the ways that are
        possible; backends, what can run its blocks on this machine; defaults of its settings; evidence, whether it
        beats the window control: its perplexity, the control's, the change from the control's (below 0 is better) and
        the committed result that says so, or None where nothing was measured (scripts/mixer_evidence.py).
    """
    evidence = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    rows = {}
    for name, mixer in MIXERS.items():
        settings = mixer.Config(name=name).to_dict()
        del settings["name"]
        rows[name] = {
            "about": mixer.summary,
            "rule": mixer.rule,
            "papers": list(mixer.papers),
            "state": mixer.state,
            "combine": list(mixer.combines),
            "backends": ["torch", "fla"] if _kernels_run_here() and _has_kernels(name) else ["torch"],
            "defaults": settings,
            "evidence": evidence.get(name),
        }
    return rows


def mixers_table(rows: dict[str, dict[str, Any]]) -> Table:
    """What `describe` returns, without rules, states and settings, as a rich table."""
    keys = ("mixer", "what it is", "arXiv", "perplexity beside\nthe window control")
    grid = _grid(
        keys, ((name, row["about"], "\n".join(row["papers"]), _evidence(name, row)) for name, row in rows.items())
    )
    grid.caption = "As measured on SmolLM2-135M; below 0 is better. --json names the results and the update rules."
    grid.caption_justify = "left"
    return grid


def _evidence(name: str, row: dict[str, Any]) -> str:
    evidence = row["evidence"]
    if evidence is None:
        return "not measured" if MIXERS[name].recurrent else "a control"
    change = f"{evidence['change']:+.1%}: {evidence['perplexity']:.2f} for {evidence['window']:.2f}"
    return f"{change}, {evidence['result'].partition(':')[0]}"


def _grid(keys: Iterable[str], rows: Iterable[Iterable[str]], numbers: bool = False) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, key in enumerate(keys):
        grid.add_column(key, justify="right" if numbers and index else "left")
    for row in rows:
        grid.add_row(*(Text(cell, overflow="fold") for cell in row))
    return grid


def _kernels_run_here() -> bool:
    if not torch.cuda.is_available() or fla_backend.missing():
        return False
    return fla_backend.unsound(torch.device("cuda")) is None


def _has_kernels(name: str) -> bool:
    mixer = make(name, {"combine": "none"}, Geometry(1, 1, 16, 16))
    x = torch.zeros(1, 1, 2, 16)
    return ops.has_kernels(lambda: mixer(x, x, x, context(x)))


# --- what they cost


def costs(recipe: Recipe) -> dict[str, Any]:
    """What every mixer would cost in the layers that a recipe replaces, for one row of tokens.

    Args:
        recipe: names the source and the layers; its window, sinks and combine serve for all mixers that know them.

    Returns:
        JSON-safe: source, layers (how many are replaced), geometry, context, softmax (state_bytes and flops of the
        source's attention after `context` tokens), and by mixer state_bytes, flops and new_weights: bytes of slots in
        16 bits and fp32 state, operations per decoded token, both of all replaced layers. Operations of projections and
        RoPE, which a conversion keeps, are in neither.

    Raises:
        InputError: the source cannot be found or read, or its architecture is unsupported. Weights are not read.
    """
    located = sources.locate(recipe.source.id, recipe.source.revision, package=recipe.source.package)
    layers = len(plan.plan(located, recipe).layers)
    geometry = architectures.geometry(sources.read_config(located))
    kept = CONTEXT * geometry.kv_heads * (geometry.key_width + geometry.value_width) * ELEMENT
    rows = {}
    for name, cls in MIXERS.items():
        if not (cls.recurrent or name == "window"):
            continue
        mixer = make(name, recipe.convert.mixer, geometry)
        rows[name] = {
            "state_bytes": layers * mixer.state_bytes(1, ELEMENT),
            "flops": layers * step_flops(mixer),
            "new_weights": layers * sum(p.numel() for p in mixer.parameters()),
        }
    return {
        "source": located.id,
        "layers": layers,
        "geometry": {key: value for key, value in vars(geometry).items() if key != "missing"},
        "context": CONTEXT,
        "softmax": {"state_bytes": layers * kept, "flops": layers * attention_flops(geometry, CONTEXT)},
        "mixers": rows,
    }


def _cost_rows(priced: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    whole = priced["softmax"]
    yield "mixer", "state", "of source", "MFLOP/token", "of source", "new weights"
    yield f"source at {CONTEXT // 1024}K", format_bytes(whole["state_bytes"]), "", f"{whole['flops'] / 1e6:.2f}", "", ""
    for name, row in priced["mixers"].items():
        shares = (f"{row[key] / whole[key]:.1%}" for key in ("state_bytes", "flops"))
        state, flops = format_bytes(row["state_bytes"]), f"{row['flops'] / 1e6:.2f}"
        yield name, state, next(shares), flops, next(shares), f"{row['new_weights']:,}"


def _heading(priced: dict[str, Any]) -> str:
    g = priced["geometry"]
    return (
        f"{priced['source']}: {priced['layers']} layers replaced, {g['heads']} query heads, {g['kv_heads']} key heads "
        f"of {g['key_width']}; one row, slots in 16 bits, states in 32"
    )


def costs_table(priced: dict[str, Any]) -> Table:
    """What `costs` returns, as a rich table."""
    keys, *rows = _cost_rows(priced)
    grid = _grid(keys, rows, numbers=True)
    grid.title, grid.title_justify = Text(_heading(priced)), "left"
    return grid


def make(name: str, settings: dict[str, Any], geometry: Geometry) -> Mixer:
    """A mixer of settings that may be another's.

    Args:
        name: which mixer.
        settings: of a recipe's mixer. They count as a whole where they name this one, else window, sinks and combine,
            beside the size that recipes without a mixer take.
        geometry: all heads of the layer.
    """
    cls = MIXERS[name]
    settings = {key: value for key, value in settings.items() if key != "softmax_heads"}
    if settings.get("name") != name:
        settings = own_size(name) | {key: settings[key] for key in ("combine", "window", "sinks") if key in settings}
    if settings.get("combine") not in cls.combines:
        settings = {key: value for key, value in settings.items() if key != "combine"}
    return cls(build_config({**settings, "name": name}), geometry)


def context(like: Tensor, cache: DynamicCache | None = None) -> Context:
    """Surroundings without a model: queries like `like` [..., K], no RoPE."""
    return Context(
        layer_idx=0, scaling=like.shape[-1] ** -0.5, softcap=None, extra=None, unrotate=lambda x: x.float(), rows=None,
        cache=cache, branch="all", attend=lambda q, k, v: v,
    )  # fmt: skip


def decoder(mixer: Mixer, like: Tensor, batch: int = 1) -> Callable[[], Tensor]:
    """What decodes one more token of zeros, with a cache of its own.

    Args:
        mixer: of the layer.
        like: a tensor of the dtype and device to use.
        batch: rows.
    """
    g = mixer.geometry
    q, k, v = (
        like.new_zeros(batch, heads, 1, width)
        for heads, width in ((g.heads, g.key_width), (g.kv_heads, g.key_width), (g.kv_heads, g.value_width))
    )
    past = DynamicCache()
    layer = cache_layer(past, 0, mixer.config.window, mixer.config.sinks)
    layer.lazy_initialization(batch, k, mixer.token_shape, mixer.stored_state(batch, k.device))
    return lambda: mixer(q, k, v, context(q, past))


def step_flops(mixer: Mixer) -> int:
    """Operations of one layer for one decoded token: window, update and reading of the state."""
    return operations(decoder(mixer, torch.zeros(())))


def attention_flops(geometry: Geometry, tokens: int) -> int:
    """Operations of one layer of the source's attention for one decoded token after `tokens` others."""
    g = geometry
    q, k = torch.zeros(1, g.heads, 1, g.key_width), torch.zeros(g.kv_heads, g.key_width, tokens)
    v, bias = torch.zeros(g.kv_heads, tokens, g.value_width), torch.zeros(g.kv_heads, 1, tokens)
    return operations(lambda: slot_attention(q, k, v, bias, scaling=g.key_width**-0.5))


def operations(call: Callable[[], Any]) -> int:
    """Operations on floating-point numbers that `call` does: those of its products, and one per number else."""
    in_place = {torch.ops.aten.baddbmm_: lambda added, a, b, **_: 2 * math.prod(a) * b[-1]}  # torch has no formula
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as products, _Elementwise() as others:
        call()
    return products.get_total_flops() + others.total


class _Elementwise(TorchDispatchMode):
    # FlopCounterMode counts products only, and a channel-wise recurrence has none: here every number that anything else
    # computes counts one, and for a reduction every number that it takes. Moving numbers is free.
    also = ("_softmax", "cumsum", "cummax", "logcumsumexp")

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made, name = out[0] if isinstance(out, tuple) else out, func.overloadpacket.__name__
        if isinstance(made, Tensor) and (made.is_floating_point() or made.is_complex()):
            if torch.Tag.reduction in func.tags:
                self.total += args[0].numel()
            elif name in self.also or (torch.Tag.pointwise in func.tags and name != "clone"):
                self.total += made.numel()
        return out
