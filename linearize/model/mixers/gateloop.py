"""Gates that turn: S_t = diag(α_t e^{iθ_t}) S_{t-1} + φ(k_t) v_tᵀ, y_t = Re(φ(q_t)ᵀ S_t), with magnitude
α_t = σ(k_t)^{1/τ} and phase θ_t = k_t/τ_θ per channel of the key before RoPE (GateLoop, arXiv 2311.01927).

combine: memory: a phase makes weights negative, so what is read is added through the closed gate; τ = 8192, and τ_θ as
large, so that a typical key needs thousands of tokens for a turn. combine: liger and none: τ = 16, τ_θ = 64.

State per layer: 4·G·(2K·V + K) bytes. New weights: with combine: memory mixer.gate [H], else none.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.nn import functional as F

from ..mixers import additive
from ..ops import rotation


@dataclass(frozen=True)
class Config(additive.Config):
    """Attributes:
    gate_normalizer: τ. A channel with key value x has decay σ(x)^{1/τ}; at x = 0 its half-life is τ tokens.
    angle_normalizer: τ_θ. A channel with key value x turns by x/τ_θ.
    """

    gate_normalizer: float = 8192.0
    angle_normalizer: float = 8192.0

    allowed: ClassVar[tuple[str, ...]] = additive.ONE_TO_ONE

    @classmethod
    def preset(cls, combine):
        return {} if combine == "memory" else {"gate_normalizer": 16.0, "angle_normalizer": 64.0}

    def problems(self):
        return super().problems() + self._above_zero("gate_normalizer", "angle_normalizer")


class Mixer(additive.Mixer):
    name = "gateloop"
    Config = Config
    keyed = True

    @property
    def weighted(self):
        return False

    def log_decay(self, raw_k):
        return F.logsigmoid(raw_k) / self.config.gate_normalizer

    def write(self, tokens):
        # The phase of an absent token, whose key is 0, is 0.
        return *super().write(tokens), tokens.carry.float() / self.config.angle_normalizer

    def recur(self, read, writes: Any, state: Any, context):
        y, state = rotation.run(read, *writes, state=state)
        return y, None, state

    def absorb(self, writes: Any, state: Any):
        rotation.absorb(*writes, state=state)

    def look(self, read, state: Any, context):
        return rotation.look(read, state)

    def empty_state(self, batch, device):
        g = self.geometry
        return rotation.empty_state(batch, g.kv_heads, g.key_width, g.value_width, device)
