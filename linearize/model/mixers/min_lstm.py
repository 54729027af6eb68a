"""The LSTM without its recurrent weights (minLSTM, arXiv 2410.01201).

k and q are those before RoPE, k̄ is the mean of the key's channels; the paper has a projection for each gate. τ weighs
what is kept against what is new. n is the weight that h has in all (mixers/channels.py); the paper, which learns the
gates, has none.
"""

import math
from dataclasses import dataclass

from torch.nn import functional as F

from ..mixers import base, channels


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    gate_normalizer: τ. Where both gates are as open, the half-life is ln 2 · τ tokens.
    """

    positive = ("gate_normalizer",)
    gate_normalizer: float = 8192.0


class Mixer(channels.Mean):
    name = "min_lstm"
    summary = "The LSTM without its recurrent weights"
    rule = (
        "h_t = f′_t ∘ h_{t-1} + i′_t ∘ v_t,  f′ = f / (f + i),  i′ = i / (f + i),  f_t = τ σ(k̄_t) per head,  "
        "i_t = σ(k_t) per channel,  y_t = σ(q_t) ∘ h_t / n_t,  n_t = f′_t ∘ n_{t-1} + i′_t"
    )
    papers = ("2410.01201",)
    state = "8·G·V bytes"
    Config = Config

    def gates(self, k):
        forget = F.logsigmoid(k.mean(-1, keepdim=True)) + math.log(self.config.gate_normalizer)
        difference = F.logsigmoid(self.to_values(k)) - forget
        return F.logsigmoid(-difference), difference.sigmoid()
