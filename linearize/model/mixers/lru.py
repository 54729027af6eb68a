"""The linear recurrent unit: a complex number per channel (LRU, arXiv 2303.06349).

k and q are those before RoPE; the paper's input and output matrices are here the gates of the pretrained key and query.
λ does not depend on the token. It is the paper's ring initialisation, spread evenly instead of drawn: |λ|² uniform
between r_min² and r_max² over the channels, the phase uniform between 0 and max_phase, in an order (multiples of the
golden ratio) that pairs every length with every phase. The root keeps the variance: of values without a mean, h has at
most their size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mixers import base, channels
from ..ops import diagonal

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    r_min, r_max: least and largest |λ|. The defaults have half-lives of 69 and 6931 tokens.
    max_phase: radians per token, exclusive.
    """

    r_min: float = 0.99
    r_max: float = 0.9999
    max_phase: float = math.pi / 10

    def problems(self):
        problems = super().problems()
        if not 0 <= self.r_min <= self.r_max <= 1:
            problems.append(f"r_min, r_max: found {self.r_min}, {self.r_max}; expected 0 ≤ r_min ≤ r_max ≤ 1")
        if not 0 <= self.max_phase <= 2 * math.pi:
            problems.append(f"max_phase: found {self.max_phase}; expected between 0 and 2π")
        return problems


class Mixer(channels.Mixer):
    name = "lru"
    summary = "The linear recurrent unit: a complex number per channel"
    rule = "h_t = λ ∘ h_{t-1} + √(1 − |λ|²) ∘ (σ(k_t) ∘ v_t),  y_t = σ(q_t) ∘ Re h_t"
    papers = ("2303.06349",)
    state = "8·G·V bytes, real and imaginary parts"
    Config = Config

    def ring(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """log |λ| and the phase of every channel, [V], by float64 arithmetic: |λ| is near 1."""
        c, i = self.config, torch.arange(self.geometry.value_width, device=like.device, dtype=torch.float64)
        size = c.r_min**2 + (c.r_max**2 - c.r_min**2) * (i + 0.5) / len(i)
        phase = c.max_phase * (GOLDEN * i).remainder(1.0)
        return (0.5 * size.log()).to(like.dtype), phase.to(like.dtype)

    def gates(self, k):
        log_size, _ = self.ring(k)
        return log_size, (-torch.expm1(2 * log_size)).sqrt() * self.to_values(k).sigmoid()

    def updates(self, tokens):
        x, log_decay = super().updates(tokens)
        return x, log_decay, self.ring(x)[1] * tokens.present

    def scan(self, query, updates, state, context):
        h, final = diagonal.chunked(*updates, state=torch.view_as_complex(state[0]))
        return self.read(query, h.real), None, (torch.view_as_real(final),)

    def update_state(self, updates, state):
        diagonal.update_state(*updates, state=torch.view_as_complex(state[0]))

    def read_state(self, query, state, context):
        return self.read(query, state[0][..., 0].unsqueeze(2))

    def initial_state(self, batch, device):
        return (torch.zeros(batch, self.geometry.kv_heads, self.geometry.value_width, 2, device=device),)

    def content(self, state):
        return torch.view_as_complex(state[0])
