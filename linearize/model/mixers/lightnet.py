"""Additive decay: every channel holds a softmax average of all values so far (LightNet, arXiv 2405.21022).

As the additive recurrence: key e^{x_t − z_t}, decay e^{z_{t-1} − z_t}. Nothing fades with age: an average over n tokens
gives each 1/n, however large n grows.

combine: memory: φ = softmax over the query, so that y is an average of values; its log weight in the window's
normaliser is ln n + strength, n the tokens out of reach. combine: liger and none: y as it is. features: identity and l2
are added through the closed gate.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..mixers import additive
from ..ops import additive as ops
from ..ops import gates, run_additive


@dataclass(frozen=True)
class Config(additive.Config):
    """Attributes:
    temperature: τ; 1 as published. The larger, the more equal the tokens.
    strength: features of an untrained query tell tokens apart badly, so the memory starts light: −4 gives perplexity
        49.65, −6 gives 47.13, −9 gives 46.97 (SmolLM2-135M, WikiText-2 validation, 3 × 512 tokens; window control
        46.96).
    """

    positive = ("temperature",)
    temperature: float = 1.0
    strength: float = -9.0

    allowed: ClassVar[tuple[str, ...]] = ("softmax", "identity", "l2")


class Mixer(additive.Mixer):
    name = "lightnet"
    summary = "Additive decay: every channel holds a softmax average of all values so far"
    rule = "S_t = Σ_{j ≤ t} e^{x_j − z_t} v_jᵀ,  z_t = ln Σ_{j ≤ t} e^{x_j},  x = k/τ before RoPE,  y_t = φ(q_t)ᵀ S_t"
    papers = ("2405.21022",)
    state = "4·G·(K·V + K + 1) bytes"
    Config = Config

    @property
    def divides(self):
        return False

    def updates(self, tokens):
        return tokens.kept.float() / self.config.temperature, tokens.v.float(), tokens.present

    def scan(self, query, updates: Any, state: Any, context):
        logits, v, exists = updates
        S, *running = state
        k, decay, z, n = gates.running_softmax(logits, exists, *running)
        y, S = run_additive(query, k, v, decay, S)
        return y, self._weight(n, y), (S, z, n[:, :, -1:] if n.shape[2] else running[1])

    def update_state(self, updates: Any, state: Any):
        logits, v, exists = updates
        S, z, n = state
        k, decay, after, count = gates.running_softmax(logits, exists, z, n)
        ops.update_state(k, v, decay, S)
        z.copy_(after)
        n.copy_(count)

    def read_state(self, query, state: Any, context):
        y = ops.read_state(query, state[0])
        return self.joined(y, self._weight(state[2], y))

    def _weight(self, n, y):
        """The log weight [B, H, T] of n [B, G, T, 1] tokens, or None."""
        return gates.log_count(n, self.config.strength, y.shape[1]) if self.weighted else None

    def initial_state(self, batch, device):
        g = self.geometry
        S = torch.zeros(batch, g.kv_heads, g.key_width, g.value_width, device=device)
        return S, S.new_zeros(batch, g.kv_heads, 1, g.key_width), S.new_zeros(batch, g.kv_heads, 1, 1)
