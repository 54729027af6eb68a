"""What tests of several files share about delta."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.model.ops import delta, dplr

B, H, G, K, V = 2, 6, 2, 16, 12
FAMILIES = {"delta": delta, "dplr": dplr}
family = pytest.mark.parametrize("family", FAMILIES)


def inputs(family: str, T: int, decay: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    normal = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    g = {
        "none": None,
        "one": torch.zeros(B, G, T, 1, dtype=dtype),
        "scalar": F.logsigmoid(normal(B, G, T, 1)),
        "channel": F.logsigmoid(normal(B, G, T, K)),
        # Raw keys near ±50, where a factorised form overflows within a chunk.
        "strong": F.logsigmoid(normal(B, G, T, K) * 50),
    }[decay]
    key = F.normalize(normal(B, G, T, K), dim=-1)
    x = {"q": normal(B, H, T, K), "k": key, "v": normal(B, G, T, V)}
    if family == "delta":
        x["beta"] = 2 * torch.rand(B, G, T, 1, dtype=dtype)
    else:
        # RWKV-7: a removes the key that b puts back in part; the decay bounds what is left.
        removed = F.normalize(normal(B, G, T, K), dim=-1)
        x["a"], x["b"] = -removed * (1 if g is None else g.exp()), removed * torch.rand(B, G, T, 1, dtype=dtype)
    return {**x, "log_decay": g, "state": normal(B, G, K, V)}
