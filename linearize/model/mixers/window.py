"""Control: the source's softmax attention over the last W tokens and s sinks, nothing behind them (StreamingLLM, arXiv
2309.17453). What a linearized model must beat.
"""

from dataclasses import dataclass

from ..mixers import base


@dataclass(frozen=True)
class Config(base.MixerConfig):
    combine: str = "none"


class Mixer(base.Mixer):
    name = "window"
    summary = "Control: the source's attention over the last W tokens and s sinks, nothing behind them"
    rule = "y_t = Σ_{j ∈ E_t} softmax(a_t)_j v_j,  E_t the window and the sinks"
    papers = ("2309.17453",)
    state = "W + s keys and values"
    Config = Config
    combines = ("none",)
    recurrent = False
