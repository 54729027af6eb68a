"""The delta rule with a decay per channel (Kimi Delta Attention, arXiv 2510.26692).

S_t = (I − β_t k̂_t k̂_tᵀ) diag(α_t) S_{t-1} + β_t k̂_t v_tᵀ,  α_t = σ(k_t)^{1/τ} per channel,  y_t = S_tᵀ q̂_t.

Keys and queries are those before RoPE, as in the paper, whose layers have no positions: channels that decay on their
own would pull apart the pairs that a rotation turns together. k̂ and q̂ have length 1, β = σ(mean of k's channels), or
twice that for negative eigenvalues.

State per layer: 4·G·K·V bytes. New weights: 0; combine: memory adds the gate, one number per query head, that starts
closed, and keeps the key before RoPE (K numbers) per token of the window.
"""

from torch.nn import functional as F

from ..mixers import gated_deltanet
from ..ops import delta


class Mixer(gated_deltanet.Mixer):
    name = "kda"

    @property
    def carry_width(self):
        return self.geometry.key_width

    def query(self, q, context):
        return delta.unit(context.unrotate(q))

    def carry(self, k, unrotate):
        return unrotate(k)

    def key(self, tokens):
        return tokens.carry

    def strength(self, tokens):
        return tokens.carry.float().mean(-1, keepdim=True).sigmoid()

    def log_decay(self, tokens):
        return F.logsigmoid(tokens.carry.float()) / self.config.gate_normalizer
