"""What the mixers of the additive kind share: S_t = diag(e^{g_t}) S_{t-1} + φ(k_t) v_tᵀ, read as φ(q_t)ᵀ S_t.

A mixer's file says its decay g, and what else is its own. How queries and keys are made is configuration:

features: expansion: φ is the identity on q and k as the source rotates them, and the state is read as the first-order
expansion of the source's own softmax around the mean score of what it holds (ops/expansion.py): nothing to fit. It
needs one decay per token; a decay per channel is averaged over the channels, in log space, so that a token's key fades
together with its weight (a key that fades alone drifts to score 0, above most real scores).

features: any other: applied to q and k before RoPE. Where they are not negative, the recurrence runs over [v | 1], and
its last column is the sum of the weights: combine: memory shares the window's normaliser with log weight
ln Σ w + strength. identity and l2 have no such sum, and combine: memory adds what they read through the closed gate.

combine: liger and none read Σ w v as it is, except in mixers whose published form divides by Σ w.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mixers import base
from ..ops import additive, expansion, run_additive

EXPANSION = "expansion"
FLOOR = 1e-30
"""What a sum of weights is divided by at least; a memory that weighs less has no part in the output."""
LARGEST = 30.0
"""Exponent beyond which exp+- stops: a product of two features and a sum over tokens stay below fp32's 3e38."""


@dataclass(frozen=True)
class Features:
    """A feature map of x [..., K].

    Attributes:
        apply: x -> φ(x) [..., times · K].
        positive: whether no feature is negative.
        bounded: whether Σ w v can be read without dividing by Σ w.
    """

    apply: Callable[[Tensor], Tensor]
    times: int = 1
    positive: bool = True
    bounded: bool = True


def _softmax_pm(x: Tensor) -> Tensor:
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


def _exp_pm(x: Tensor) -> Tensor:
    # The root of the usual scale on either side: φ(q)·φ(k) holds e^{q k / √K} of every channel.
    x = (x * x.shape[-1] ** -0.25).clamp(-LARGEST, LARGEST)
    return torch.cat([x.exp(), (-x).exp()], -1)


def _elu1(x: Tensor) -> Tensor:
    # Not elu(x) + 1, which is 0 below −17.
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


FEATURES = {
    "softmax": Features(lambda x: x.softmax(-1)),
    "softmax+-": Features(_softmax_pm, times=2),
    "exp+-": Features(_exp_pm, times=2, bounded=False),
    "relu": Features(F.relu),
    "elu+1": Features(_elu1),
    "identity": Features(lambda x: x, positive=False),
    "l2": Features(lambda x: F.normalize(x, dim=-1), positive=False),
}
ONE_TO_ONE = tuple(name for name, f in FEATURES.items() if f.times == 1)


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    features: expansion, where the decay allows it | softmax | softmax+- | exp+- | relu | elu+1 | identity | l2.
    strength: added to the log weight of the memory in the normaliser that it shares with the window.
    """

    features: str = "softmax"
    strength: float = 0.0

    allowed: ClassVar[tuple[str, ...]] = tuple(FEATURES)
    divides: ClassVar[bool] = False
    """Whether the published form divides by the sum of weights."""

    def problems(self) -> list[str]:
        problems = super().problems()
        name = self.features
        if name not in self.allowed:
            problems.append(f"features: found {name!r}; expected one of {', '.join(self.allowed)}")
        elif name == EXPANSION and self.combine == "liger":
            problems.append("features: expansion has a normaliser that liger's fixed half cannot use; use softmax")
        elif name != EXPANSION and not (FEATURES[name].bounded or self.divides or self.combine == "memory"):
            problems.append(f"features: {name} needs the normaliser of combine: memory; use softmax")
        return problems


@dataclass(frozen=True)
class Expanding(Config):
    """Of a mixer that can have one decay per token: the expansion behind a window, softmax features elsewhere.

    Attributes:
        strength: the expansion leaves out the variance of the scores, which real heads have: with gla, 0 gives
            perplexity 26.3 and 24.4 at 512 and 2048 tokens, 1.5 gives 25.8 and 23.7 (SmolLM2-135M, WikiText-2
            validation; window control 27.6, 25.8).
    """

    features: str = EXPANSION
    strength: float = 1.5

    allowed: ClassVar[tuple[str, ...]] = (EXPANSION, *FEATURES)

    @classmethod
    def preset(cls, combine: str) -> dict[str, Any]:
        return {} if combine == "memory" else {"features": "softmax"}


class Mixer(base.Mixer):
    """Base of the additive mixers. A mixer defines `log_decay`, unless nothing fades or channels do as in GLA."""

    Config = Config
    addressed = True

    keyed: ClassVar[bool] = False
    """Whether the decay depends on the key."""

    @property
    def expands(self) -> bool:
        return self.config.features == EXPANSION

    @property
    def features(self) -> Features:
        return FEATURES[self.config.features]

    @property
    def weighted(self) -> bool:
        return self.config.combine == "memory" and (self.expands or self.features.positive)

    @property
    def divides(self) -> bool:
        """Whether the state has a column for the sum of weights."""
        return self.weighted or self.config.divides and self.features.positive

    @property
    def feature_width(self) -> int:
        return self.geometry.key_width * self.features.times

    def log_decay(self, raw_k: Tensor) -> Tensor | None:
        """ln of the decay per channel [B, G, T, K] or per token [B, G, T, 1] (what broadcasts to it where it is not
        keyed), from keys before RoPE [B, G, T, K] fp32; None: nothing fades."""
        return F.logsigmoid(raw_k) / self.config.gate_normalizer if self.keyed else None

    def query_features(self, raw_q: Tensor, context: base.Context) -> Tensor:
        """What reads the state [B, H, T, ·], from queries before RoPE [B, H, T, K] fp32."""
        return self.features.apply(raw_q * context.scaling if self.config.features == "identity" else raw_q)

    def key_features(self, raw_k: Tensor) -> Tensor:
        """What is written [B, G, T, ·], from keys before RoPE [B, G, T, K] fp32."""
        return self.features.apply(raw_k)

    # --- the contract of base.Mixer

    def query(self, q, context):
        return q if self.expands else self.query_features(context.unrotate(q), context)

    def own_query(self, tokens, scaling):
        if self.expands:  # as if the source scaled its scores by 1/√K
            return tokens.k * (self.geometry.key_width**-0.5 / scaling)
        return self.key_features(tokens.kept.float())

    def kept_features(self, k, unrotate):
        if not self.expands:
            return unrotate(k)
        decay = self.log_decay(unrotate(k)) if self.keyed else None
        return None if decay is None else decay.mean(-1, keepdim=True)

    def updates(self, tokens):
        if self.expands:
            decay = tokens.kept if self.keyed else self.log_decay(tokens.present)
            decay = tokens.present * 0 if decay is None else decay * tokens.present
            return tokens.k1, tokens.v1, decay
        raw_k = tokens.kept.float()
        # φ(0) is not 0, but an absent token has no value either.
        k, v = self.key_features(raw_k), (tokens.v1 if self.divides else tokens.v).float()
        decay = self.log_decay(raw_k)
        if decay is None:
            return k, v
        decay = decay * tokens.present
        return k, v, torch.cat([decay] * (k.shape[-1] // raw_k.shape[-1]), -1) if decay.shape[-1] > 1 else decay

    def scan(self, query, updates: Any, state: Any, context):
        if self.expands:
            y, weight, final = expansion.run(
                query, *updates, state=state, scaling=context.scaling, strength=self.config.strength
            )
            return y, weight if self.weighted else None, final
        y, final = run_additive(query, *updates, state=state[0])
        return *self.divided(y), (final,)

    def update_state(self, updates: Any, state: Any):
        if self.expands:
            expansion.update_state(*updates, state=state, strength=self.config.strength)
        else:
            k, v, *decay = updates
            additive.update_state(k, v, decay[0] if decay else None, state[0])

    def read_state(self, query, state: Any, context):
        if self.expands:
            y = expansion.read_state(query, state, scaling=context.scaling)
            return y if self.weighted else y[..., :-1]
        return self.joined(*self.divided(additive.read_state(query, state[0])))

    def initial_state(self, batch, device):
        g = self.geometry
        if self.expands:
            return expansion.initial_state(batch, g.kv_heads, g.key_width, g.value_width, device)
        width = g.value_width + self.divides
        return (torch.zeros(batch, g.kv_heads, self.feature_width, width, device=device),)

    # --- the normaliser

    def divided(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """y [B, H, T, V] and its log weight [B, H, T] or None, from what was read of a state with the column of
        weights, if it has one."""
        if not self.divides:
            return y, None
        total = y[..., -1:]
        safe = total.clamp(min=FLOOR)
        y = y[..., :-1] / safe
        if not self.weighted:
            return y, None
        # Not total.log(): its gradient at zero is 0/0.
        weight = (safe.log() + self.config.strength).masked_fill(total < FLOOR, float("-inf"))
        return y, weight.squeeze(-1)
