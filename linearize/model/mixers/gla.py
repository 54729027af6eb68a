"""Gated linear attention with the gate from the pretrained key (GLA, arXiv 2312.06635; Liger, arXiv 2503.01496).

combine: memory: features: expansion with the gate pooled over the channels and τ = 8192, so that a token weighs half
after thousands of others; or any features of mixers/additive.py with a gate per channel. combine: liger (as published:
window 64, no sinks) and none: softmax features, τ = 16, no denominator.
"""

from dataclasses import dataclass

from ..mixers import additive


@dataclass(frozen=True)
class Config(additive.Expanding):
    """Attributes:
    gate_normalizer: τ. A channel with key value x has decay σ(x)^{1/τ}; at x = 0 its half-life is τ tokens.
    """

    positive = ("gate_normalizer",)
    gate_normalizer: float = 8192.0

    @classmethod
    def preset(cls, combine):
        return super().preset(combine) | {
            "liger": {"gate_normalizer": 16.0, "sinks": 0},
            "none": {"gate_normalizer": 16.0},
        }.get(combine, {})


class Mixer(additive.Mixer):
    name = "gla"
    summary = "Gated linear attention with the gate from the pretrained key"
    rule = "S_t = diag(α_t) S_{t-1} + φ(k_t) v_tᵀ,  α_t = σ(k_t)^{1/τ} per channel, k before RoPE,  y_t = φ(q_t)ᵀ S_t"
    papers = ("2312.06635", "2503.01496")
    state = "4·G·(K + 1)·(V + 1) + 4·G bytes for the expansion, 4·G·φ·V for φ features (V + 1 with a normaliser)"
    Config = Config
    keyed = True
