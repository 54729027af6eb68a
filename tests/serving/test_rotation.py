"""RoPE backwards, against transformers' forwards."""

from types import SimpleNamespace

import pytest
import torch
from helpers.closeness import assert_close

from linearize.serving.rotation import unrotate


def angles(width: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = 100.0 ** -(torch.arange(width // 2) / (width // 2))
    angle = torch.arange(50)[:, None] * frequency
    return angle.cos() * factor, angle.sin() * factor


@pytest.mark.parametrize("style", ["halves", "pairs"])
@pytest.mark.parametrize(("width", "factor"), [(16, 1.0), (8, 1.0), (16, 1.3)])
def test_it_undoes_a_rotation(style: str, width: int, factor: float) -> None:
    torch.manual_seed(0)
    cos, sin = angles(width, factor)
    rotary = SimpleNamespace(cos_sin_cache=torch.cat([cos, sin], -1), is_neox_style=style == "halves")
    x, positions = torch.randn(2, 3, 5, 16), torch.tensor([[0, 1, 2, 3, 4], [30, 31, 32, 33, 34]])
    channel = torch.arange(width)
    first = channel[: width // 2] if style == "halves" else channel[::2]
    second = channel[width // 2 :] if style == "halves" else channel[1::2]
    complex_x = torch.complex(x[..., first], x[..., second])
    turned = complex_x * torch.complex(cos, sin)[positions][:, None]
    y = x.clone()
    y[..., first], y[..., second] = turned.real, turned.imag
    assert_close((unrotate(rotary, y, positions),), (x,), 1e-5)


def test_without_a_rotation_nothing_turns() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16)
    assert torch.equal(unrotate(None, x, torch.zeros(1, 3, dtype=torch.int64)), x.float())
