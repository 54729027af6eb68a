"""The delta rule with a decay per head (Gated DeltaNet, arXiv 2412.06464).

k̄, β, k̂ and q̂ are those of delta_net, rotated keys and queries too: a decay that all channels share does not disturb
relative positions.
"""

from dataclasses import dataclass

from torch.nn import functional as F

from ..mixers import delta_net


@dataclass(frozen=True)
class Config(delta_net.Config):
    """Attributes:
    gate_normalizer: τ. Where the mean of a key's channels is 0, the half-life is τ tokens.
    """

    positive = ("gate_normalizer",)
    gate_normalizer: float = 8192.0


class Mixer(delta_net.Mixer):
    name = "gated_deltanet"
    summary = "The delta rule with a decay per head"
    rule = "S_t = α_t (I − β_t k̂_t k̂_tᵀ) S_{t-1} + β_t k̂_t v_tᵀ,  α_t = σ(k̄_t)^{1/τ},  y_t = S_tᵀ q̂_t"
    papers = ("2412.06464",)
    state = "4·G·K·V bytes"
    Config = Config

    def log_decay(self, tokens):
        return F.logsigmoid(tokens.kept.float()) / self.config.gate_normalizer
