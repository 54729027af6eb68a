"""Hierarchically gated recurrence (HGRN, arXiv 2311.04823), its real form.

h_t = f_t ∘ h_{t-1} + (1 − f_t) ∘ v_t,  f_t = γ + (1 − γ) σ(k_t) per channel,  y_t = σ(q_t) ∘ h_t / n_t,
n_t = f_t ∘ n_{t-1} + 1 − f_t.

k and q are those before RoPE. γ is the paper's lower bound, below which no channel forgets, near 1 in the layers that
look far. n is the weight that h has in all (mixers/channels.py); the paper, which learns γ, has none.

State per layer: 8·G·V bytes. New weights: 0; combine: memory adds the gate, one number per query head, that starts
closed, and keeps the key before RoPE (K numbers) per token of the window.
"""

from dataclasses import dataclass

from ..mixers import base, channels
from ..ops.gates import forget


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    half_life: in tokens, of a channel that forgets as fast as it may: γ = 2^(−1 / half_life).
    """

    half_life: float = 4096.0

    def problems(self) -> list[str]:
        found = super().problems()
        if self.half_life <= 0:
            found.append(f"half_life: found {self.half_life}; expected above 0")
        return found


class Mixer(channels.Mean):
    name = "hgrn"
    Config = Config

    def gates(self, k):
        return forget(self.to_values(k), lower=2 ** (-1 / self.config.half_life))
