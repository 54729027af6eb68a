"""Linear attention; nothing fades (Katharopoulos et al., arXiv 2006.16236).

combine: memory: the first-order expansion of the source's softmax over all that has left the window, or any features
of mixers/additive.py under the window's normaliser. combine: liger and none divide by φ(q)ᵀ z as published.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..mixers import additive


@dataclass(frozen=True)
class Config(additive.Expanding):
    divides: ClassVar[bool] = True


class Mixer(additive.Mixer):
    name = "linear"
    summary = "Linear attention; nothing fades"
    rule = "S_t = S_{t-1} + φ(k_t) v_tᵀ,  z_t = z_{t-1} + φ(k_t),  y_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t"
    papers = ("2006.16236",)
    state = "4·G·(K + 1)·(V + 1) + 4·G bytes for the expansion, 4·G·φ·(V + 1) for φ features"
    Config = Config
