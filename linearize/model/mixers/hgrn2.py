"""Tied gates: what forgets little takes in little (HGRN-2, arXiv 2404.07904).

The lower bound of the forget gate, which the paper learns per layer, is here the exponent 1/τ.

combine: memory: features of the query alone, one normaliser with the window; τ = 8192, because the decay fades keys and
weights, whose size is then 1/τ. combine: liger and none: τ = 16, no denominator, as published.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..mixers import additive


@dataclass(frozen=True)
class Config(additive.Config):
    """Attributes:
    gate_normalizer: τ. A channel with key value x has decay σ(x)^{1/τ}; at x = 0 its half-life is τ tokens.
    strength: features of an untrained query tell tokens apart badly, so the memory starts light: 2 gives perplexity
        47.15, 0 gives 46.98, −2 gives 46.97 (SmolLM2-135M, WikiText-2 validation, 3 × 512 tokens; window control
        46.96).
    """

    positive = ("gate_normalizer",)
    gate_normalizer: float = 8192.0
    strength: float = -2.0

    allowed: ClassVar[tuple[str, ...]] = additive.ONE_TO_ONE

    @classmethod
    def preset(cls, combine):
        return {} if combine == "memory" else {"gate_normalizer": 16.0}


class Mixer(additive.Mixer):
    name = "hgrn2"
    summary = "Linear attention with tied gates: what forgets little takes in little"
    rule = (
        "S_t = diag(f_t) S_{t-1} + (1 − f_t) v_tᵀ,  f_t = σ(k_t)^{1/τ} per channel, k before RoPE,  y_t = φ(q_t)ᵀ S_t"
    )
    papers = ("2404.07904",)
    state = "4·G·K·V bytes, 4·G·K·(V + 1) with a normaliser"
    Config = Config
    keyed = True

    def key_features(self, raw_k):
        return -torch.expm1(F.logsigmoid(raw_k) / self.config.gate_normalizer)
