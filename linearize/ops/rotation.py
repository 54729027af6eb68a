"""The additive recurrence with a complex decay per channel, e^{g + iθ} (GateLoop, arXiv 2311.01927).

S_t = diag(e^{g_t + iθ_t}) S_{t-1} + k_t v_tᵀ,  y_t = Re(q_tᵀ S_t), with real q, k, v.

With the phase Φ_t = θ_1 + … + θ_t, Re(q e^{iΦ_t} k e^{−iΦ_j}) = q k (cos Φ_t cos Φ_j + sin Φ_t sin Φ_j): queries and
keys turned by Φ, as 2K real channels, make it the real recurrence. The state is kept in the turned frame, beside Φ.

Shapes as in ops/additive.py; angle θ [B, G, T, K]; state ([B, G, 2K, V], phase [B, G, 1, K]), both fp32 zeros at first.
A token with k = 0, g = 0 and θ = 0 leaves no trace.
"""

import math

import torch
from torch import Tensor

from linearize.ops import run_additive

State = tuple[Tensor, Tensor]


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, angle: Tensor, state: State, decoding: bool = False
) -> tuple[Tensor, State]:
    """y [B, H, T, V] in q's dtype, and the state after the last token.

    Args:
        log_decay: [B, G, T, K] or [B, G, T, 1].
        decoding: T = 1 and the state is updated in place.
    """
    G, T, K = k.shape[1:]
    S, start = state
    # Summed in fp64 and kept below 2π: at token 16,384 an fp32 sum of angles would be off by thousandths.
    phase = (start.double() + angle.double().cumsum(-2)).remainder(2 * math.pi).to(S.dtype)
    turn = torch.cat([phase.cos(), phase.sin()], dim=-1)
    q = (torch.cat([q, q], dim=-1).unflatten(1, (G, -1)) * turn[:, :, None]).flatten(1, 2).to(q.dtype)
    k = torch.cat([k, k], dim=-1) * turn
    if log_decay.shape[-1] == K:
        log_decay = torch.cat([log_decay, log_decay], dim=-1)
    y, S = run_additive(q, k, v, log_decay, S, decoding=decoding)
    if decoding:
        return y, (S, start.copy_(phase))
    return y, (S, phase[:, :, -1:] if T else start)


def naive(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, angle: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: token by token with a complex state [B, G, K, V]."""
    rep = q.shape[1] // k.shape[1]
    y = []
    for t in range(q.shape[2]):
        decay = torch.polar(log_decay[:, :, t].exp().expand_as(angle[:, :, t]), angle[:, :, t])
        state = state * decay[..., None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        y.append((q[:, :, t, None].to(state.dtype) @ state.repeat_interleave(rep, 1)).real.squeeze(2))
    return torch.stack(y, dim=2), state
