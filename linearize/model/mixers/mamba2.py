"""State-space duality: one rate a per key/value head, stretched by Δ_t = softplus(k̄_t) per token, k̄ the mean over the
channels of the key before RoPE (Mamba-2, arXiv 2405.21060).

The rates are constants: at k̄ = 0 the half-life of head h is 1/a tokens, from half_life_min to half_life_max, evenly
spaced in log.

combine: memory: features: expansion, where every token counts once, without its Δ; or any features of
mixers/additive.py under the window's normaliser, where Δ is the token's weight. combine: liger and none: softmax
features, no denominator, half-lives of 16 to 256 tokens.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..mixers import additive
from ..ops import gates


@dataclass(frozen=True)
class Config(additive.Expanding):
    """Attributes:
    half_life_min, half_life_max: of the first and the last key/value head, tokens, at k̄ = 0.
    """

    positive = ("half_life_min", "half_life_max")
    half_life_min: float = 512.0
    half_life_max: float = 8192.0

    @classmethod
    def preset(cls, combine):
        short = {} if combine == "memory" else {"half_life_min": 16.0, "half_life_max": 256.0}
        return super().preset(combine) | short


class Mixer(additive.Mixer):
    name = "mamba2"
    summary = "State-space duality: a rate per head and a step size per token"
    rule = "S_t = e^{−a Δ_t} S_{t-1} + Δ_t φ(k_t) v_tᵀ,  Δ_t = softplus(k̄_t),  y_t = φ(q_t)ᵀ S_t"
    papers = ("2405.21060",)
    state = "4·G·(K + 1)·(V + 1) + 4·G bytes for the expansion, 4·G·φ·V for φ features (V + 1 with a normaliser)"
    Config = Config
    keyed = True
    scheduled = True

    @staticmethod
    def _delta(raw_k: Tensor) -> Tensor:
        return F.softplus(raw_k.mean(-1, keepdim=True))

    def log_decay(self, raw_k):
        c = self.config
        lives = self.geometry.schedule(
            lambda heads: gates.half_lives(c.half_life_min, c.half_life_max, heads, raw_k.device)
        )
        return -self._delta(raw_k) / lives

    def updates(self, tokens):
        if self.expands:
            return super().updates(tokens)
        k, v, *decay = super().updates(tokens)
        return k, v * self._delta(tokens.kept.float()), *decay
