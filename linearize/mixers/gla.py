"""Gated linear attention with the gate from the pretrained key (GLA, arXiv 2312.06635; Liger, arXiv 2503.01496).

S_t = diag(α_t) S_{t-1} + φ(k_t) v_tᵀ,  y_t = φ(q_t)ᵀ S_t,  α_t = σ(k_t)^{1/τ} per channel, φ = softmax over K, q and k before RoPE.
State per layer: G·K·(V + 1) fp32 (one column more holds the normaliser; without it for combine: liger). No new weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers import base
from linearize.ops import additive


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    gate_normalizer: τ. A channel with key value x has decay σ(x)^{1/τ}; at x = 0 its half-life is τ tokens.
    strength: c, the log weight of the memory in the normaliser it shares with the window (combine: memory).
    """

    gate_normalizer: float = 16.0
    strength: float = 0.0

    def problems(self) -> list[str]:
        found = super().problems()
        if self.gate_normalizer <= 0:
            found.append(f"gate_normalizer: found {self.gate_normalizer}; expected above 0")
        return found


class Mixer(base.Mixer):
    name = "gla"
    Config = Config

    def write(self, k, v):
        k = k.float()
        if self.delayed:
            v = F.pad(v.float(), (0, 1), value=1.0)
        return k.softmax(-1), v, F.logsigmoid(k) / self.config.gate_normalizer

    def read(self, q):
        return q.float().softmax(-1)

    def recur(self, q, writes, state, decoding):
        form = additive.step if decoding else additive.chunked
        y, final = form(q, *writes, state=None if state is None else state[0])
        return y, (final,)

    def log_strength(self):
        return self.config.strength

    def empty_state(self, batch, device):
        g = self.geometry
        return (torch.zeros(batch, g.kv_heads, g.key_width, g.value_width + self.delayed, device=device),)
