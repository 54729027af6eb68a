"""Control: the source's softmax attention over the last W tokens and s sinks, nothing behind them (StreamingLLM, arXiv
2309.17453).

y_t = Σ_{j ∈ E_t} softmax(a_t)_j v_j. Cache per layer: (W + s) keys and values. No new weights. What a linearized model
must beat.
"""

from linearize.mixers import base


class Mixer(base.Mixer):
    name = "window"
    combines = ("none", "memory")
    recurrent = False
