"""The mixers that a user can name, one file each."""

import reprlib
from dataclasses import MISSING, fields
from importlib import import_module
from math import isfinite
from typing import Any

from ...errors import InputError, suggest
from .base import Context, Geometry, Mixer, MixerConfig

NAMES = (
    "softmax", "window", "linear", "hedgehog", "gla", "hgrn2", "gsa", "retnet", "mamba2", "lightnet", "gateloop",
    "rwkv6", "rwkv7", "clusters", "delta_net", "gated_deltanet", "gated_deltanet2", "kda", "pkda", "rg_lru", "hgrn",
    "min_gru", "min_lstm", "lru", "aaren",
)  # fmt: skip
MIXERS: dict[str, type[Mixer]] = {name: import_module(f"{__name__}.{name}").Mixer for name in NAMES}

LARGEST = 2**31 - 1
"""Of every number in a configuration: larger ones are no sizes of anything."""

__all__ = ["MIXERS", "Context", "Geometry", "Mixer", "MixerConfig", "build_config", "read_config"]


def build_config(values: dict[str, Any]) -> MixerConfig:
    """The checked configuration of the mixer that `values["name"]` names; what is not given has its default.

    Raises:
        InputError: one paragraph that lists every problem: unknown name, unknown key, wrong type, value out of range.
    """
    name = values.get("name")
    if not isinstance(name, str) or name not in MIXERS:
        raise InputError(
            f"mixer.name: unknown mixer {_short(name)}. {suggest(name[:80] if isinstance(name, str) else '', MIXERS)}"
        )
    cls = MIXERS[name].Config
    known = {f.name: f for f in fields(cls)}
    strangers = [k[:80] if isinstance(k, str) else _short(k) for k in values if k not in known]
    problems = [f"mixer.{key}: unknown key. {suggest(key, known)}" for key in strangers]
    good = {}
    for key, value in values.items():
        if key not in known:
            continue
        expected = type(known[key].default) if known[key].default is not MISSING else str
        if isinstance(value, int) and abs(value) > LARGEST or isinstance(value, float) and not isfinite(value):
            problems.append(f"mixer.{key}: found {_short(value)}; expected a number between -{LARGEST} and {LARGEST}")
            continue
        if expected is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if expected is tuple and isinstance(value, list) and all(type(x) is int for x in value):
            value = tuple(value)  # JSON has lists only
        what = "a list of whole numbers" if expected is tuple else expected.__name__
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            problems.append(f"mixer.{key}: found {_short(value)}; expected {what}")
        else:
            good[key] = value
    config = cls(**cls.preset(good.get("combine", cls.combine)) | good)
    problems += [f"mixer.{p}" for p in config.problems()]
    if not MIXERS[name].recurrent and config.state_dtype != "float32":
        problems.append(f"mixer.state_dtype: found {config.state_dtype!r}; {name} has no state; leave it out")
    if config.exact > 0 and not MIXERS[name].addressed:
        kinds = ", ".join(each for each, cls in MIXERS.items() if cls.addressed)
        problems.append(
            f"mixer.exact: found {config.exact}; the state of {name} is not read by key, so nothing says which tokens "
            f"it keeps badly; leave it out, or use one of {kinds}"
        )
    if config.combine not in MIXERS[name].combines:
        problems.append(
            f"mixer.combine: {config.combine!r} is not possible for {name}; allowed: {', '.join(MIXERS[name].combines)}"
        )
    if problems:
        raise InputError("; ".join(problems))
    return config


def read_config(values: dict[str, Any]) -> MixerConfig:
    """The same of what a folder holds, which may be older than some settings."""
    name = values.get("name")
    older = MIXERS[name].Config.older if isinstance(name, str) and name in MIXERS else {}
    return build_config({**older, **values})


def _short(value: Any) -> str:
    """A repr of bearable length, of a configuration that somebody else wrote."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a whole number with more digits than Python writes
        return f"a {type(value).__name__}"
