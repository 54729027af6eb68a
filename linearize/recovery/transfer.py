"""Transfer: every linearized layer learns the output of the source's attention, on the input that the source gives it.

    loss of layer l = Σ over blocks of mean_t |student_l(x_t) − source_l(x_t)|² / mean_t |source_l(x_t)|²
    transfer        = Σ_l loss of layer l

x is what reaches the layer in the source (teacher forcing), so no layer sees another's error; outputs are those behind
the output projection, and all tokens count. Each block and each layer is divided by its own size: outputs of late
layers are many times larger than those of early ones, and would be all that counts.

It happens in one pass of the source: a hook on each attention module calls the module of the student again with the
same arguments and makes its gradients at once, so that the graph of one layer lives at a time, and MLPs and the head
take no part. Since it only calls modules again, it needs to know no architecture. Layer-wise attention transfer:
LoLCATs, arXiv 2410.10254.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linearize.checkpoint.adapters import as_student
from linearize.model.attention import linearized_modules


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """The error of a layer's output, summed over blocks: Σ mean_t |y − target|² / mean_t |target|².

    Args:
        y: [B, T, D], of any floating dtype.
        target: the same.

    Returns:
        fp32 scalar.
    """
    y, target = y.float(), target.float()
    size = target.square().sum((1, 2)).clamp(min=torch.finfo(target.dtype).tiny)
    return ((y - target).square().sum((1, 2)) / size).sum()


@contextmanager
def transfer(source: nn.Module, student: nn.Module, learn: Callable[[Tensor], None]) -> Iterator[dict[int, Tensor]]:
    """While it is on, each forward of the source adds to the gradients of the student's attention.

    Args:
        source: linearized, run as source (`adapters.as_source`) in the meantime.
        student: the same object, or a copy whose weights are trained.
        learn: given the loss of one layer, makes its gradients. Not called where nothing in the layer is trained.

    Yields:
        Layer index -> its loss in the last forward, without gradient; filled by the forward.
    """
    errors: dict[int, Tensor] = {}

    def compare(own: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            with as_student(own):
                # Not own(...): that would run the hooks again.
                error = relative_error(_first(own.forward(*args, **kwargs)), _first(output))
                if error.requires_grad:
                    learn(error)
            errors[own.layer_idx] = error.detach()

        return hook

    pairs = zip(linearized_modules(source), linearized_modules(student), strict=True)
    hooks = [module.register_forward_hook(compare(own), with_kwargs=True) for module, own in pairs]
    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()


def _first(output: Any) -> Tensor:
    """Attention modules return their output alone, or before other things."""
    return output[0] if isinstance(output, tuple) else output
