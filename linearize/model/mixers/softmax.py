"""Control: the source's own attention, routed through the converted layer. Must reproduce the source exactly.

y_t = Σ_{j ≤ t} softmax(a_t)_j v_j. Cache: the source's growing one. No new weights.
"""

from dataclasses import dataclass

from torch import Tensor

from ..mixers import base, window


@dataclass(frozen=True)
class Config(window.Config):
    def problems(self):
        found = ["softmax_heads: all heads stay softmax here; leave it out"] if self.softmax_heads else []
        return super().problems() + found


class Mixer(base.Mixer):
    name = "softmax"
    Config = Config
    combines = ("none",)
    recurrent = False

    def slots(self):
        return {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: base.Context) -> Tensor:
        if context.cache is not None:
            k, v = context.cache.update(k, v, context.layer_idx)
        return context.attend(q, k, v)
