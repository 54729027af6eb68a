"""No layer, and no decoding step, reads a number from the device or copies one to it: what a forward pass decides by is
read before its first layer.

There is no GPU here. A look at a number is caught where PyTorch dispatches it, on a CPU too, and `host.is_free` says
no, so that what runs is what runs on a GPU.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.modeling import tokens
from helpers.tiny import tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import linearize
from linearize.model import host
from linearize.model.mixers import MIXERS
from linearize.model.modeling import linearize_

MODEL = Path(linearize.__file__).parent / "model"
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
PACKED = torch.cat([torch.arange(n) for n in (9, 40, 1, 14)])[None]
MIXTURES = [
    pytest.param({"name": name, "combine": combine, "window": 8, "sinks": 2}, id=f"{name}-{combine}")
    for name, cls in MIXERS.items()
    for combine in cls.combines
    if combine == cls.combines[0] or name in ("gla", "gsa")
]
MIXTURES += [
    pytest.param({"name": name, "window": 8, "sinks": 2, "exact": 6}, id=f"{name}-exact") for name in ("gla", "kda")
]


class Read(AssertionError):
    """A number was read, or made from Python's, where it may not be."""


def asks() -> str | None:
    """The place in linearize/model from which PyTorch was called; None if it is another, or one that may read."""
    frame = sys._getframe(1)
    while frame is not None:
        name, path = frame.f_code.co_qualname, Path(frame.f_code.co_filename)
        inside = path.is_relative_to(MODEL)
        if inside and not (path.name == "host.py" or name.startswith("Packed.")):  # Packed computes on the CPU
            return f"{path.relative_to(MODEL)}:{frame.f_lineno} ({name})"
        if inside or "transformers" in path.parts:
            return None
        frame = frame.f_back
    return None


class Dispatched(TorchDispatchMode):
    """Refuses reads from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
        if (name in READS or masks) and (where := asks()):
            raise Read(f"{name} in {where}")
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Refuses numbers that would be copied to the device: `torch.tensor` and lists as an index."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        copies = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        lists = func is Tensor.__getitem__ and any(isinstance(x, list) for x in (args[1], *_parts(args[1])))
        if (copies or lists) and (where := asks()):
            raise Read(f"{func.__name__} in {where}")
        return func(*args, **(kwargs or {}))


def _parts(index: Any) -> tuple:
    return index if isinstance(index, tuple) else ()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU; the list fills with how many numbers each permitted read took."""
    taken: list[int] = []

    def read(*numbers: Tensor) -> list[int]:
        taken.append(len(numbers))
        return plain(*numbers)

    plain = host.read
    monkeypatch.setattr(host, "read", read)
    monkeypatch.setattr(host, "is_free", lambda x: False)
    return taken


def watched(call: Callable[[], Any]) -> Any:
    with Dispatched(), Called():
        return call()


@pytest.mark.parametrize("mixture", MIXTURES)
def test_no_number_is_read_in_a_layer(mixture: dict[str, Any], reads: list[int]) -> None:
    model, x = linearize_(tiny_model("llama", layers=2), mixture), tokens(2, 64)
    mask = torch.ones_like(x)
    mask[1, :20] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def most(number: int, what: str) -> None:
        assert len(reads) <= number, f"{what}: {len(reads)} reads"
        reads.clear()

    static = StaticCache(config=model.config, max_cache_len=90)
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), static):
            watched(lambda cache=cache: model(x[:, :40], past_key_values=cache))
            watched(lambda cache=cache: model(x[:, 40:60], past_key_values=cache))
            most(2, "prefill: the ids are in range")
            for t in (60, 61):
                where = torch.full((2, 1), t)
                watched(lambda cache=cache, t=t, w=where: model(x[:, t : t + 1], past_key_values=cache, position_ids=w))
            most(0, "decoding")
        watched(lambda: model(x, **padded))
        most(2, "padded")
        watched(lambda: model(x[:1], position_ids=PACKED))
        most(1, "packed")
    for given in ({}, padded, {"position_ids": PACKED.expand(2, -1)}):
        watched(lambda given=given: model(x, labels=x, use_cache=False, **given).loss.backward())
        most(2, "training")


def test_a_step_over_a_cache_that_records_reads_once_for_all_layers(reads: list[int]) -> None:
    """As assisted decoding has it: several tokens a pass, some of which are taken back."""
    model = linearize_(tiny_model("llama", layers=4), {"name": "gla", "window": 8, "sinks": 2})
    x, cache = tokens(1, 100), DynamicCache(config=model.config)
    with torch.no_grad():
        watched(lambda: model(x[:, :60], past_key_values=cache))
        cache.activate_past_recording()
        for start, end in ((60, 66), (66, 67), (67, 68), (68, 75)):
            reads.clear()
            watched(lambda s=start, e=end: model(x[:, s:e], past_key_values=cache))
            assert len(reads) <= 2, "the range of the ids, and what is certain"
            if end == 66:
                reads.clear()
                cache.crop(-2)
                model(x[:, 64:66], past_key_values=cache)


def test_a_read_is_noticed(reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = linearize_(tiny_model("llama", layers=2), {"name": "gla", "combine": "none"})
    monkeypatch.setattr(host, "is_free", lambda x: True)  # `decay.leaf_width` then looks at the decay
    with pytest.raises(Read, match=r"_local_scalar_dense in ops/decay.py:\d+ \(leaf_width\)"), torch.no_grad():
        watched(lambda: model(tokens(1, 64)))
    assert watched(lambda: torch.ones(3)[torch.tensor([True, False, True])]).shape == (2,), "not in a model"
