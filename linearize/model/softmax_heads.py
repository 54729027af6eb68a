"""Heads that stay softmax inside a linearized layer.

Some key/value heads, with their query heads, keep the source's attention over all tokens and a cache that grows; the
mixer has the others, as if the layer had no more than those.

Few heads of a model look far back, and they are spread over its layers (RecurFormer, arXiv 2410.12850; DuoAttention,
arXiv 2410.10819).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .cache import LinearizedCacheLayer, cache_layer
from .mixers.base import Context
from .ops.causal import causal_attention
from .ops.rows import Rows, in_parts
from .tokens import Geometry


def others(geometry: Geometry, kept: Sequence[int], whole: bool = True) -> Geometry:
    """The shapes of a layer without the heads that stay softmax.

    Args:
        geometry: of the whole layer.
        kept: key/value heads that stay softmax.
        whole: whether the source's attention sees the whole text there.

    Raises:
        InputError: an index that no key/value head has, or none is left for the mixer; or a sliding window.
    """
    if kept and not whole:
        raise InputError(
            "mixer.softmax_heads: the source's attention slides a window in a layer of these, so there is no cache of "
            "all tokens to keep; name layers whose attention sees the whole text (layers: full)"
        )
    G = geometry.kv_heads
    if any(g >= G for g in kept) or len(kept) == G:
        raise InputError(
            f"mixer.softmax_heads: found {list(kept)}; the layer has {G} key/value heads, so indices from 0 to {G - 1} "
            "are possible, and one head at least must be left for the mixer (where all stay softmax, leave the layer "
            "out)"
        )
    left = G - len(kept)
    return replace(geometry, heads=geometry.heads // G * left, kv_heads=left, missing=tuple(kept))


@lru_cache
def _order(kept: tuple[int, ...], groups: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the kept heads, of the others, and what puts the two, joined, back into order."""
    rest = [g for g in range(groups) if g not in kept]
    heads = torch.tensor([*kept, *rest], device=device)
    return heads[: len(kept)], heads[len(kept) :], heads.argsort()


def pick(x: Tensor, groups: int, index: Tensor) -> Tensor:
    """The entries of some groups.

    Args:
        x: [B, n·groups, ...].
        groups: how many.
        index: int64 [m], which.

    Returns:
        [B, n·m, ...].
    """
    return x.unflatten(1, (groups, -1)).index_select(1, index).flatten(1, 2)


def run(mixer: Any, kept: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """A layer's attention.

    Args:
        mixer: of the other heads, or what is called instead of it.
        kept: key/value heads that stay softmax.
        q: [B, H, T, K], as the source made it.
        k: [B, G, T, K].
        v: [B, G, T, V].
        context: of the whole layer.

    Returns:
        y [B, H, T, V].
    """
    if not kept:
        return mixer(q, k, v, context)
    G = k.shape[1]
    own, rest, order = _order(kept, G, q.device)

    def part(index: Tensor) -> tuple[list[Tensor], Context]:
        extra = None if context.extra is None else pick(context.extra[None], G, index)[0]
        # The source knows all of its heads, and no fewer.
        inside = replace(context, extra=extra, attend=lambda *_: pick(context.attend(q, k, v), G, index))
        return [pick(x, G, index) for x in (q, k, v)], inside

    heads, inside = part(own)
    rows, layer = context.rows, None
    if context.cache is not None:
        layer = cache_layer(context.cache, context.layer_idx, mixer.window, mixer.sinks, True, mixer.late)
        layer.check_start(rows)

    def exact(some: Rows | None, layer: LinearizedCacheLayer | None) -> Tensor:
        qs, ks, vs = heads if some is None else (some.gather(x) for x in heads)
        x, widths = torch.cat([ks, vs], -1), (ks.shape[-1], vs.shape[-1])
        seen = layer.tensors["count"] if layer is not None and layer.is_initialized else 0
        ks, vs = (x if layer is None else layer.grow(x)).split(widths, -1)
        numbers = {"scaling": context.scaling, "softcap": context.softcap, "extra": inside.extra}
        y = causal_attention(qs, ks, vs, seen=seen, **numbers)
        return y if some is None else some.scatter(y)

    y = in_parts(rows, layer, exact)
    # Behind it: this counts the new tokens.
    arguments, inside = part(rest)
    parts = [each.unflatten(1, (len(index), -1)) for each, index in ((y, own), (mixer(*arguments, inside), rest))]
    return torch.cat(parts, 1).index_select(1, order).flatten(1, 2)
