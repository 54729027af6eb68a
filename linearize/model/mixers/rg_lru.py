"""The real-gated linear recurrent unit (Griffin, arXiv 2402.19427; RecurrentGemma).

The paper has a projection for each of r and i, and here both are the pretrained key's, before RoPE. Its base a (there
learned, to the power 8) is 2^{−1/half_life}. The root keeps the variance: of values without a mean, h has at most their
size, from few tokens or many.
"""

import math
from dataclasses import dataclass

import torch

from ..mixers import base, channels


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    half_life: in tokens, where the gate is open; no channel's is shorter.
    """

    positive = ("half_life",)
    half_life: float = 8192.0


class Mixer(channels.Mixer):
    name = "rg_lru"
    summary = "The real-gated linear recurrent unit"
    rule = (
        "h_t = a_t ∘ h_{t-1} + √(1 − a_t²) ∘ (i_t ∘ v_t),  a_t = a^{r_t},  r_t = i_t = σ(k_t) per channel,  "
        "y_t = σ(q_t) ∘ h_t"
    )
    papers = ("2402.19427",)
    state = "4·G·V bytes"
    Config = Config

    def gates(self, k):
        gate = self.to_values(k).sigmoid()
        log_decay = gate * (-math.log(2) / self.config.half_life)
        # The root has no gradient at 0, which a gate reaches in fp32 at −104.
        left = (-torch.expm1(2 * log_decay)).clamp(min=torch.finfo(k.dtype).tiny)
        return log_decay, left.sqrt() * gate
