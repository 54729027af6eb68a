"""The delta rule with a decay per head (Gated DeltaNet, arXiv 2412.06464).

S_t = α_t (I − β_t k̂_t k̂_tᵀ) S_{t-1} + β_t k̂_t v_tᵀ,  α_t = σ(k̄_t)^{1/τ},  y_t = S_tᵀ q̂_t.

k̄, β, k̂ and q̂ are those of delta_net, rotated keys and queries too: a decay that all channels share does not disturb
relative positions.

State per layer: 4·G·K·V bytes. New weights: 0; combine: memory adds the gate, one number per query head, that starts
closed, and keeps one number (k̄) per token of the window.
"""

from dataclasses import dataclass

from torch.nn import functional as F

from ..mixers import delta_net


@dataclass(frozen=True)
class Config(delta_net.Config):
    """Attributes:
    gate_normalizer: τ. Where the mean of a key's channels is 0, the half-life is τ tokens.
    """

    gate_normalizer: float = 8192.0

    def problems(self):
        return super().problems() + self._above_zero("gate_normalizer")


class Mixer(delta_net.Mixer):
    name = "gated_deltanet"
    Config = Config

    def log_decay(self, tokens):
        return F.logsigmoid(tokens.carry.float()) / self.config.gate_normalizer
