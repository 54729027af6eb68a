"""All calls of flash-linear-attention's Triton kernels: our layout in, our layout out.

fla takes [B, T, H, ·] with as many heads of keys as of queries, decays in log space, a scale (ours is in the queries
already: 1.0) and fp32 states [B, H, K, V]. Without triton `import fla` works and is empty, so what is probed is the
module with the kernels; it is imported on the first call with a CUDA tensor, not before (it takes seconds).

Shapes as in ops/additive.py. Written against fla-core 0.6.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

WIDEST = 256
"""Largest key width of the kernels: those of the delta rule assert it, the others slow down beyond it."""


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot be imported, or None."""
    try:
        import_module("fla.ops.gla")
    except ImportError as error:
        return f"fla.ops.gla cannot be imported ({error}); pip install 'linearize[cuda]' installs it"
    return None


def restriction(q: Tensor, v: Tensor) -> str | None:
    """What about queries [B, H, T, K] and values [B, G, T, V] the kernels cannot do, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"they compute in 32 bits or fewer, and the queries are {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads may be {WIDEST} wide, and these are {q.shape[-1]} (keys) and {v.shape[-1]} (values)"
    if q.shape[2] == 0:
        return "they need at least one token"
    return None


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
    return _from_fla(y, final, q, k)


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ops.delta.chunked`, with its arguments."""
    tensors = _to_fla(q, k, v, state)
    tensors["beta"] = _heads(beta, q).transpose(1, 2).squeeze(-1).contiguous()
    if log_decay is not None and log_decay.shape[-1] > 1:
        y, final = kernel("kda", "chunk_kda")(**tensors, g=_decay(q, k, log_decay))
    elif log_decay is None and v.dtype != torch.float32:
        y, final = kernel("delta_rule", "chunk_delta_rule")(**tensors)
    else:
        # chunk_delta_rule refuses fp32; with a decay of 1 this is the same rule.
        g = torch.zeros_like(beta) if log_decay is None else log_decay
        y, final = kernel("gated_delta_rule", "chunk_gated_delta_rule")(**tensors, g=_decay(q, k, g).squeeze(-1))
    return _from_fla(y, final, q, k)


def slots(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, log_decay: Tensor, state: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`ops.slots.run`, with its arguments. The kernel expands the groups by itself."""
    tensors = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "s": input_gate.to(v.dtype), "g": log_decay.float()}
    tensors = {name: x.transpose(1, 2).contiguous() for name, x in tensors.items()}
    state = (state[0].float(), state[1].float())
    y, final = kernel("gsa", "chunk_gsa")(**tensors, scale=1.0, initial_state=state, output_final_state=True)
    return y.transpose(1, 2).to(q.dtype), (final[0], final[1])


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """[B, G, ...] -> [B, H, ...]: each key head once for every query head that reads it."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _to_fla(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> dict:
    """The arguments that all kernels share. They want one dtype: the values'."""
    return {
        "q": q.to(v.dtype).transpose(1, 2).contiguous(),
        "k": _heads(k.to(v.dtype), q).transpose(1, 2).contiguous(),
        "v": _heads(v, q).transpose(1, 2).contiguous(),
        "scale": 1.0,
        "initial_state": None if state is None else _heads(state.float(), q).contiguous(),
        "output_final_state": True,
    }


def _decay(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """[B, G, T, 1 or K], or what broadcasts to it -> fp32 [B, T, H, 1 or K]."""
    log_decay = log_decay.float().expand(*k.shape[:3], log_decay.shape[-1])
    return _heads(log_decay, q).transpose(1, 2).contiguous()


def _from_fla(y: Tensor, final: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, H, T, V] in q's dtype, and one state per key head: all query heads of a group have the same."""
    return y.transpose(1, 2).to(q.dtype), final[:, :: q.shape[1] // k.shape[1]]
