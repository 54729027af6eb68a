"""The additive recurrence as RWKV reads it: before the write, with a bonus for the token itself (arXiv 2404.05892).

S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ,  y_t = q_tᵀ (S_{t-1} + diag(u) k_t v_tᵀ).

Shapes as in ops/additive.py; bonus u [H, K]. The state is S_{t-1} [B, G, K, V] beside the token that waits to be
written into it: k [B, G, 1, K], v [B, G, 1, V] and g [B, G, 1, K], all fp32 zeros at first. A token that does not exist
does not push that one in.
"""

import torch
from torch import Tensor

from ..ops import additive, run_additive

State = tuple[Tensor, Tensor, Tensor, Tensor]


def empty_state(batch: int, kv_heads: int, key_width: int, value_width: int, device: torch.device) -> State:
    """fp32 zeros."""
    S = torch.zeros(batch, kv_heads, key_width, value_width, device=device)
    k = S.new_zeros(batch, kv_heads, 1, key_width)
    return S, k, S.new_zeros(batch, kv_heads, 1, value_width), k.clone()


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, exists: Tensor, bonus: Tensor, state: State
) -> tuple[Tensor, State]:
    """y [B, H, T, V] in q's dtype, and the state after the last token.

    Args:
        log_decay: [B, G, T, K], or 1 for K.
        exists: [B, G, T, 1], 1 for a token and 0 for none, whose k, v and g are 0.
    """
    B, H, T, K = q.shape
    S, waiting = state[0], state[1:]
    writes = (k, v, log_decay.expand(*k.shape[:3], K))
    k, v, g = (torch.cat([old, new.to(S.dtype)], 2) for old, new in zip(waiting, writes, strict=True))
    there = torch.cat([S.new_ones(B, k.shape[1], 1, 1), exists.to(S.dtype)], 2)
    # The last token that exists goes on waiting.
    last = there * (there.flip(2).cumsum(2).flip(2) == 1)
    y, S = run_additive(q, (k * (1 - last))[:, :, :-1], v[:, :, :-1], (g * (1 - last))[:, :, :-1], S)
    own = _own(q, k[:, :, 1:], v[:, :, 1:], bonus)
    k, v, g = ((x * last).sum(2, keepdim=True) for x in (k, v, g))
    return (y + own).to(q.dtype), (S, k, v, g)


def _own(q: Tensor, k: Tensor, v: Tensor, bonus: Tensor) -> Tensor:
    """(qᵀ diag(u) k) v of the token itself."""
    B, H, T, K = q.shape
    G = k.shape[1]
    weight = (q.view(B, G, H // G, T, K) * bonus.view(G, H // G, 1, K) * k[:, :, None]).sum(-1, keepdim=True)
    return (weight * v[:, :, None]).flatten(1, 2)


def absorb(k: Tensor, v: Tensor, log_decay: Tensor, exists: Tensor, state: State) -> None:
    """The writes of one token, into `state`, in place: the token that waited goes in, this one waits."""
    S, *waiting = state
    there = exists > 0
    old_k, old_v, old_g = waiting
    after = S * old_g.exp().mT + old_k.mT @ old_v
    S.copy_(torch.where(there, after, S))
    for old, new in zip(waiting, (k, v, log_decay), strict=True):
        old.copy_(torch.where(there, new.to(old.dtype), old))


def look(q: Tensor, bonus: Tensor, state: State) -> Tensor:
    """What one token reads: q [B, H, 1, K] -> [B, H, 1, V]."""
    S, k, v, _ = state
    return (additive.look(q, S) + _own(q, k, v, bonus)).to(q.dtype)


def naive(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: token by token, with every token in the state [B, G, K, V]."""
    rep = q.shape[1] // k.shape[1]
    y = []
    for t in range(q.shape[2]):
        write = k[:, :, t, :, None] * v[:, :, t, None, :]
        read, own = (x.repeat_interleave(rep, 1) for x in (state, write))
        y.append((q[:, :, t, None] @ (read + bonus[..., None] * own)).squeeze(2))
        state = state * log_decay.expand(*k.shape[:3], -1)[:, :, t, :, None].exp() + write
    return torch.stack(y, dim=2), state
