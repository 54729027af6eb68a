"""What tests of several files share about closeness."""

import torch
from torch import Tensor

# fp32: measured 2e-6 relative to the largest output; the bound leaves a factor of five. fp64: algebra leaves no room.
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(b.abs().max()))
        assert float((a - b).abs().max()) <= limit * scale
