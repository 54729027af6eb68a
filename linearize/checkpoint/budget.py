"""A cache of so many bytes, in the place of a number of clusters."""

from copy import copy
from typing import Any

from transformers import PreTrainedConfig

from linearize.errors import InputError
from linearize.formats import format_bytes, parse_bytes
from linearize.model.mixers import MIXERS, build_config
from linearize.model.sizes import state_bytes, text_sizes


def sized(config: PreTrainedConfig, mixer: dict[str, Any], cache: str | int) -> dict[str, Any]:
    """Settings of a mixer with which the linearized layers' cache of one row fills a budget.

    Args:
        config: of a linearized model; its `linearize` block names the layers.
        mixer: name and settings; the number that decides the size of the state is left out.
        cache: bytes, or text such as ``8MiB``: of all linearized layers together, tokens in 16 bits, as everywhere in
            what is printed.

    Returns:
        `mixer` with that number, the largest that fits.

    Raises:
        InputError: no such number, none that fits, or more than the source's own cache of its longest context.
    """
    block: Any = config.linearize  # type: ignore[attr-defined]
    budget, cls = parse_bytes(cache), MIXERS[mixer["name"]].Config
    where = f"convert.cache: found {cache}"
    if cls.sized is None:
        able = ", ".join(name for name, each in MIXERS.items() if each.Config.sized)
        raise InputError(
            f"{where}; the state of {mixer['name']} has a fixed size: leave convert.cache out, or take a mixer whose "
            f"size can be chosen ({able})"
        )
    key, step = cls.sized
    if key in mixer:
        raise InputError(f"{where} beside convert.mixer.{key} {mixer[key]}: both decide the same; keep one of them")
    context = text_sizes(config).context or 131072
    # Before the mixer is checked for its number, the other settings have to be right.
    build_config(mixer)

    def size(number: int) -> int:
        values = build_config({**mixer, key: number * step}).to_dict()
        return cache_of(config, dict.fromkeys(block["layers"], values))

    source = cache_of(config, None)
    if budget > source:
        raise InputError(
            f"{where}, which is more than the source's own cache of these layers at its longest context "
            f"({format_bytes(source)} at {context:,} tokens); it saves nothing: choose less"
        )
    least = cls.least // step
    if size(least) > budget:
        raise InputError(
            f"{where}; window, sinks and the smallest state ({key}: {least * step}) of {len(block['layers'])} "
            f"layers take {format_bytes(size(least))}: choose at least that, or a smaller window"
        )
    low, high = least, 2 * least
    while size(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return {**mixer, key: low * step}


def cache_of(config: PreTrainedConfig, layers: dict[str, Any] | None) -> int:
    """Bytes of cache of one row of the longest context, in the linearized layers alone.

    Args:
        config: of a linearized model, whose block names the layers.
        layers: settings of the mixer of each; None: as in the source.
    """
    changed: Any = copy(config)
    own = [int(layer) for layer in changed.linearize["layers"]]
    changed.linearize = {**changed.linearize, "layers": layers or {}}
    sizes = state_bytes(changed, text_sizes(config).context or 131072)["per_layer"]
    return sum(sizes[layer] for layer in own)
