"""The GRU without its recurrent weights (minGRU, arXiv 2410.01201).

k and q are those before RoPE. The paper's update gate is τ = 1, z = σ(k). n is the weight that h has in all
(mixers/channels.py); the paper, which learns z, has none.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..mixers import base, channels


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    gate_normalizer: τ. A channel with key value 0 has a half-life of τ tokens.
    """

    positive = ("gate_normalizer",)
    gate_normalizer: float = 8192.0


class Mixer(channels.Mean):
    name = "min_gru"
    summary = "The GRU without its recurrent weights"
    rule = (
        "h_t = (1 − z_t) ∘ h_{t-1} + z_t ∘ v_t,  1 − z_t = σ(−k_t)^{1/τ} per channel,  y_t = σ(q_t) ∘ h_t / n_t,  "
        "n_t = (1 − z_t) ∘ n_{t-1} + z_t"
    )
    papers = ("2410.01201",)
    state = "8·G·V bytes"
    Config = Config

    def gates(self, k):
        log_decay = F.logsigmoid(-self.to_values(k)) / self.config.gate_normalizer
        return log_decay, -torch.expm1(log_decay)
