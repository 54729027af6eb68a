"""Gates that turn (GateLoop, arXiv 2311.01927): a magnitude α and a phase θ per channel, from the key before RoPE.

combine: memory: a phase makes weights negative, so what is read is added through the closed gate; τ = 8192, and τ_θ as
large, so that a typical key needs thousands of tokens for a turn. combine: liger and none: τ = 16, τ_θ = 64.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..mixers import additive
from ..ops import rotation


@dataclass(frozen=True)
class Config(additive.Config):
    """Attributes:
    gate_normalizer: τ. A channel with key value x has decay σ(x)^{1/τ}; at x = 0 its half-life is τ tokens.
    angle_normalizer: τ_θ. A channel with key value x turns by x/τ_θ.
    """

    positive = ("gate_normalizer", "angle_normalizer")
    gate_normalizer: float = 8192.0
    angle_normalizer: float = 8192.0

    allowed: ClassVar[tuple[str, ...]] = additive.ONE_TO_ONE

    @classmethod
    def preset(cls, combine):
        return {} if combine == "memory" else {"gate_normalizer": 16.0, "angle_normalizer": 64.0}


class Mixer(additive.Mixer):
    name = "gateloop"
    summary = "Linear attention with gates that turn"
    rule = "S_t = diag(α_t e^{iθ_t}) S_{t-1} + φ(k_t) v_tᵀ,  α_t = σ(k_t)^{1/τ},  θ_t = k_t/τ_θ,  y_t = Re(φ(q_t)ᵀ S_t)"
    papers = ("2311.01927",)
    state = "4·G·(2K·V + K) bytes"
    Config = Config
    keyed = True

    @property
    def weighted(self):
        return False

    def updates(self, tokens):
        # The phase of an absent token, whose key is 0, is 0.
        return *super().updates(tokens), tokens.kept.float() / self.config.angle_normalizer

    def scan(self, query, updates: Any, state: Any, context):
        y, state = rotation.run(query, *updates, state=state)
        return y, None, state

    def update_state(self, updates: Any, state: Any):
        rotation.update_state(*updates, state=state)

    def read_state(self, query, state: Any, context):
        return rotation.read_state(query, state)

    def initial_state(self, batch, device):
        g = self.geometry
        return rotation.initial_state(batch, g.kv_heads, g.key_width, g.value_width, device)
