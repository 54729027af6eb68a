"""What each mixer is, and what it costs in a model: bytes of state, operations per token, new weights.

Operations are counted, not estimated: one decoding step of the mixer runs on zeros of the model's shapes, and every
multiplication and addition of its matrix products is counted, and one operation per number that anything else computes.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.cache_utils import DynamicCache

from linearize.checkpoint import sources
from linearize.conversion import plan
from linearize.formats import format_bytes
from linearize.model import architectures, ops
from linearize.model.cache import cache_layer
from linearize.model.mixers import MIXERS, Context, Geometry, Mixer, build_config
from linearize.model.ops import fla_backend
from linearize.model.ops.window import slot_attention
from linearize.recipe.schema import Recipe

CONTEXT = 8192
"""Tokens in the source's cache that a mixer is compared with."""
ELEMENT = 2
"""Bytes of a cached key or value element: models are served in 16 bits."""

# --- what they are


def describe() -> dict[str, dict[str, Any]]:
    """Every mixer, from the docstring of its file.

    Returns:
        JSON-safe, by name: about; rule, the update; papers, arXiv ids; state, of a layer; combine, the ways that are
        possible; backends, what can run its blocks on this machine; defaults of its settings.
    """
    rows = {}
    for name, mixer in MIXERS.items():
        about, *rest = (" ".join(p.split()) for p in (sys.modules[mixer.__module__].__doc__ or "").split("\n\n"))
        stated = re.search(r"(?:State|Cache)\b.*?(?=\. |\.$|; combine)", " ".join(rest))
        settings = mixer.Config(name=name).to_dict()
        del settings["name"]
        rows[name] = {
            "about": about,
            "rule": rest[0] if rest else "",
            "papers": re.findall(r"\d{4}\.\d{5}", about),
            "state": stated[0] if stated else "",
            "combine": list(mixer.combines),
            "backends": ["torch", "fla"] if _kernels_run_here() and _has_kernels(name) else ["torch"],
            "defaults": settings,
        }
    return rows


def text(rows: dict[str, dict[str, Any]]) -> str:
    """What `describe` found, for a terminal."""
    return "\n".join(
        f"{name}: {row['about']}\n    {row['rule']}\n"
        + (f"    {row['state']}\n" if row["state"] else "")
        + f"    combine: {', '.join(row['combine'])}; backends here: {', '.join(row['backends'])}\n    "
        + ", ".join(f"{key}={value}" for key, value in row["defaults"].items())
        for name, row in rows.items()
    )


def _kernels_run_here() -> bool:
    return torch.cuda.is_available() and fla_backend.missing() is None


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


def table(found: dict[str, Any]) -> str:
    """What `costs` found, for a terminal."""
    whole, g = found["softmax"], found["geometry"]
    lines = [
        f"{found['source']}: {found['layers']} layers replaced, {g['heads']} query heads, {g['kv_heads']} key heads of "
        f"{g['key_width']}; one row, slots in 16 bits, states in 32",
        "",
        f"{'mixer':<15} {'state':>11} {'of source':>10} {'MFLOP/token':>12} {'of source':>10} {'new weights':>12}",
        f"{'source at 8K':<15} {format_bytes(whole['state_bytes']):>11} {'':>10} {whole['flops'] / 1e6:>12.2f}",
    ]
    for name, row in found["mixers"].items():
        lines.append(
            f"{name:<15} {format_bytes(row['state_bytes']):>11} {row['state_bytes'] / whole['state_bytes']:>10.1%} "
            f"{row['flops'] / 1e6:>12.2f} {row['flops'] / whole['flops']:>10.1%} {row['new_weights']:>12,}"
        )
    return "\n".join(lines)


def make(name: str, settings: dict[str, Any], geometry: Geometry) -> Mixer:
    """A mixer of these settings as far as they are its own: all of the one they name, else what every mixer has.
    It gets all heads."""
    cls = MIXERS[name]
    settings = {key: value for key, value in settings.items() if key != "softmax_heads"}
    if settings.get("name") != name:
        settings = {key: settings[key] for key in ("combine", "window", "sinks") if key in settings}
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
    """What decodes one more token of zeros, in the dtype and on the device of `like`, with a cache of its own."""
    g = mixer.geometry
    q, k, v = (
        like.new_zeros(batch, heads, 1, width)
        for heads, width in ((g.heads, g.key_width), (g.kv_heads, g.key_width), (g.kv_heads, g.value_width))
    )
    past = DynamicCache()
    layer = cache_layer(past, 0, mixer.config.window, mixer.config.sinks)
    layer.lazy_initialization(batch, k, mixer.token_shape, mixer.empty_state(batch, k.device))
    return lambda: mixer(q, k, v, context(q, past))


def step_flops(mixer: Mixer) -> int:
    """Operations of one layer for one decoded token: window, write and read."""
    step = decoder(mixer, torch.zeros(()))
    with torch.no_grad(), Operations() as counted:
        step()
    return counted.total


def attention_flops(geometry: Geometry, tokens: int) -> int:
    """Operations of one layer of the source's attention for one decoded token after `tokens` others."""
    g = geometry
    zeros = torch.zeros(1, g.heads, 1, g.key_width), torch.zeros(g.kv_heads, g.key_width, tokens)
    with torch.no_grad(), Operations() as counted:
        slot_attention(
            *zeros, torch.zeros(g.kv_heads, tokens, g.value_width), torch.zeros(g.kv_heads, 1, tokens),
            scaling=g.key_width**-0.5,
        )  # fmt: skip
    return counted.total


class Operations(TorchDispatchMode):
    """Counts operations on floating-point numbers while it is on, in `total`.

    A matrix product counts as torch's FlopCounterMode counts it, which sees nothing else and no product in place; any
    other computation counts one per number that it makes, or for a reduction takes. Moving numbers is free.
    """

    ALSO = ("_softmax", "cumsum", "cummax", "logcumsumexp")

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        made = out[0] if isinstance(out, tuple) else out
        outside = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), None)
        if outside in flop_registry:
            self.total += int(flop_registry[outside](*args, **(kwargs or {}), out_val=out))
        elif isinstance(made, Tensor) and (made.is_floating_point() or made.is_complex()):
            if torch.Tag.reduction in func.tags:
                self.total += args[0].numel()
            elif packet.__name__ in self.ALSO or (torch.Tag.pointwise in func.tags and packet.__name__ != "clone"):
                self.total += made.numel()
        return out
