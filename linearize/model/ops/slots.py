"""Gated slot attention (GSA, arXiv 2409.07146): M slots that hold keys and values, read by a softmax over slots.

Per token, every slot fades by e^{g} and takes the token in with a weight s (1 − e^{g} in the paper):

    Kˢ_t = Kˢ_{t-1} diag(e^{g_t}) + k_t s_tᵀ,  p_t = softmax(Kˢ_tᵀ q_t),
    Vˢ_t = diag(e^{g_t}) Vˢ_{t-1} + s_t v_tᵀ,  y_t = Vˢ_tᵀ p_t.

The second pass is the additive recurrence with slots for channels. In the first the decay sits on what is read out, not
on what is summed over; its chunks are the same algebra turned round.

Letters and shapes as in ops/additive.py; M slots; write s and log_decay g ≤ 0 [B, G, T, M]; state (keys [B, G, K, M],
values [B, G, M, V]) fp32. A token with s = 0 and g = 0 leaves no trace.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import additive, chooses_fla, fla_backend, run_additive
from ..ops.additive import CHUNK, LEAF, _after, _between, _centred, _leaf

State = tuple[Tensor, Tensor]


def empty_state(batch: int, kv_heads: int, key_width: int, value_width: int, slots: int, device: torch.device) -> State:
    """fp32 zeros."""
    keys = torch.zeros(batch, kv_heads, key_width, slots, device=device)
    return keys, torch.zeros(batch, kv_heads, slots, value_width, device=device)


def naive_recurrent(
    q: Tensor, k: Tensor, v: Tensor, write: Tensor, log_decay: Tensor, state: State
) -> tuple[Tensor, State]:
    """Token by token: the definition, and the oracle of the other forms."""
    dtype = q.dtype
    rep = q.shape[1] // k.shape[1]
    q, k, v, s, g = (x.to(state[0].dtype) for x in (q, k, v, write, log_decay))
    keys, values = state
    y = []
    for t in range(q.shape[2]):
        decay = g[:, :, t].exp()
        keys = keys * decay[:, :, None] + k[:, :, t, :, None] * s[:, :, t, None]
        values = values * decay[..., None] + s[:, :, t, :, None] * v[:, :, t, None]
        p = (q[:, :, t, None] @ keys.repeat_interleave(rep, 1)).softmax(-1)
        y.append((p @ values.repeat_interleave(rep, 1)).squeeze(2))
    return torch.stack(y, dim=2).to(dtype), (keys, values)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    log_decay: Tensor,
    state: State,
    *,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """y [B, H, T, V] in q's dtype and the new state, by whatever runs it here (ops/__init__.py).

    Args:
        backend: as `ops.chooses_fla`.

    Raises:
        InputError: as `ops.chooses_fla`.
    """
    if chooses_fla(q, fla_backend.restriction(q, v), backend):
        return fla_backend.slots(q, k, v, write, log_decay, state)
    y, _, state = weighted(q, k, v, write, log_decay, state)
    return y, state


def weighted(
    q: Tensor, k: Tensor, v: Tensor, write: Tensor, log_decay: Tensor, state: State
) -> tuple[Tensor, Tensor, State]:
    """Both passes in chunks, linear in T: y [B, H, T, V] in q's dtype, ln Σ_m e^{Kˢ_tᵀ q_t} [B, H, T] and the state."""
    scores, keys = _read_keys(q, k, write, log_decay, state[0])
    y, values = run_additive(scores.softmax(-1), write, v, log_decay, state[1], backend="torch")
    return y.to(q.dtype), scores.logsumexp(-1), (keys, values)


def absorb(k: Tensor, v: Tensor, write: Tensor, log_decay: Tensor, state: State) -> None:
    """The writes of one token, into both states, in place."""
    keys, values = state
    k, v, s, decay = (x.to(keys.dtype) for x in (k, v, write, log_decay.exp()))
    keys.mul_(decay).add_(k.mT * s)
    values.mul_(decay.mT).add_(s.mT * v)


def look(q: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """What one token reads: q [B, H, 1, K] -> y [B, H, 1, V] in q's dtype, and ln Σ_m e^{Kˢᵀ q} [B, H, 1]."""
    keys, values = state
    scores = additive.look(q.to(keys.dtype), keys)
    return additive.look(scores.softmax(-1), values).to(q.dtype), scores.logsumexp(-1)


def _read_keys(q: Tensor, k: Tensor, s: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Kˢ_tᵀ q_t for every token, [B, H, T, M], and the last Kˢ."""
    B, H, T, K = q.shape
    G, dtype = k.shape[1], S.dtype
    if T == 0:
        return q.new_zeros(B, H, 0, S.shape[-1], dtype=dtype), S
    C = min(CHUNK, max(LEAF, 1 << (T - 1).bit_length()))
    q, k, s, g = (F.pad(x.to(dtype), (0, 0, 0, -T % C)).unflatten(2, (-1, C)) for x in (q, k, s, g))
    q = q.unflatten(1, (G, -1)).transpose(2, 3)
    whole = g.sum(-2, keepdim=True).exp()
    update = k.mT @ (s * _after(g).exp())
    before = []
    for decay, added in zip(whole.unbind(2), update.unbind(2), strict=True):
        before.append(S)
        S = torch.addcmul(added, S, decay)
    carried = (q @ torch.stack(before, dim=2).unsqueeze(3)) * g.cumsum(-2).exp().unsqueeze(3)
    y = carried + _decayed(torch.tril(q @ k.unsqueeze(3).mT), s, g, _leaf(g))
    return y.transpose(2, 3).reshape(B, H, -1, S.shape[-1])[:, :, :T], S


def _decayed(A: Tensor, s: Tensor, g: Tensor, leaf: int) -> Tensor:
    """Σ_{j ≤ i} A_ij s_j e^{g_{j+1} + … + g_i}, with no large exponent: `additive._halves`, decays on the other side.

    A [..., r, C, C] lower triangular, s and g [..., C, M] -> [..., r, C, M].
    """
    C = A.shape[-1]
    if leaf >= C:
        G = _centred(g)
        return (A @ (s * G.neg().exp()).unsqueeze(-3)) * G.exp().unsqueeze(-3)
    if C <= LEAF:
        return torch.einsum("...rij,...ijm->...rim", A, _between(g).exp() * s.unsqueeze(-3))
    h = C // 2
    first, second = g[..., :h, :], g[..., h:, :]
    upper = _decayed(A[..., :h, :h], s[..., :h, :], first, leaf)
    below = A[..., h:, :h] @ (s[..., :h, :] * _after(first).exp()).unsqueeze(-3)
    lower = _decayed(A[..., h:, h:], s[..., h:, :], second, leaf)
    return torch.cat([upper, torch.addcmul(lower, below, second.cumsum(-2).exp().unsqueeze(-3))], dim=-2)
