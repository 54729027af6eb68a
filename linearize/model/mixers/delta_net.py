"""The delta rule: an update replaces what its key read before (DeltaNet, arXiv 2406.06484; β up to 2,
arXiv 2411.12537).

k̄ is the mean of the key's channels before RoPE. Queries and keys are taken as the source rotates them, and divided by
their length: rotations leave lengths as they are, and products of rotated keys depend on the distance of their tokens
alone, so the rule sees relative positions as the source does. With keys and queries of length 1, no update makes the
state longer, and a query that repeats a key reads the value that was stored there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..mixers import base
from ..ops import delta, run_delta
from ..ops.additive import read_state


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    negative_eigenvalues: β = 2σ(k̄) instead of σ(k̄): above 1, an update turns the sign of what its key read.
    """

    negative_eigenvalues: bool = False


class Mixer(base.Mixer):
    name = "delta_net"
    summary = "The delta rule: an update replaces what its key read before"
    rule = (
        "S_t = (I − β_t k̂_t k̂_tᵀ) S_{t-1} + β_t k̂_t v_tᵀ,  β_t = σ(k̄_t), or 2σ(k̄_t) for negative eigenvalues,  "
        "y_t = S_tᵀ q̂_t"
    )
    papers = ("2406.06484", "2411.12537")
    state = "4·G·K·V bytes"
    Config = Config
    addressed = True

    @property
    def predicts(self):
        return True

    def query(self, q, context):
        return delta.unit(q)

    def own_query(self, tokens, scaling):
        return delta.unit(self.key(tokens))

    def kept_features(self, k, unrotate):
        return unrotate(k).mean(-1, keepdim=True)

    def log_decay(self, tokens) -> Tensor | None:
        """g ≤ 0, [B, G, T, 1 or K], from what is kept of the tokens; None for no decay."""
        return None

    def key(self, tokens) -> Tensor:
        """Keys before they are divided by their length, [B, G, T, K]."""
        return tokens.k

    def strength(self, tokens) -> Tensor:
        """β before the choice of its range, [B, G, T, 1]."""
        return tokens.kept.float().sigmoid()

    def updates(self, tokens):
        beta = self.strength(tokens) * tokens.present
        g = self.log_decay(tokens)
        return (
            delta.unit(self.key(tokens)),
            tokens.v,
            2 * beta if self.config.negative_eigenvalues else beta,
            None if g is None else g * tokens.present,
        )

    def scan(self, query, updates, state, context):
        y, final = run_delta(query, *updates, state=state[0])
        return y, None, (final,)

    def update_state(self, updates, state):
        delta.update_state(*updates, state=state[0])

    def read_state(self, query, state, context):
        return read_state(query, state[0])

    def initial_state(self, batch, device):
        g = self.geometry
        return (torch.zeros(batch, g.kv_heads, g.key_width, g.value_width, device=device),)
