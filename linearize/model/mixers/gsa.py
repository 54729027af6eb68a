"""Gated slot attention: M slots hold averages of keys and values, read by a softmax over slots (GSA, arXiv 2409.07146).

The gate comes from the key: x_t are the first M channels of the key before RoPE over a temperature, and
f_t = e^{z_{t-1} − z_t} with the running log-sum-exp z_t = ln Σ_{j ≤ t} e^{x_j}. So 1 − f_t = e^{x_t − z_t}, as in the
paper a sigmoid of a value per slot, here with an offset that makes every slot a proper average from the first token on
(a gate from the key alone would leave slots near zero for thousands of tokens, or forget within the window). Slots are
averages over all tokens; nothing fades with age. q and k are those that the source rotates, with its score scale.

combine: memory: slot m stands for n/M of the n tokens out of reach, all with its mean key, so that the log weight in
the window's normaliser is ln Σ_m e^{score_m} + ln(n/M) + strength. combine: liger and none: as published.
"""

import math
from dataclasses import dataclass
from typing import Any

from ..mixers import base
from ..ops import gates
from ..ops import slots as ops


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    slots: M; a key narrower than that has as many as it has channels.
    temperature: what the key is divided by; the larger, the more equal the slots.
    strength: added to the log weight of the memory in the normaliser that it shares with the window.
    """

    positive = ("slots", "temperature")
    slots: int = 64
    temperature: float = 1.0
    strength: float = 0.0


class Mixer(base.Mixer):
    name = "gsa"
    summary = "Gated slot attention: M slots hold averages of keys and values, read by a softmax over slots"
    rule = (
        "Kˢ_t = f_t Kˢ_{t-1} + (1 − f_t) k_t and Vˢ_t = f_t Vˢ_{t-1} + (1 − f_t) v_t per slot,  "
        "y_t = Vˢ_tᵀ softmax(Kˢ_tᵀ q_t)"
    )
    papers = ("2409.07146",)
    state = "4·G·(M·(K + V) + M + 1) bytes"
    Config = Config

    @property
    def weighted(self):
        return self.config.combine == "memory"

    def query(self, q, context):
        return q.float() * context.scaling

    def kept_features(self, k, unrotate):
        return unrotate(k)[..., : self.config.slots]

    def updates(self, tokens):
        return tokens.k.float(), tokens.v.float(), tokens.kept.float() / self.config.temperature, tokens.present

    def scan(self, query, updates: Any, state: Any, context):
        k, v, logits, exists = updates
        *slots, z, n = state
        input_gate, decay, z, count = gates.running_softmax(logits, exists, z, n)
        if self.weighted:
            y, lse, slots = ops.weighted(query, k, v, input_gate, decay, tuple(slots))
            weight = self._weight(lse, count)
        else:
            (y, slots), weight = ops.run(query, k, v, input_gate, decay, tuple(slots)), None
        return y, weight, (*slots, z, count[:, :, -1:] if count.shape[2] else n)

    def update_state(self, updates: Any, state: Any):
        k, v, logits, exists = updates
        *slots, z, n = state
        input_gate, decay, after, count = gates.running_softmax(logits, exists, z, n)
        ops.update_state(k, v, input_gate, decay, tuple(slots))
        z.copy_(after)
        n.copy_(count)

    def read_state(self, query, state: Any, context):
        *slots, _, n = state
        y, lse = ops.read_state(query, tuple(slots))
        return self.joined(y, self._weight(lse, n) if self.weighted else None)

    def _weight(self, lse, n):
        """The log weight [B, H, T] from ln Σ_m e^{score_m} [B, H, T] and n [B, G, T, 1]."""
        return lse + (gates.log_count(n, self.config.strength, lse.shape[1]) - math.log(self.kept_width))

    def initial_state(self, batch, device):
        g, M = self.geometry, self.kept_width
        slots = ops.initial_state(batch, g.kv_heads, g.key_width, g.value_width, M, device)
        return *slots, slots[0].new_zeros(batch, g.kv_heads, 1, M), slots[0].new_zeros(batch, g.kv_heads, 1, 1)

    def content(self, state):
        return state[1]
