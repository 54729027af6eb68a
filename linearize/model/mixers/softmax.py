"""Control: the source's own attention, routed through the converted layer. Must reproduce the source exactly."""

from dataclasses import dataclass

from torch import Tensor

from ..mixers import base, window


@dataclass(frozen=True)
class Config(window.Config):
    def problems(self):
        problems = ["softmax_heads: all heads stay softmax here; leave it out"] if self.softmax_heads else []
        return super().problems() + problems


class Mixer(base.Mixer):
    name = "softmax"
    summary = "Control: the source's own attention, routed through the converted layer"
    rule = "y_t = Σ_{j ≤ t} softmax(a_t)_j v_j"
    papers = ()
    state = "the source's growing cache"
    Config = Config
    combines = ("none",)
    recurrent = False
    keeps_source_cache = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: base.Context) -> Tensor:
        if context.cache is not None:
            k, v = context.cache.update(k, v, context.layer_idx)
        return context.attend(q, k, v)
