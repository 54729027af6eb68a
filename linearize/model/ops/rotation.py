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

from . import additive, run_additive

State = tuple[Tensor, Tensor]


def initial_state(batch: int, kv_heads: int, key_width: int, value_width: int, device: torch.device) -> State:
    """fp32 zeros on `device`: the turned matrix and the phase."""
    S = torch.zeros(batch, kv_heads, 2 * key_width, value_width, device=device)
    return S, S.new_zeros(batch, kv_heads, 1, key_width)


def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, angle: Tensor, state: State) -> tuple[Tensor, State]:
    """Read and take in a block of tokens.

    Args:
        q: [B, H, T, K].
        k: [B, G, T, K].
        v: [B, G, T, V].
        log_decay: [B, G, T, K] or [B, G, T, 1].
        angle: θ [B, G, T, K], radians.
        state: as `initial_state` makes it.

    Returns:
        y [B, H, T, V] in q's dtype, and the final state.
    """
    S, start = state
    phase = _phase(angle, start)
    y, S = run_additive(_turn_queries(q, phase), *_turn(k, log_decay, phase, v), S)
    return y, (S, phase[:, :, -1:] if k.shape[2] else start)


def update_state(k: Tensor, v: Tensor, log_decay: Tensor, angle: Tensor, state: State) -> None:
    """Take in one token (T = 1; shapes as of `run`). `state` is updated in place."""
    S, phase = state
    phase.copy_(_phase(angle, phase))
    additive.update_state(*_turn(k, log_decay, phase, v), S)


def read_state(q: Tensor, state: State) -> Tensor:
    """What one token reads: q [B, H, 1, K] and the state of `initial_state` -> y [B, H, 1, V] in q's dtype."""
    S, phase = state
    return additive.read_state(_turn_queries(q, phase), S)


def _phase(angle: Tensor, start: Tensor) -> Tensor:
    """Φ [B, G, T, K]."""
    # Summed in fp64 and kept below 2π: at token 16,384 an fp32 sum of angles would be off by thousandths.
    return (start.double() + angle.double().cumsum(-2)).remainder(2 * math.pi).to(start.dtype)


def _turn_queries(q: Tensor, phase: Tensor) -> Tensor:
    turn = torch.cat([phase.cos(), phase.sin()], dim=-1)[:, :, None]
    return (torch.cat([q, q], dim=-1).unflatten(1, (phase.shape[1], -1)) * turn).flatten(1, 2).to(q.dtype)


def _turn(k: Tensor, log_decay: Tensor, phase: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and log_decay of the real recurrence."""
    if log_decay.shape[-1] == k.shape[-1]:
        log_decay = torch.cat([log_decay, log_decay], dim=-1)
    return torch.cat([k * phase.cos(), k * phase.sin()], dim=-1), v, log_decay
