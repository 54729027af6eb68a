"""The additive recurrence as RWKV reads it: before the write, with a bonus for the token itself (arXiv 2404.05892).

S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ,  y_t = q_tᵀ (S_{t-1} + diag(u) k_t v_tᵀ).

Shapes as in ops/additive.py; bonus u [H, K]. Reading S_{t-1} is the additive recurrence with every write one token
late.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops import additive, run_additive


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, decoding: bool = False
) -> tuple[Tensor, Tensor]:
    """y [B, H, T, V] in q's dtype, and the state after the last token.

    Args:
        decoding: T = 1 and the state is updated in place.
    """
    B, H, T, K = q.shape
    G = k.shape[1]
    own = (q.unflatten(1, (G, -1)) * bonus.view(G, H // G, 1, K) * k[:, :, None]).sum(-1, keepdim=True)
    own = (own * v[:, :, None]).flatten(1, 2)
    if T == 0:
        return own, state
    if decoding:
        y = (q.to(state.dtype).reshape(B, G, H // G, K) @ state).view(B, H, 1, -1)
        _, state = additive.step(q, k, v, log_decay, state)
        return (y + own).to(q.dtype), state
    g = log_decay.expand(B, G, T, log_decay.shape[-1])
    late_k, late_v, late_g = (F.pad(x[:, :, :-1], (0, 0, 1, 0)) for x in (k, v, g))
    y, before = run_additive(q, late_k, late_v, late_g, state)
    dtype = before.dtype
    last = k[:, :, -1:].mT.to(dtype) @ v[:, :, -1:].to(dtype)
    return (y + own).to(q.dtype), torch.addcmul(last, before, g[:, :, -1:].mT.to(dtype).exp())


def naive(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: token by token."""
    rep = q.shape[1] // k.shape[1]
    y = []
    for t in range(q.shape[2]):
        write = k[:, :, t, :, None] * v[:, :, t, None, :]
        read, own = (x.repeat_interleave(rep, 1) for x in (state, write))
        y.append((q[:, :, t, None] @ (read + bonus[..., None] * own)).squeeze(2))
        state = state * log_decay.expand(*k.shape[:3], -1)[:, :, t, :, None].exp() + write
    return torch.stack(y, dim=2), state
