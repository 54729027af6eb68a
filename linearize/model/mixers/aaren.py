"""Attention as a running average: one softmax over all tokens so far, whatever the query (Aaren, arXiv 2405.13956).

The score is that of the paper's query token, which does not depend on the input, with all its channels 1: one score per
key head, from the key before RoPE.

combine: memory shares one softmax with the window. What the source's own attention would give to these tokens is at
least, by Jensen's inequality, log Σ_j e^{a_tj} ≥ Σ_j p_tj a_tj − Σ_j p_tj log p_tj, a_t their scores; so the log weight
of the average is the score of the average key (as the source rotates it) plus the entropy log Σ e^{s_j} − Σ p_tj s_j,
and the same averages of k and s are kept for it. A constant in all scores cancels. liger and none have no weight to
share: there the average is read through σ(q_t), q before RoPE.
"""

from dataclasses import dataclass

import torch

from ..mixers import base, channels
from ..ops import average


@dataclass(frozen=True)
class Config(base.MixerConfig):
    """Attributes:
    strength: added to the log weight of the memory in the normaliser it shares with the window.
    """

    strength: float = 0.0


class Mixer(channels.Mixer):
    name = "aaren"
    summary = "Attention as a running average: one softmax over all tokens so far, whatever the query"
    rule = "y_t = Σ_{j ≤ t} p_tj v_j,  p_tj = e^{s_j} / Σ_{i ≤ t} e^{s_i},  s_j = Σ_K k_j / √K"
    papers = ("2405.13956",)
    state = "4·G·(V + 2) bytes, as a memory 4·G·(V + K + 3)"
    Config = Config

    @property
    def weighted(self):
        return self.delayed

    def query(self, q, context):
        return q if self.weighted else super().query(q, context)

    def kept_features(self, k, unrotate):
        return unrotate(k).sum(-1, keepdim=True) / self.geometry.key_width**0.5

    def updates(self, tokens):
        averaged = [tokens.v, tokens.k, tokens.kept] if self.weighted else [tokens.v]
        return tokens.kept, torch.cat([*averaged, tokens.present], -1).float()

    def scan(self, query, updates, state, context):
        mean, n, final = average.chunked(*updates, state=state[0])
        return *self._weigh(query, mean, n, context), (final,)

    def update_state(self, updates, state):
        average.update_state(*updates, state=state[0])

    def read_state(self, query, state, context):
        return self.joined(*self._weigh(query, *average.read_state(state[0]), context))

    def _weigh(self, q, mean, n, context):
        """y [B, H, T, V] and its log weight [B, H, T], from the averages of v, k and s [B, G, T, V + K + 1] and
        n = log Σ e^s [B, G, T]; None for the weight where it is not needed."""
        if not self.weighted:
            return self.read(q, mean), None
        g = self.geometry
        rep = g.heads // g.kv_heads
        v, k, s = mean.split([g.value_width, g.key_width, 1], -1)
        score = (q.float().unflatten(1, (-1, rep)) * k.unsqueeze(2)).sum(-1) * context.scaling
        weight = score + (n - s.squeeze(-1)).unsqueeze(2) + self.config.strength
        return v.repeat_interleave(rep, 1), weight.flatten(1, 2)

    def initial_state(self, batch, device):
        g = self.geometry
        width = g.value_width + (g.key_width + 1 if self.weighted else 0)
        return (torch.zeros(batch, g.kv_heads, width + 2, device=device),)
