"""Linear attention: S_t = S_{t-1} + φ(k_t) v_tᵀ, y_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t with z_t = Σ φ(k_j); nothing fades
(Katharopoulos et al., arXiv 2006.16236).

combine: memory: the first-order expansion of the source's softmax over all that has left the window, or any features
of mixers/additive.py under the window's normaliser. combine: liger and none divide by φ(q)ᵀ z as published.

State per layer: 4·G·(K + 1)·(V + 1) + 4·G bytes for the expansion, 4·G·φ·(V + 1) for φ features. No new weights.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..mixers import additive


@dataclass(frozen=True)
class Config(additive.Expanding):
    divides: ClassVar[bool] = True


class Mixer(additive.Mixer):
    name = "linear"
    Config = Config
