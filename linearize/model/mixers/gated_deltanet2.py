"""The delta rule with a gate for what is erased and a gate for what is written (Gated DeltaNet-2, arXiv 2605.22791).

Keys, queries and decay are those of kda: before RoPE, of length 1. The paper has a weight for each gate; here the gate
b of a key channel and the gate w of a value channel come both from the channels of the key, matched as in channels.py.

The paper erases with b ∘ k̂ and writes with k̂. Where b differs from token to token that is no contraction: with b from
pretrained-like keys (normal, 3 wide, mean −2) the state exceeded the range of fp32 within 3072 tokens. With √b on both
sides, which for a constant b is the same rule in another basis, no transition makes the state longer.
"""

from dataclasses import dataclass

from ..mixers import base, channels, kda
from ..ops import delta


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    gate_normalizer: τ. The half-life of a channel whose key is 0 is τ tokens.
    """

    positive = ("gate_normalizer",)
    gate_normalizer: float = 8192.0


class Mixer(kda.Mixer):
    name = "gated_deltanet2"
    summary = "The delta rule with a gate per channel for erasing and one for writing"
    rule = (
        "S_t = (I − r_t r_tᵀ) diag(α_t) S_{t-1} + r_t (w_t ∘ v_t)ᵀ,  r_t = √b_t ∘ k̂_t,  "
        "b_t = w_t = σ(k_t) per channel,  α_t = σ(k_t)^{1/τ},  y_t = S_tᵀ q̂_t"
    )
    papers = ("2605.22791",)
    state = "4·G·K·V bytes"
    Config = Config

    def updates(self, tokens):
        k = tokens.kept.float()
        r = delta.rooted(k)
        write = channels.to_values(k.sigmoid(), self.geometry).to(tokens.v.dtype)
        return r, write * tokens.v, tokens.present, self.log_decay(tokens) * tokens.present
