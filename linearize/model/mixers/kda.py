"""The delta rule with a decay per channel (Kimi Delta Attention, arXiv 2510.26692).

Keys and queries are those before RoPE, as in the paper, whose layers have no positions: channels that decay on their
own would pull apart the pairs that a rotation turns together. k̂ and q̂ have length 1, β = σ(mean of k's channels), or
twice that for negative eigenvalues.
"""

from ..mixers import gated_deltanet
from ..ops import delta


class Mixer(gated_deltanet.Mixer):
    name = "kda"
    summary = "The delta rule with a decay per channel"
    rule = "S_t = (I − β_t k̂_t k̂_tᵀ) diag(α_t) S_{t-1} + β_t k̂_t v_tᵀ,  α_t = σ(k_t)^{1/τ} per channel,  y_t = S_tᵀ q̂_t"
    papers = ("2510.26692",)
    state = "4·G·K·V bytes"

    def query(self, q, context):
        return delta.unit(context.unrotate(q))

    def kept_features(self, k, unrotate):
        return unrotate(k)

    def key(self, tokens):
        return tokens.kept

    def strength(self, tokens):
        return tokens.kept.float().mean(-1, keepdim=True).sigmoid()
