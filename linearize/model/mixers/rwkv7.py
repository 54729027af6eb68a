"""The generalised delta rule with a learning rate and a decay per channel (RWKV-7, arXiv 2503.14456).

The paper removes with k̂ and writes with η ∘ k̂. Where η differs from token to token that is no contraction: with η from
pretrained-like keys (normal, 3 wide, mean −2) the state exceeded the range of fp32 within 8192 tokens. With √η on both
sides no transition makes the state longer. The paper's decay, which is never faster than e^{−e^{−1/2}} a token, is
taken to the power 1/τ. Keys and queries are those of kda: before RoPE, as RWKV has no positions, of length 1.
"""

import math
from dataclasses import dataclass

from ..mixers import base, kda
from ..ops import delta, dplr


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    gate_normalizer: τ. No channel has a half-life below 1.14 τ tokens (ln 2 · e^{1/2}); 1 is the paper's decay.
    """

    positive = ("gate_normalizer",)
    gate_normalizer: float = 8192.0


class Mixer(kda.Mixer):
    name = "rwkv7"
    summary = "The generalised delta rule with a learning rate and a decay per channel"
    rule = (
        "S_t = (diag(w_t) − r_t r_tᵀ) S_{t-1} + r_t v_tᵀ,  r_t = √η_t ∘ k̂_t,  η_t = σ(k_t),  "
        "w_t = exp(−e^{−1/2} σ(−k_t) / τ) per channel,  y_t = S_tᵀ q̂_t"
    )
    papers = ("2503.14456",)
    state = "4·G·K·V bytes"
    Config = Config

    def updates(self, tokens):
        k = tokens.kept.float()
        r = delta.rooted(k)
        g = (-math.exp(-0.5) / self.config.gate_normalizer) * (-k).sigmoid() * tokens.present
        return r, tokens.v, -r, r, g

    def scan(self, query, updates, state, context):
        y, final = dplr.chunked(query, *updates, state=state[0])
        return y, None, (final,)

    def update_state(self, updates, state):
        dplr.update_state(*updates, state=state[0])
