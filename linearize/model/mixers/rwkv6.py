"""RWKV-6: the state is read before the token enters it, with a bonus u for the token itself (arXiv 2404.05892).

The published u is a weight per channel, here one number.

combine: memory: features of mixers/additive.py under the window's normaliser, the bonus counted in it; τ = 8192,
because the decay fades keys and weights. combine: liger and none: τ = 16, no denominator, as published.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..mixers import additive
from ..ops import bonus

FASTEST = 20.0
"""Key beyond which the decay is as for this one: nothing is left of the channel either way, and fp32 has an end."""


@dataclass(frozen=True)
class Config(additive.Config):
    """Attributes:
    gate_normalizer: τ. A channel with key value x has a half-life of τ e^{−x} tokens.
    bonus: u, the weight of the newest token beside those already written.
    """

    positive = ("gate_normalizer",)
    gate_normalizer: float = 8192.0
    bonus: float = 1.0

    allowed: ClassVar[tuple[str, ...]] = tuple(additive.FEATURES)

    @classmethod
    def preset(cls, combine):
        return {} if combine == "memory" else {"gate_normalizer": 16.0}

    def problems(self):
        problems = super().problems()
        if self.bonus < 0:
            problems.append(f"bonus: found {self.bonus}; expected at least 0")
        return problems


class Mixer(additive.Mixer):
    name = "rwkv6"
    summary = "RWKV-6: a state that is read before the token enters it, with a bonus for the token itself"
    rule = (
        "S_t = diag(w_t) S_{t-1} + φ(k_t) v_tᵀ,  w_t = exp(−ln 2 · e^{k_t}/τ) per channel of the key before RoPE,  "
        "y_t = φ(q_t)ᵀ (S_{t-1} + u φ(k_t) v_tᵀ)"
    )
    papers = ("2404.05892",)
    state = (
        "4·G·(K·V + 2K + V) bytes with one more V for a normaliser: the matrix before the last token, and that token"
    )
    Config = Config
    keyed = True

    def log_decay(self, raw_k):
        return raw_k.clamp(max=FASTEST).exp() * (-math.log(2) / self.config.gate_normalizer)

    def updates(self, tokens):
        k, *rest = super().updates(tokens)
        # An absent token must not wait to enter the state, so its key counts too.
        return k * tokens.present, *rest, tokens.present

    def _bonus(self, query):
        return query.new_full((query.shape[1], query.shape[-1]), self.config.bonus)

    def scan(self, query, updates: Any, state: Any, context):
        y, state = bonus.run(query, *updates, bonus=self._bonus(query), state=state)
        return *self.divided(y), state

    def update_state(self, updates: Any, state: Any):
        bonus.update_state(*updates, state=state)

    def read_state(self, query, state: Any, context):
        return self.joined(*self.divided(bonus.read_state(query, self._bonus(query), state)))

    def initial_state(self, batch, device):
        g = self.geometry
        return bonus.initial_state(batch, g.kv_heads, self.feature_width, g.value_width + self.divides, device)
