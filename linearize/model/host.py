"""Numbers of tensors that Python decides by. On a CPU a look at one is free; elsewhere it waits until the device has
caught up, and in a graph it is not possible. So layers and steps never look, and what a forward pass must know is read
in one transfer before its first layer."""

import torch
from torch import Tensor


def is_free(x: Tensor) -> bool:
    """Whether a look at a number of x waits for nothing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def read(*numbers: Tensor) -> list[int]:
    """Integers and truth values, [] each and on one device, in one transfer."""
    return torch.stack([x.long() for x in numbers]).tolist()
