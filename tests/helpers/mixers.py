"""What tests of several files share about mixers."""

from linearize.model.mixers import MIXERS, Context, Geometry, build_config

B, H, G, T, K = 2, 4, 2, 50, 8
W, S = 9, 3


def context(unrotate=lambda x: x, **changes) -> Context:
    values = {
        "layer_idx": 0, "scaling": 0.4, "softcap": None, "extra": None, "unrotate": unrotate, "rows": None, "cache":
        None, "branch": "all", "attend": lambda q, k, v: v,
    }  # fmt: skip
    return Context(**{**values, **changes})


def mixer(**values):
    config = build_config({"window": W, "sinks": S, **values})
    return MIXERS[config.name](config, Geometry(H, G, K, K))
