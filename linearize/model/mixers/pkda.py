"""Preconditioned Kimi Delta Attention: channels that keys use often are written less (arXiv 2604.21100).

Keys, queries, decay and β are those of kda. Beside S, a_t keeps for each channel a decayed sum of the squares of its
keys, the diagonal of their covariance; what is written is p_t ∘ k̂_t in the place of k̂_t, and p_t falls from `squash` to
1/squash as ln a_t rises through `center`, where it is 1. The paper learns weights for the decay and the strength of a_t
and for the center; here the first two come from the mean of the key's channels, as β does, and the center is that with
which the paper starts. The rule needs β · squash ≤ 2 not to grow, so squash is bounded and β has no range up to 2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mixers import base, kda
from ..ops import delta, diagonal, dplr

SMALLEST = 1e-6
"""Added to a sum of squares before its log is taken, as in the paper."""


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    gate_normalizer: τ. The half-life of a channel whose key is 0 is τ tokens.
    curvature_normalizer: τ_a. The half-life of the sums of squares is τ_a tokens where the mean of a key is 0.
    squash: p lies between 1/squash and squash; from 1 (which is kda) to 2.
    center: ln a at which p is 1.
    """

    positive = ("gate_normalizer", "curvature_normalizer")
    gate_normalizer: float = 8192.0
    curvature_normalizer: float = 64.0
    squash: float = 1.5
    center: float = -0.2

    def problems(self):
        wrong = [] if 1 <= self.squash <= 2 else [f"squash: found {self.squash}; expected between 1 and 2"]
        return super().problems() + wrong


class Mixer(kda.Mixer):
    name = "pkda"
    summary = "The delta rule with a decay per channel, preconditioned by how much keys use each channel"
    rule = (
        "S_t = (I − β_t (p_t ∘ k̂_t) k̂_tᵀ) diag(α_t) S_{t-1} + β_t (p_t ∘ k̂_t) v_tᵀ,  p_t = c^{−r / (1 + |r|)},  "
        "r = ln a_t − center,  a_t = σ(k̄_t)^{1/τ_a} a_{t-1} + β_t k̂_t²,  "
        "α_t = σ(k_t)^{1/τ} per channel,  y_t = S_tᵀ q̂_t"
    )
    papers = ("2604.21100",)
    state = "4·G·K·(V + 1) bytes"
    Config = Config

    def updates(self, tokens):
        beta = self.strength(tokens) * tokens.present
        forget = F.logsigmoid(tokens.kept.float().mean(-1, keepdim=True)) / self.config.curvature_normalizer
        g = self.log_decay(tokens) * tokens.present
        return delta.unit(self.key(tokens)), tokens.v, beta, g, forget * tokens.present

    def _precondition(self, k: Tensor, beta: Tensor, g: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `dplr` takes in as k, a and b, [B, G, T, K] each, of the sums [B, G, T, K] up to each token."""
        r = (sums.clamp(min=0) + SMALLEST).log() - self.config.center
        written = beta * k * (-math.log(self.config.squash) * r / (1 + r.abs())).exp()
        return written, g.exp() * k, -written

    def scan(self, query, updates, state, context):
        k, v, beta, g, forget = updates
        sums, last = diagonal.chunked(beta * k.square(), forget, state=state[1])
        written, a, b = self._precondition(k, beta, g, sums)
        y, final = dplr.chunked(query, written, v, a, b, g, state=state[0])
        return y, None, (final, last)

    def update_state(self, updates, state):
        k, v, beta, g, forget = updates
        diagonal.update_state(beta * k.square(), forget, phase=None, state=state[1])
        written, a, b = self._precondition(k, beta, g, state[1].unsqueeze(2))
        dplr.update_state(written, v, a, b, g, state=state[0])

    def initial_state(self, batch, device):
        g = self.geometry
        return *super().initial_state(batch, device), torch.zeros(batch, g.kv_heads, g.key_width, device=device)
