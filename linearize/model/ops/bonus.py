"""The additive recurrence as RWKV reads it: before the write, with a bonus for the token itself (arXiv 2404.05892).

S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ,  y_t = q_tᵀ (S_{t-1} + diag(u) k_t v_tᵀ).

Shapes as in ops/additive.py; bonus u [H, K]. The state is S_{t-1} [B, G, K, V] beside the token that waits to be
written into it: k [B, G, 1, K], v [B, G, 1, V] and g [B, G, 1, K], all fp32 zeros at first. A token that does not exist
does not push that one in.
"""

import torch
from torch import Tensor

from . import additive, run_additive

State = tuple[Tensor, Tensor, Tensor, Tensor]


def initial_state(batch: int, kv_heads: int, key_width: int, value_width: int, device: torch.device) -> State:
    """fp32 zeros on `device`: S, and the token that waits, as the head of this file says."""
    S = torch.zeros(batch, kv_heads, key_width, value_width, device=device)
    k = S.new_zeros(batch, kv_heads, 1, key_width)
    return S, k, S.new_zeros(batch, kv_heads, 1, value_width), k.clone()


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, exists: Tensor, bonus: Tensor, state: State
) -> tuple[Tensor, State]:
    """Read and take in a block of tokens.

    Args:
        q: [B, H, T, K].
        k: [B, G, T, K].
        v: [B, G, T, V].
        log_decay: [B, G, T, K], or 1 for K.
        exists: [B, G, T, 1], 1 for a token and 0 for none, whose k, v and g are 0.
        bonus: u [H, K].
        state: as `initial_state` makes it.

    Returns:
        y [B, H, T, V] in q's dtype, and the final state.
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


def update_state(k: Tensor, v: Tensor, log_decay: Tensor, exists: Tensor, state: State) -> None:
    """Take in one token (T = 1; shapes as of `run`): the one that waited goes into S, this one waits. In place."""
    S, *waiting = state
    there = exists > 0
    old_k, old_v, old_g = waiting
    after = S * old_g.exp().mT + old_k.mT @ old_v
    S.copy_(torch.where(there, after, S))
    for old, new in zip(waiting, (k, v, log_decay), strict=True):
        old.copy_(torch.where(there, new.to(old.dtype), old))


def read_state(q: Tensor, bonus: Tensor, state: State) -> Tensor:
    """What one token q [B, H, 1, K] reads, once it waits in the state; u [H, K] -> y [B, H, 1, V] in q's dtype."""
    S, k, v, _ = state
    return (additive.read_state(q, S) + _own(q, k, v, bonus)).to(q.dtype)
