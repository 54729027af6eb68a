"""All calls of flash-linear-attention's Triton kernels: our layout in, our layout out.

fla takes [B, T, H, ·] with as many heads of keys as of queries, decays in log space, a scale (ours is in the queries
already: 1.0) and fp32 states [B, H, K, V]. Without triton `import fla` works and is empty, so what is probed is the
module with the kernels; it is imported on the first call with a CUDA tensor, not before (it takes seconds).

Keys, values and states are repeated for every query head of a group: fla's kernels share keys between heads of values
(H a multiple of G would need the reverse), and the slots' kernel repeats them by itself.

Shapes as in ops/additive.py. Written against fla-core 0.6, and checked on its kernels by scripts/check_kernels.sh.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion

WIDEST = {"additive": 512, "delta": 256, "slots": 256}
"""Family -> widest keys: the kernels of the delta rule assert it, and others were not tried on wider ones."""
MULTIPLE = 8
"""Of which widths are made multiples by zeros: in 16 bits the kernels refuse odd ones, which they would miscompile."""
STRONGEST = -30.0
"""Log decay of a token below which nothing changes: e^−30 of what was there is left. The kernels take differences of
prefix sums, whose rounding grows with the sums: −41,000 a token costs 1 % of the result, −30 2e-5."""


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot be imported, or None."""
    try:
        import_module("fla.ops.gla")
    except ImportError as error:
        return f"fla.ops.gla cannot be imported ({error}); pip install 'linearize[cuda]' installs it"
    return None


@functools.cache
def unsound(device: torch.device) -> str | None:
    """Why kernels that can be imported are wrong on a device, or None."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        triton = TorchVersion(version("triton"))
    except PackageNotFoundError:
        return None
    if triton < "3.4" or triton >= "3.7.1":
        return None
    return (
        f"triton {triton} computes wrong gradients on a Hopper GPU, so fla refuses it there; pip install "
        "'triton>=3.7.1', which torch 2.13 and newer bring along"
    )


def restriction(q: Tensor, v: Tensor, family: str = "additive") -> str | None:
    """What about queries [B, H, T, K] and values [B, G, T, V] the kernels of a family cannot do, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"they compute in 32 bits or fewer, and the queries are {q.dtype}"
    if q.shape[-1] > WIDEST[family]:
        return f"keys may be {WIDEST[family]} wide, and these are {q.shape[-1]}"
    if q.shape[2] == 0:
        return "they need at least one token"
    return unsound(q.device)


def kernel(module: str, name: str) -> Callable[..., tuple[Tensor, Any]]:
    """fla.ops.MODULE.NAME. Not an import statement: fla's decorators hide the signatures from type checkers."""
    return getattr(import_module(f"fla.ops.{module}"), name)


def additive(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`ops.additive.chunked`, with its arguments."""
    tensors = _to_fla(q, k, v, state)
    if log_decay is not None and log_decay.shape[-1] > 1:
        y, final = kernel("gla", "chunk_gla")(**tensors, g=_decay(q, k, log_decay))
    else:
        g = None if log_decay is None else _decay(q, k, log_decay).squeeze(-1)
        y, final = kernel("simple_gla", "chunk_simple_gla")(**tensors, g=g)
    return _from_fla(y, final, q, k, v)


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ops.delta.chunked`, with its arguments."""
    tensors = _to_fla(q, k, v, state)
    tensors["beta"] = _tokens(beta, q).squeeze(-1)
    if log_decay is not None and log_decay.shape[-1] > 1:
        y, final = kernel("kda", "chunk_kda")(**tensors, g=_decay(q, k, log_decay))
    elif log_decay is None and v.dtype != torch.float32:
        y, final = kernel("delta_rule", "chunk_delta_rule")(**tensors)
    else:
        # chunk_delta_rule refuses fp32; with a decay of 1 this is the same rule.
        g = torch.zeros_like(beta) if log_decay is None else log_decay
        y, final = kernel("gated_delta_rule", "chunk_gated_delta_rule")(**tensors, g=_decay(q, k, g).squeeze(-1))
    return _from_fla(y, final, q, k, v)


def slots(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, log_decay: Tensor, state: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`ops.slots.run`, with its arguments. The kernel expands the groups by itself."""
    tensors = {"q": _wide(q.to(v.dtype)), "k": _wide(k.to(v.dtype)), "v": _wide(v), "s": input_gate.to(v.dtype)}
    tensors["g"] = log_decay.float().clamp(min=STRONGEST)
    tensors = {name: x.transpose(1, 2).contiguous() for name, x in tensors.items()}
    keys, values = (x.float() for x in state)
    initial = _wide(keys.mT).mT.contiguous(), _wide(values)  # not more slots: a softmax goes over them
    y, final = kernel("gsa", "chunk_gsa")(**tensors, scale=1.0, initial_state=initial, output_final_state=True)
    V = v.shape[-1]
    return y[..., :V].transpose(1, 2).to(q.dtype), (final[0][:, :, : k.shape[-1]], final[1][..., :V])


def _wide(x: Tensor, *, rows: bool = False) -> Tensor:
    """Zeros behind the last dimension, and with `rows` the one before, up to a multiple of MULTIPLE. They add
    nothing."""
    widths = (0, -x.shape[-1] % MULTIPLE, 0, -x.shape[-2] % MULTIPLE if rows else 0)
    return F.pad(x, widths) if any(widths) else x


def _heads(x: Tensor, q: Tensor, dim: int = 1) -> Tensor:
    """Each key head, of G along `dim`, once for every query head of q [B, H, ...] that reads it."""
    rep = q.shape[1] // x.shape[dim]
    return x if rep == 1 else x.repeat_interleave(rep, dim)


def _tokens(x: Tensor, q: Tensor) -> Tensor:
    """[B, G or H, T, ·] -> [B, T, H, ·], contiguous."""
    return _heads(x.transpose(1, 2), q, 2).contiguous()


def _to_fla(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> dict:
    """The arguments that all kernels share. They want one dtype: the values'."""
    return {
        "q": _tokens(_wide(q.to(v.dtype)), q),
        "k": _tokens(_wide(k.to(v.dtype)), q),
        "v": _tokens(_wide(v), q),
        "scale": 1.0,
        "initial_state": None if state is None else _heads(_wide(state.float(), rows=True), q).contiguous(),
        "output_final_state": True,
    }


def _decay(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """[B, G, T, 1 or K], or what broadcasts to it -> fp32 [B, T, H, 1 or K], no stronger than the kernels can do."""
    log_decay = log_decay.float().clamp(min=STRONGEST).expand(*k.shape[:3], log_decay.shape[-1])
    return _tokens(_wide(log_decay) if log_decay.shape[-1] > 1 else log_decay, q)


def _from_fla(y: Tensor, final: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, H, T, V] in q's dtype, and one state per key head: all query heads of a group have the same."""
    K, V = k.shape[-1], v.shape[-1]
    return y[..., :V].transpose(1, 2).to(q.dtype), final[:, :: q.shape[1] // k.shape[1], :K, :V]
