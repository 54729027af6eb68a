"""Softmax over clusters of keys: what has left the window is merged into M means, so nothing is dropped and the cache
stays constant. A memory for recall: clusters of keys as in SubGen (arXiv 2402.06082), merged as in ToMe (2210.09461).

Cluster m of n_m tokens is seen as n_m tokens with its mean key and mean value. The rule of merging is in
ops/clusters.py.

Not a linear recurrence: constant memory and time per token like one, but its state is a set of clusters with a softmax
over them, as in gated slot attention. It is the source itself while no more than M tokens have left the window, and
needs no training to be near it. Keys and queries are those that the source rotates, with its scale and its soft cap;
nothing fades with age. Honest control: a window that is M tokens longer, which costs the same bytes in fp32 and half of
them in 16 bits. state_dtype keeps the means in fewer bits, so that the same bytes hold more clusters. int4, which no
other mixer has, answers more pairs than int8 and copies less exactly.

combine: memory: shares the window's normaliser with log weight ln Σ_m e^{a_m + ln n_m} + strength. liger and none: as
it is.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..mixers import base
from ..ops import clusters as ops
from ..ops import compact


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    clusters: M.
    chunk: C, how many are merged away at a time; the fewer, the better the choice and the more often it is made; 0 for
        an eighth of M.
    mass: γ, how much of a cluster's spread is added to its weight; see ops/clusters.py.
    expected: α, how much the attention that a cluster is expected to get decides what is merged. 0 by measurement: it
        loses the facts that nobody has asked for yet (eval/results: exact-store.md against bench-memory.md).
    strength: added to the log weight of the memory in the normaliser that it shares with the window.
    """

    sized = ("clusters", 8)
    least = 16
    dtypes = (*base.MixerConfig.dtypes, "int4")
    older = {**base.MixerConfig.older, "mass": 0.0}
    clusters: int = 128
    chunk: int = 0
    mass: float = 0.3
    expected: float = 0.0
    strength: float = 0.0

    def problems(self):
        problems = super().problems()
        if self.chunk < 0:
            problems.append(f"chunk: found {self.chunk}; expected at least 1, or 0 for an eighth of the clusters")
        if self.clusters < max(2 * self.chunk, 8):
            expected = f"2 x chunk = {2 * self.chunk}" if self.chunk > 3 else "8"
            problems.append(f"clusters: found {self.clusters}; expected at least {expected}")
        return problems


class Mixer(base.Mixer):
    name = "clusters"
    summary = "Softmax over clusters of keys: what has left the window is merged into M means, nothing is dropped"
    rule = "y_t = Σ_m p_m v̄_m,  p = softmax_m(a(q_t, k̄_m) + ln n_m + γ c_m)"
    papers = ("2402.06082", "2210.09461")
    state = "G·(M·(b·(K + V) + 8) + 4·(2K + 1)) bytes, b = 4, 2, 1 + 4/(K + V), or ⅝ + 4/(K + V) with 4·G·(K + V) more"
    Config = Config
    rounds_itself = True

    def __init__(self, config: Any, geometry):
        super().__init__(config, geometry)
        calibrated = config.calibrated and self.delayed and config.mass > 0  # without, as in older folders
        self.mass = nn.Parameter(torch.full((geometry.heads,), config.mass)) if calibrated else None

    @property
    def weighted(self):
        return self.config.combine == "memory"

    @property
    def _rule(self) -> ops.Rule:
        config: Any = self.config
        mass, heads = config.mass if self.mass is None else self.mass, self.geometry.heads // self.geometry.kv_heads
        return ops.Rule(config.chunk or config.clusters // 8, mass, config.expected, heads)

    def _reading(self, context) -> ops.Rule:
        return replace(self._rule, scaling=context.scaling, softcap=context.softcap)

    def updates(self, tokens):
        return tokens.k.float(), tokens.v.float(), tokens.present.float()

    def scan(self, query, updates: Any, state: Any, context):
        k, v, exists = updates
        rule = self._reading(context)
        y, weight, state = ops.run(query, k, v, exists, state, rule, taken=context.taken, whole=context.whole)
        return y, weight + self.config.strength if self.weighted else None, state

    def update_state(self, updates: Any, state: Any):
        k, v, exists = updates
        ops.update_state(k, v, exists, state, self._rule)

    def read_state(self, query, state: Any, context):
        y, weight = ops.read_state(query, state, self._reading(context))
        return self.joined(y, weight + self.config.strength if self.weighted else None)

    def initial_state(self, batch, device):
        g = self.geometry
        dtype = compact.DTYPES[self.config.state_dtype]
        return ops.initial_state(batch, g.kv_heads, g.key_width, g.value_width, self.config.clusters, device, dtype)

    def content(self, state):
        return ops.opened(state)[..., self.geometry.key_width :]
