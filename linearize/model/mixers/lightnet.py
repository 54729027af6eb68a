"""Additive decay: S_t = Σ_{j ≤ t} e^{x_j − z_t} v_jᵀ, z_t = ln Σ_{j ≤ t} e^{x_j} per channel, x = k/τ before RoPE;
every channel holds a softmax average of all values so far, y_t = φ(q_t)ᵀ S_t (LightNet, arXiv 2405.21022).

As the additive recurrence: key e^{x_t − z_t}, decay e^{z_{t-1} − z_t}. Nothing fades with age: an average over n tokens
gives each 1/n, however large n grows.

combine: memory: φ = softmax over the query, so that y is an average of values; its log weight in the window's
normaliser is ln n + strength, n the tokens out of reach. combine: liger and none: y as it is. features: identity and l2
are added through the closed gate.

State per layer: 4·G·(K·V + K + 1) bytes. No new weights.
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

    temperature: float = 1.0
    strength: float = -9.0

    allowed: ClassVar[tuple[str, ...]] = ("softmax", "identity", "l2")

    def problems(self):
        return super().problems() + self._above_zero("temperature")


class Mixer(additive.Mixer):
    name = "lightnet"
    Config = Config

    @property
    def divides(self):
        return False

    def write(self, tokens):
        return tokens.carry.float() / self.config.temperature, tokens.v.float(), tokens.present

    def recur(self, read, writes: Any, state: Any, context):
        logits, v, exists = writes
        S, *running = state
        k, decay, z, n = gates.running_softmax(logits, exists, *running)
        y, S = run_additive(read, k, v, decay, S)
        return y, self._weight(n, y), (S, z, n[:, :, -1:] if n.shape[2] else running[1])

    def absorb(self, writes: Any, state: Any):
        logits, v, exists = writes
        S, z, n = state
        k, decay, after, count = gates.running_softmax(logits, exists, z, n)
        ops.absorb(k, v, decay, S)
        z.copy_(after)
        n.copy_(count)

    def look(self, read, state: Any, context):
        y = ops.look(read, state[0])
        return self.joined(y, self._weight(state[2], y))

    def _weight(self, n, y):
        """The log weight [B, H, T] of n [B, G, T, 1] tokens, or None."""
        if not self.weighted:
            return None
        weight = (n.clamp(min=1).log() + self.config.strength).masked_fill(n == 0, float("-inf"))
        return weight.squeeze(-1).repeat_interleave(y.shape[1] // n.shape[1], 1)

    def empty_state(self, batch, device):
        g = self.geometry
        S = torch.zeros(batch, g.kv_heads, g.key_width, g.value_width, device=device)
        return S, S.new_zeros(batch, g.kv_heads, 1, g.key_width), S.new_zeros(batch, g.kv_heads, 1, 1)
