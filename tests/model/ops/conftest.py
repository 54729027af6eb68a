"""Memory that nobody wrote shows: `torch.empty` and its kin give NaN while a test of the recurrences runs."""

from functools import wraps

import pytest
import torch


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every test of this folder."""

    def patch(owner, name: str) -> None:
        make = getattr(owner, name)

        @wraps(make)
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() or x.is_complex() else x

        monkeypatch.setattr(owner, name, made)

    for name in ("empty", "empty_like", "empty_strided"):
        patch(torch, name)
    patch(torch.Tensor, "new_empty")
