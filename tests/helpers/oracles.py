"""What recurrences are held against: the definition of each family that the package itself has no use for, and fla's
naive PyTorch references, loaded by file (importing the package fla needs triton)."""

import functools
import importlib.util
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from linearize.model.ops import clusters
from linearize.model.ops.window import bias_of, normalise, scores


@functools.cache
def fla_naive(name: str, file: str = "naive") -> ModuleType:
    """fla/ops/NAME/FILE.py as a module of its own."""
    path = Path(str(distribution("fla-core").locate_file("fla"))) / "ops" / name / f"{file}.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{name.replace('/', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_bonus(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence with a bonus, token by token, with every token in the state [B, G, K, V]."""
    rep = q.shape[1] // k.shape[1]
    y = []
    for t in range(q.shape[2]):
        write = k[:, :, t, :, None] * v[:, :, t, None, :]
        read, own = (x.repeat_interleave(rep, 1) for x in (state, write))
        y.append((q[:, :, t, None] @ (read + bonus[..., None] * own)).squeeze(2))
        state = state * log_decay.expand(*k.shape[:3], -1)[:, :, t, :, None].exp() + write
    return torch.stack(y, dim=2), state


def rotated(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, angle: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence with a complex decay, token by token with a complex state [B, G, K, V]."""
    rep = q.shape[1] // k.shape[1]
    y = []
    for t in range(q.shape[2]):
        decay = torch.polar(log_decay[:, :, t].exp().expand_as(angle[:, :, t]), angle[:, :, t])
        state = state * decay[..., None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        y.append((q[:, :, t, None].to(state.dtype) @ state.repeat_interleave(rep, 1)).real.squeeze(2))
    return torch.stack(y, dim=2), state


def expanded(q: Tensor, k: Tensor, v1: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The expansion from explicit T×T scores, for rows that start empty; q scaled, no strength."""
    rep = q.shape[1] // k.shape[1]
    a = q @ k.repeat_interleave(rep, 1).mT
    total = log_decay.cumsum(2)
    decays = (total - total.mT).exp().tril() * v1[..., -1][:, :, None, :]
    weight = decays.repeat_interleave(rep, 1)
    n = weight.sum(-1, keepdim=True)
    safe = n.clamp(min=torch.finfo(n.dtype).tiny)
    mean = (a * weight).sum(-1, keepdim=True) / safe
    y = (weight * (1 + a - mean) / safe) @ v1[..., :-1].repeat_interleave(rep, 1)
    return y, (n.log() + mean).squeeze(-1)


def naive_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, sinks: int, scaling: float, softcap=None, extra=None
) -> tuple[Tensor, Tensor]:
    """`window_attention` over whole rows q [B, H, T, K], k, v [B, G, T, ·] with an explicit T×T mask."""
    B, H, T, K = q.shape
    G = k.shape[1]
    t = torch.arange(T, device=q.device)
    distance = t[:, None] - t
    mask = (distance >= 0) & ((distance < window) | (t < sinks))
    a = scores(q.view(B, G, H // G, T, K), k, bias_of(mask), scaling, softcap)
    extra = None if extra is None else extra.float().view(G, H // G, 1, 1)
    p, lse = normalise(a, extra)
    return (p.to(q.dtype) @ v[:, :, None]).reshape(B, H, T, -1), lse.reshape(B, H, T)


def clustered(
    q: Tensor, k: Tensor, v: Tensor, exists: Tensor, state: clusters.State, rule: clusters.Rule
) -> tuple[Tensor, Tensor, clusters.State]:
    """`clusters.run` token by token."""
    y, weight = [], []
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        state = tuple(x.clone() for x in state)
        clusters.update_state(k[:, :, now], v[:, :, now], exists[:, :, now], state, rule)
        y_t, weight_t = clusters.read_state(q[:, :, now], state, rule)
        y.append(y_t)
        weight.append(weight_t)
    return torch.cat(y, 2), torch.cat(weight, 2), state
