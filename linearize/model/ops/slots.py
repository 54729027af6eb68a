"""Gated slot attention (GSA, arXiv 2409.07146): M slots that hold keys and values, read by a softmax over slots.

Per token, every slot fades by e^{g} and takes the token in with a weight s (1 − e^{g} in the paper):

    Kˢ_t = Kˢ_{t-1} diag(e^{g_t}) + k_t s_tᵀ,  p_t = softmax(Kˢ_tᵀ q_t),
    Vˢ_t = diag(e^{g_t}) Vˢ_{t-1} + s_t v_tᵀ,  y_t = Vˢ_tᵀ p_t.

The second pass is the additive recurrence with slots for channels. In the first the decay sits on what is read out, not
on what is summed over; its chunks are the same algebra turned round.

Letters and shapes as in ops/additive.py; M slots; input gate s and log_decay g ≤ 0 [B, G, T, M]; state (keys
[B, G, K, M], values [B, G, M, V]) fp32. A token with s = 0 and g = 0 leaves no trace.
"""

import torch
from torch import Tensor

from . import additive, chooses_fla, fla_backend, run_additive
from .decay import CHUNK, LEAF, after, between, centred, chunk_size, into_chunks, leaf_width

State = tuple[Tensor, Tensor]


def initial_state(
    batch: int, kv_heads: int, key_width: int, value_width: int, slots: int, device: torch.device
) -> State:
    """fp32 zeros on `device`: keys and values of M = `slots` slots."""
    keys = torch.zeros(batch, kv_heads, key_width, slots, device=device)
    return keys, torch.zeros(batch, kv_heads, slots, value_width, device=device)


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, log_decay: Tensor, state: State
) -> tuple[Tensor, State]:
    """Token by token: the definition, and the oracle of the chunked form. Arguments and result as of `run`."""
    dtype = q.dtype
    rep = q.shape[1] // k.shape[1]
    q, k, v, s, g = (x.to(state[0].dtype) for x in (q, k, v, input_gate, log_decay))
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
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, log_decay: Tensor, state: State, *, backend: str | None = None
) -> tuple[Tensor, State]:
    """Both passes, by whatever runs them here (ops/__init__.py).

    Args:
        q: [B, H, T, K].
        k: [B, G, T, K].
        v: [B, G, T, V].
        input_gate: s [B, G, T, M].
        log_decay: g ≤ 0 [B, G, T, M].
        state: as `initial_state` makes it.
        backend: as of `ops.chooses_fla`.

    Returns:
        y [B, H, T, V] in q's dtype, and the final state.

    Raises:
        InputError: as `ops.chooses_fla`.
    """
    if chooses_fla(q, fla_backend.restriction(q, v, "slots"), backend):
        return fla_backend.slots(q, k, v, input_gate, log_decay, state)
    y, _, state = weighted(q, k, v, input_gate, log_decay, state)
    return y, state


def weighted(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, log_decay: Tensor, state: State
) -> tuple[Tensor, Tensor, State]:
    """`run` in chunks, linear in T, with ln Σ_m e^{Kˢ_tᵀ q_t} [B, H, T] fp32 between y and the final state."""
    scores, keys = _read_keys(q, k, input_gate, log_decay, state[0])
    y, values = run_additive(scores.softmax(-1), input_gate, v, log_decay, state[1], backend="torch")
    return y.to(q.dtype), scores.logsumexp(-1), (keys, values)


def update_state(k: Tensor, v: Tensor, input_gate: Tensor, log_decay: Tensor, state: State) -> None:
    """Take in one token (T = 1; shapes as of `run`). `state` is updated in place."""
    keys, values = state
    k, v, s, decay = (x.to(keys.dtype) for x in (k, v, input_gate, log_decay.exp()))
    keys.mul_(decay).add_(k.mT * s)
    values.mul_(decay.mT).add_(s.mT * v)


def read_state(q: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """What one token q [B, H, 1, K] reads: y [B, H, 1, V] in q's dtype, and ln Σ_m e^{Kˢᵀ q} [B, H, 1]."""
    keys, values = state
    scores = additive.read_state(q.to(keys.dtype), keys)
    return additive.read_state(scores.softmax(-1), values).to(q.dtype), scores.logsumexp(-1)


def _read_keys(q: Tensor, k: Tensor, s: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Kˢ_tᵀ q_t for every token, [B, H, T, M], and the last Kˢ."""
    B, H, T, K = q.shape
    G, dtype = k.shape[1], S.dtype
    if T == 0:
        return q.new_zeros(B, H, 0, S.shape[-1], dtype=dtype), S
    q, k, s, g = (into_chunks(x.to(dtype), chunk_size(T, CHUNK)) for x in (q, k, s, g))
    q = q.unflatten(1, (G, -1)).transpose(2, 3)
    whole = g.sum(-2, keepdim=True).exp()
    update = k.mT @ (s * after(g).exp())
    before = []
    for decay, added in zip(whole.unbind(2), update.unbind(2), strict=True):
        before.append(S)
        S = torch.addcmul(added, S, decay)
    carried = (q @ torch.stack(before, dim=2).unsqueeze(3)) * g.cumsum(-2).exp().unsqueeze(3)
    y = carried + _decayed(torch.tril(q @ k.unsqueeze(3).mT), s, g, leaf_width(g))
    return y.transpose(2, 3).reshape(B, H, -1, S.shape[-1])[:, :, :T], S


def _decayed(A: Tensor, s: Tensor, g: Tensor, leaf: int) -> Tensor:
    """Σ_{j ≤ i} A_ij s_j e^{g_{j+1} + … + g_i}, with no large exponent: as `decay.pairs`, decays on the other side.

    A [..., r, C, C] lower triangular, s and g [..., C, M] -> [..., r, C, M].
    """
    C = A.shape[-1]
    if leaf >= C:
        G = centred(g)
        return (A @ (s * G.neg().exp()).unsqueeze(-3)) * G.exp().unsqueeze(-3)
    if C <= LEAF:
        return torch.einsum("...rij,...ijm->...rim", A, between(g).exp() * s.unsqueeze(-3))
    h = C // 2
    first, second = g[..., :h, :], g[..., h:, :]
    upper = _decayed(A[..., :h, :h], s[..., :h, :], first, leaf)
    below = A[..., h:, :h] @ (s[..., :h, :] * after(first).exp()).unsqueeze(-3)
    lower = _decayed(A[..., h:, h:], s[..., h:, :], second, leaf)
    return torch.cat([upper, torch.addcmul(lower, below, second.cumsum(-2).exp().unsqueeze(-3))], dim=-2)
