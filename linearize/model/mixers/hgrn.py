"""Hierarchically gated recurrence (HGRN, arXiv 2311.04823), its real form.

k and q are those before RoPE. γ is the paper's lower bound, below which no channel forgets, near 1 in the layers that
look far. n is the weight that h has in all (mixers/channels.py); the paper, which learns γ, has none.
"""

from dataclasses import dataclass

from ..mixers import base, channels
from ..ops.gates import forget


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    half_life: in tokens, of a channel that forgets as fast as it may: γ = 2^(−1 / half_life).
    """

    positive = ("half_life",)
    half_life: float = 4096.0


class Mixer(channels.Mean):
    name = "hgrn"
    summary = "Hierarchically gated recurrence, its real form"
    rule = (
        "h_t = f_t ∘ h_{t-1} + (1 − f_t) ∘ v_t,  f_t = γ + (1 − γ) σ(k_t) per channel,  y_t = σ(q_t) ∘ h_t / n_t,  "
        "n_t = f_t ∘ n_{t-1} + 1 − f_t"
    )
    papers = ("2311.04823",)
    state = "8·G·V bytes"
    Config = Config

    def gates(self, k):
        return forget(self.to_values(k), lower=2 ** (-1 / self.config.half_life))
