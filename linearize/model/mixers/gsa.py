"""Gated slot attention: M slots hold averages of keys and values, read by a softmax over slots. Per slot,
Kˢ_t = f_t Kˢ_{t-1} + (1 − f_t) k_t and the same for values; y_t = Vˢ_tᵀ softmax(Kˢ_tᵀ q_t) (GSA, arXiv 2409.07146).

The gate comes from the key: x_t are the first M channels of the key before RoPE over a temperature, and
f_t = e^{z_{t-1} − z_t} with the running log-sum-exp z_t = ln Σ_{j ≤ t} e^{x_j}. So 1 − f_t = e^{x_t − z_t}, as in the
paper a sigmoid of a value per slot, here with an offset that makes every slot a proper average from the first token on
(a gate from the key alone would leave slots near zero for thousands of tokens, or forget within the window). Slots are
averages over all tokens; nothing fades with age. q and k are those that the source rotates, with its score scale.

combine: memory: slot m stands for n/M of the n tokens out of reach, all with its mean key, so that the log weight in
the window's normaliser is ln Σ_m e^{score_m} + ln(n/M) + strength. combine: liger and none: as published.

State per layer: 4·G·(M·(K + V) + M + 1) bytes. No new weights.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

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

    slots: int = 64
    temperature: float = 1.0
    strength: float = 0.0

    def problems(self):
        found = super().problems()
        if self.slots < 1:
            found.append(f"slots: found {self.slots}; expected at least 1")
        if not self.temperature > 0:
            found.append(f"temperature: found {self.temperature}; expected above 0")
        return found


class Mixer(base.Mixer):
    name = "gsa"
    Config = Config

    @property
    def weighted(self):
        return self.config.combine == "memory"

    @property
    def carry_width(self):
        return min(self.config.slots, self.geometry.key_width)

    def query(self, q, context):
        return q.float() * context.scaling

    def carry(self, k, unrotate):
        return unrotate(k)[..., : self.carry_width]

    def write(self, tokens):
        return tokens.k.float(), tokens.v.float(), tokens.carry.float() / self.config.temperature, tokens.present

    def recur(self, read, writes: Any, state: Any, context):
        k, v, logits, exists = writes
        *slots, z, n = state
        write, decay, z, count = gates.running_softmax(logits, exists, z, n)
        if self.weighted:
            y, lse, slots = ops.weighted(read, k, v, write, decay, tuple(slots))
            weight = self._weight(lse, count)
        else:
            (y, slots), weight = ops.run(read, k, v, write, decay, tuple(slots)), None
        return y, weight, (*slots, z, count[:, :, -1:] if count.shape[2] else n)

    def absorb(self, writes: Any, state: Any):
        k, v, logits, exists = writes
        *slots, z, n = state
        write, decay, after, count = gates.running_softmax(logits, exists, z, n)
        ops.absorb(k, v, write, decay, tuple(slots))
        z.copy_(after)
        n.copy_(count)

    def look(self, read, state: Any, context):
        *slots, _, n = state
        y, lse = ops.look(read, tuple(slots))
        return torch.cat([y, self._weight(lse, n).unsqueeze(-1)], -1) if self.weighted else y

    def _weight(self, lse, n):
        """The log weight [B, H, T] from ln Σ_m e^{score_m} [B, H, T] and n [B, G, T, 1]."""
        offset = (n.clamp(min=1).log() + self.config.strength - math.log(self.carry_width)).masked_fill(
            n == 0, float("-inf")
        )
        return lse + offset.squeeze(-1).repeat_interleave(lse.shape[1] // n.shape[1], 1)

    def empty_state(self, batch, device):
        g, M = self.geometry, self.carry_width
        slots = ops.empty_state(batch, g.kv_heads, g.key_width, g.value_width, M, device)
        return *slots, slots[0].new_zeros(batch, g.kv_heads, 1, M), slots[0].new_zeros(batch, g.kv_heads, 1, 1)

    def content(self, state):
        return state[1]
