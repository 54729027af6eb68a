"""Gated linear attention with the gate from the pretrained key (GLA, arXiv 2312.06635; Liger, arXiv 2503.01496).

S_t = diag(α_t) S_{t-1} + φ(k_t) v_tᵀ,  α_t = σ(k_t)^{1/τ} per channel of the key before RoPE.

features: softmax (Liger): φ = softmax over K of q and k before RoPE, y_t = φ(q_t)ᵀ S_t.
features: expansion (combine: memory): φ(k) = k as the source rotates it, and the state is read as the first-order
expansion of the source's own softmax around the mean score of what has left the window (ops/expansion.py): nothing to
fit. The gate is pooled over the channels, α_t = σ(k_t)^{1/τ} averaged in log space, so that a token's key fades
together with its weight; a key that fades alone drifts to score 0, above most real scores.

State per layer: G·(K + 1)·(V + 1) fp32 (G·K·V for softmax). No new weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers import base
from linearize.ops import additive, expansion, run_additive

FEATURES = ("expansion", "softmax")


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    gate_normalizer: τ. A channel with key value x has decay σ(x)^{1/τ}; at x = 0 its half-life is τ tokens.
    features: expansion | softmax.
    strength: added to the log weight of the memory in the normaliser it shares with the window (features: expansion).
        The expansion leaves out the variance of the scores, which real heads have: 0 gives perplexity 26.3 and 24.4 at
        512 and 2048 tokens, 1.5 gives 25.8 and 23.7 (SmolLM2-135M, WikiText-2 validation; window control 27.6, 25.8).
    """

    gate_normalizer: float = 8192.0
    features: str = "expansion"
    strength: float = 1.5

    @classmethod
    def preset(cls, combine: str) -> dict[str, Any]:
        return {
            "liger": {"gate_normalizer": 16.0, "features": "softmax", "sinks": 0},
            "none": {"gate_normalizer": 16.0, "features": "softmax"},
        }.get(combine, {})

    def problems(self) -> list[str]:
        found = super().problems()
        if self.gate_normalizer <= 0:
            found.append(f"gate_normalizer: found {self.gate_normalizer}; expected above 0")
        if self.features not in FEATURES:
            found.append(f"features: found {self.features!r}; expected one of {', '.join(FEATURES)}")
        elif self.features == "softmax" and self.combine == "memory":
            found.append("features: softmax has no weight beside the window's; with combine: memory use expansion")
        elif self.features == "expansion" and self.combine == "liger":
            found.append("features: expansion has a normaliser that liger's fixed half cannot use; use softmax")
        return found


class Mixer(base.Mixer):
    name = "gla"
    Config = Config

    @property
    def expands(self) -> bool:
        return self.config.features == "expansion"

    @property
    def weighted(self):
        return self.expands

    @property
    def carry_width(self):
        return 1 if self.expands else self.geometry.key_width

    def query(self, q, context):
        return q if self.expands else context.unrotate(q).softmax(-1)

    def carry(self, k, unrotate):
        raw_k = unrotate(k)
        return self._log_decay(raw_k).mean(-1, keepdim=True) if self.expands else raw_k

    def write(self, tokens):
        if self.expands:
            return tokens.k1, tokens.v1, tokens.carry
        raw_k = tokens.carry.float()
        # φ(0) is not 0, but an absent token has no value either.
        return raw_k.softmax(-1), tokens.v.float(), self._log_decay(raw_k) * tokens.present

    def _log_decay(self, raw_k: Tensor) -> Tensor:
        return F.logsigmoid(raw_k) / self.config.gate_normalizer

    def recur(self, read, writes, state, context):
        if self.expands:
            y, weight, final = expansion.run(
                read, *writes, state, scaling=context.scaling, strength=self.config.strength
            )
            return y, weight, final
        y, final = run_additive(read, *writes, state=state[0])
        return y, None, (final,)

    def absorb(self, writes, state):
        if self.expands:
            expansion.absorb(*writes, state, strength=self.config.strength)
        else:
            additive.absorb(*writes, state=state[0])

    def look(self, read, state, context):
        if self.expands:
            return expansion.look(read, state, scaling=context.scaling)
        return additive.look(read, state[0])

    def empty_state(self, batch, device):
        g = self.geometry
        if self.expands:
            return expansion.empty_state(batch, g.kv_heads, g.key_width, g.value_width, device)
        return (torch.zeros(batch, g.kv_heads, g.key_width, g.value_width, device=device),)
