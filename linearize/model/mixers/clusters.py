"""Softmax over clusters of keys: what has left the window is merged into M means, so nothing is dropped and the cache
stays constant. A memory for recall: clusters of keys as in SubGen (arXiv 2402.06082), merged as in ToMe (2210.09461).

Cluster m of n_m tokens is seen as n_m tokens with its mean key and mean value. The rule of merging is in
ops/clusters.py.

Not a linear recurrence: constant memory and time per token like one, but its state is a set of clusters with a softmax
over them, as in gated slot attention. It is the source itself while no more than M tokens have left the window, and
needs no training to be near it. Keys and queries are those that the source rotates, with its scale and its soft cap;
nothing fades with age. Honest control: a window that is M tokens longer, which costs the same bytes in fp32 and half of
them in 16 bits, as clusters are always kept in fp32.

combine: memory: shares the window's normaliser with log weight ln Σ_m e^{a_m + ln n_m} + strength. liger and none: as
it is.
"""

from dataclasses import dataclass
from typing import Any

from ..mixers import base
from ..ops import clusters as ops


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    clusters: M.
    chunk: C, how many are merged away at a time; the fewer, the better the choice and the more often it is made.
    strength: added to the log weight of the memory in the normaliser that it shares with the window.
    """

    positive = ("chunk",)
    clusters: int = 128
    chunk: int = 16
    strength: float = 0.0

    def problems(self):
        problems = super().problems()
        if self.clusters < 2 * self.chunk:
            problems.append(f"clusters: found {self.clusters}; expected at least 2 x chunk = {2 * self.chunk}")
        return problems


class Mixer(base.Mixer):
    name = "clusters"
    summary = "Softmax over clusters of keys: what has left the window is merged into M means, nothing is dropped"
    rule = "y_t = Σ_m p_m v̄_m,  p = softmax_m(a(q_t, k̄_m) + ln n_m)"
    papers = ("2402.06082", "2210.09461")
    state = "4·G·(M·(K + V + 1) + K + 1) bytes"
    Config = Config

    @property
    def weighted(self):
        return self.config.combine == "memory"

    def updates(self, tokens):
        return tokens.k.float(), tokens.v.float(), tokens.present.float()

    def scan(self, query, updates: Any, state: Any, context):
        k, v, exists = updates
        y, weight, state = ops.run(
            query, k, v, exists, state, chunk=self.config.chunk, scaling=context.scaling, softcap=context.softcap
        )
        return y, weight + self.config.strength if self.weighted else None, state

    def update_state(self, updates: Any, state: Any):
        k, v, exists = updates
        ops.update_state(k, v, exists, state, chunk=self.config.chunk)

    def read_state(self, query, state: Any, context):
        y, weight = ops.read_state(query, state, scaling=context.scaling, softcap=context.softcap)
        return self.joined(y, weight + self.config.strength if self.weighted else None)

    def initial_state(self, batch, device):
        g = self.geometry
        return ops.initial_state(batch, g.kv_heads, g.key_width, g.value_width, self.config.clusters, device)

    def content(self, state):
        return state[1]
