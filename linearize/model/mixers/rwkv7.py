"""The generalised delta rule with a learning rate and a decay per channel (RWKV-7, arXiv 2503.14456).

S_t = (diag(w_t) − r_t r_tᵀ) S_{t-1} + r_t v_tᵀ,  r_t = √η_t ∘ k̂_t,  η_t = σ(k_t),  y_t = S_tᵀ q̂_t,
w_t = exp(−e^{−1/2} σ(−k_t) / τ) per channel.

The paper removes with k̂ and writes with η ∘ k̂. Where η differs from token to token that is no contraction: with η from
pretrained-like keys (normal, 3 wide, mean −2) the state exceeded the range of fp32 within 8192 tokens. With √η on both
sides no transition makes the state longer. The paper's decay, which is never faster than e^{−e^{−1/2}} a token, is
taken to the power 1/τ. Keys and queries are those before RoPE, as RWKV has no positions, of length 1.

State per layer: 4·G·K·V bytes. New weights: 0; combine: memory adds the gate, one number per query head, that starts
closed, and keeps the key before RoPE (K numbers) per token of the window.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..mixers import base
from ..ops import delta, dplr
from ..ops.additive import look


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    gate_normalizer: τ. No channel has a half-life below 1.14 τ tokens (ln 2 · e^{1/2}); 1 is the paper's decay.
    """

    gate_normalizer: float = 8192.0

    def problems(self):
        return super().problems() + self._above_zero("gate_normalizer")


class Mixer(base.Mixer):
    name = "rwkv7"
    Config = Config

    @property
    def carry_width(self):
        return self.geometry.key_width

    def query(self, q, context):
        return delta.unit(context.unrotate(q))

    def carry(self, k, unrotate):
        return unrotate(k)

    def write(self, tokens):
        k = tokens.carry.float()
        # Of an absent token k̂ is 0 already. Halved inside: √σ(k) has no gradient where σ(k) rounds to 0.
        r = F.logsigmoid(k).mul(0.5).exp() * delta.unit(k)
        g = (-math.exp(-0.5) / self.config.gate_normalizer) * (-k).sigmoid() * tokens.present
        return r, tokens.v, -r, r, g

    def recur(self, read, writes, state, context):
        y, final = dplr.chunked(read, *writes, state=state[0])
        return y, None, (final,)

    def absorb(self, writes, state):
        dplr.absorb(*writes, state=state[0])

    def look(self, read, state, context):
        return look(read, state[0])

    def empty_state(self, batch, device):
        g = self.geometry
        return (torch.zeros(batch, g.kv_heads, g.key_width, g.value_width, device=device),)
