"""Retention: a fixed decay per head, short memories beside long ones (RetNet, arXiv 2307.08621).

Per key/value head h of G. schedule: geometric: half-lives in tokens from half_life_min to half_life_max, evenly spaced
in log. schedule: published: γ = 1 − 2^{−5−h}, half-lives of 22, 44, 88, … tokens, the first of which are shorter than
the window.

combine: memory: features: expansion, or any features of mixers/additive.py under the window's normaliser. combine:
liger and none: softmax features, no denominator, the published schedule.
"""

import math
from dataclasses import dataclass

from ..mixers import additive
from ..ops import gates

SCHEDULES = ("geometric", "published")


@dataclass(frozen=True)
class Config(additive.Expanding):
    """Attributes:
    schedule: geometric | published.
    half_life_min, half_life_max: of the first and the last key/value head, tokens (schedule: geometric).
    """

    positive = ("half_life_min", "half_life_max")
    schedule: str = "geometric"
    half_life_min: float = 64.0
    half_life_max: float = 8192.0

    @classmethod
    def preset(cls, combine):
        return super().preset(combine) | ({} if combine == "memory" else {"schedule": "published"})

    def problems(self):
        problems = super().problems()
        if self.schedule not in SCHEDULES:
            problems.append(f"schedule: found {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
        return problems


class Mixer(additive.Mixer):
    name = "retnet"
    summary = "Retention: a fixed decay per head, short memories beside long ones"
    rule = "S_t = γ S_{t-1} + φ(k_t) v_tᵀ,  y_t = φ(q_t)ᵀ S_t"
    papers = ("2307.08621",)
    state = "4·G·(K + 1)·(V + 1) + 4·G bytes for the expansion, 4·G·φ·V for φ features (V + 1 with a normaliser)"
    Config = Config
    scheduled = True

    def log_decay(self, raw_k):
        c, device = self.config, raw_k.device
        if c.schedule == "published":
            return self.geometry.schedule(lambda heads: gates.retention(heads, device))
        lives = self.geometry.schedule(lambda heads: gates.half_lives(c.half_life_min, c.half_life_max, heads, device))
        return -math.log(2) / lives
