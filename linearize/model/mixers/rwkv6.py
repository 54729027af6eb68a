"""RWKV-6: S_t = diag(w_t) S_{t-1} + φ(k_t) v_tᵀ, read before the write with a bonus u for the token itself,
y_t = φ(q_t)ᵀ (S_{t-1} + u φ(k_t) v_tᵀ), with w_t = exp(−ln 2 · e^{k_t}/τ) per channel of the key before RoPE (arXiv
2404.05892).

combine: memory: features of mixers/additive.py under the window's normaliser, the bonus counted in it; τ = 8192,
because the decay fades keys and weights. combine: liger and none: τ = 16, no denominator, as published.

State per layer: 4·G·(K·V + 2K + V) bytes with one more V for a normaliser: the matrix before the last token, and that
token. No new weights; the published u is a weight per channel, here one number.
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

    gate_normalizer: float = 8192.0
    bonus: float = 1.0

    allowed: ClassVar[tuple[str, ...]] = tuple(additive.FEATURES)

    @classmethod
    def preset(cls, combine):
        return {} if combine == "memory" else {"gate_normalizer": 16.0}

    def problems(self):
        found = super().problems() + self._above_zero("gate_normalizer")
        if self.bonus < 0:
            found.append(f"bonus: found {self.bonus}; expected at least 0")
        return found


class Mixer(additive.Mixer):
    name = "rwkv6"
    Config = Config
    keyed = True

    def log_decay(self, raw_k):
        return raw_k.clamp(max=FASTEST).exp() * (-math.log(2) / self.config.gate_normalizer)

    def write(self, tokens):
        k, *rest = super().write(tokens)
        # An absent token must not wait to be written, so its key counts too.
        return k * tokens.present, *rest, tokens.present

    def _bonus(self, read):
        return read.new_full((read.shape[1], read.shape[-1]), self.config.bonus)

    def recur(self, read, writes: Any, state: Any, context):
        y, state = bonus.run(read, *writes, bonus=self._bonus(read), state=state)
        return *self.divided(y), state

    def absorb(self, writes: Any, state: Any):
        bonus.absorb(*writes, state=state)

    def look(self, read, state: Any, context):
        return self.joined(*self.divided(bonus.look(read, self._bonus(read), state)))

    def empty_state(self, batch, device):
        g = self.geometry
        return bonus.empty_state(batch, g.kv_heads, self.feature_width, g.value_width + self.divides, device)
