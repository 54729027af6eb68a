"""What the mixers with one number per channel share: h_t = a_t ∘ h_{t-1} + x_t of width V, read as σ(q_t) ∘ h_t.

Decay and input come from the key before RoPE, channel by channel. The query before RoPE opens or closes channels of
what is read, as the output gate of HGRN (arXiv 2311.04823) does: all query heads of a group share one state, and an
open gate returns what lies there. Where keys and values differ in width, value channel i belongs to key channel
⌊i K / V⌋.
"""

import torch
from torch import Tensor

from ..mixers import base
from ..ops import diagonal

LEAST = 1e-20
"""Weight below which a running mean counts as that of no token."""


def to_values(x: Tensor, geometry: base.Geometry) -> Tensor:
    """[..., K] -> [..., V]: value channel i gets what key channel ⌊i K / V⌋ has."""
    K, V = geometry.key_width, geometry.value_width
    return x if K == V else x[..., torch.arange(V, device=x.device) * K // V]


class Mixer(base.Mixer):
    """A mixer's file defines `gates`."""

    def gates(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """What a token does to the state: its key before RoPE, fp32 [B, G, T, K] -> log decay ≤ 0 and weight of the
        value, both [B, G, T, V] or what broadcasts to it."""
        raise TypeError(f"{self.name} defines no gates")

    def to_values(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., V]"""
        return to_values(x, self.geometry)

    def query(self, q, context):
        return self.to_values(context.unrotate(q)).sigmoid()

    def kept_features(self, k, unrotate):
        return unrotate(k)

    def updates(self, tokens):
        log_decay, weight = self.gates(tokens.kept.float())
        return weight * tokens.v.float(), log_decay * tokens.present

    def scan(self, query, updates, state, context):
        h, final = diagonal.chunked(*updates, state=state[0])
        return self.read(query, h), None, (final,)

    def update_state(self, updates, state):
        diagonal.update_state(*updates, phase=None, state=state[0])

    def read_state(self, query, state, context):
        return self.read(query, state[0].unsqueeze(2))

    def read(self, gate: Tensor, h: Tensor) -> Tensor:
        """gate [B, H, T, V] of the query, h [B, G, T, ·] -> y [B, H, T, V]."""
        return (gate.unflatten(1, (h.shape[1], -1)) * h.unsqueeze(2)).flatten(1, 2)

    def initial_state(self, batch, device):
        return (torch.zeros(batch, self.geometry.kv_heads, self.geometry.value_width, device=device),)


class Mean(Mixer):
    """Where decay and weight of a token add up to 1, h is a mean of values with weights n_t = a_t n_{t-1} + 1 − a_t in
    all, so h_t / n_t is read: beside h, n is kept. Without it a state that begins empty would be on the scale of values
    only after a half-life, which is thousands of tokens."""

    def updates(self, tokens):
        log_decay, weight = self.gates(tokens.kept.float())
        weight, log_decay = weight * tokens.present, log_decay * tokens.present
        return torch.cat([weight * tokens.v.float(), weight], -1), torch.cat([log_decay, log_decay], -1)

    def read(self, gate, h):
        total, n = h.chunk(2, dim=-1)
        return super().read(gate, total / n.clamp(min=LEAST))

    def initial_state(self, batch, device):
        return (torch.zeros(batch, self.geometry.kv_heads, 2 * self.geometry.value_width, device=device),)
