"""A state in fewer bits is near what it stands for, and small updates are not lost in it."""

import pytest
import torch

from linearize.model.ops import compact

SHAPE = 2, 3, 17, 16


@pytest.mark.parametrize(
    ("dtype", "error", "bytes_of_a_row"), [(None, 0.0, 64), (torch.bfloat16, 2**-8, 32), (torch.int8, 1 / 127 / 16, 26)]
)
def test_what_is_opened_is_what_was_stored(dtype, error, bytes_of_a_row):
    x = torch.randn(SHAPE) * torch.logspace(-6, 4, 17)[:, None]
    x[0, 0, 0] = 0
    sums = x[..., :1, :1]
    kept = compact.stored((x, sums), dtype)
    again, short = compact.opened(kept, dtype)
    largest = x.abs().amax(-1, keepdim=True)
    assert bool(((again - x).abs() <= error * largest * 1.01).all())  # 1 %: the scale itself is rounded to bf16
    assert torch.equal(short, sums)
    assert sum(each.nbytes for each in kept[:-1]) == bytes_of_a_row * x[..., 0].numel()


@pytest.mark.parametrize("width", [2, 7, 8, 9, 15])
def test_odd_rows(width):
    x = torch.randn(1, 2, 4, width)
    (again,) = compact.opened(compact.stored((x,), torch.int8), torch.int8)
    assert again.shape == x.shape and (again - x).abs().max() < 0.01


def test_small_updates_are_not_lost_in_int8():
    """A thousand additions, each an eighth of a step of int8: plain rounding keeps none of them, error feedback all."""
    x = torch.zeros(1, 1, 1, 16)
    x[..., 0] = 127.0  # so that a step is 1
    kept, plain = compact.stored((x,), torch.int8), x.clone()
    for _ in range(100):
        (state,) = compact.opened(kept, torch.int8)
        state[..., 1] += 0.125
        kept = compact.stored((state,), torch.int8)
        plain[..., 1] += 0.125
        plain = plain.round()
    assert plain[..., 1] == 0
    assert abs(float(compact.opened(kept, torch.int8)[0][..., 1]) - 12.5) < 0.1


@pytest.mark.parametrize("widths", [(64, 64), (16, 16), (12, 8), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_what_is_kept_of_a_pair_is_as_near_as_its_steps(dtype, widths):
    x = torch.randn(2, 3, 5, sum(widths)) * torch.rand(2, 3, 5, 1) * 10
    x[..., 0, :] = 0
    codes, *scales = compact.stored_pairs(x, widths[0], dtype)
    assert codes.dtype == dtype and codes.shape[-1] == sum(widths) // (2 if dtype == torch.uint8 else 1)
    assert not any(part[..., 0, :].any() for part in (codes, *scales)), "free clusters are zeros"
    y = torch.cat(compact.opened_pairs(codes, scales, widths[0], x.dtype), -1)
    most = 8 if dtype == torch.uint8 else 127
    units = scales[-1].float().repeat_interleave(torch.tensor(widths), -1)
    parts = zip(*(z.split(compact.groups(*widths, dtype), -1) for z in (x, y, units)), strict=True)
    for exact, kept, unit in parts:
        step = exact.abs().amax(-1, keepdim=True) / most
        if dtype == torch.int8:  # half a step, and what bf16 takes from it
            assert ((exact - kept).abs() <= step * (0.5 + most / 256) + 1e-6).all()
        else:  # a step, as 7 stands for all up to 8, and what rounding the step took from its largest number
            assert ((exact - kept).abs() <= step + 4 * unit + 1e-6).all()
            assert (exact - kept).square().mean() < 0.15 * step.square().mean()
    again = (compact.rounded_pairs(y, widths[0], dtype) - y).abs()
    assert (again <= (units if dtype == torch.uint8 else 0)).all() and (again > 0).float().mean() < 0.01
    torch.testing.assert_close(compact.rounded_pairs(x, widths[0], dtype), y, rtol=0, atol=0)
