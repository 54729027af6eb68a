"""The running softmax average y_t = Σ_{j ≤ t} e^{s_j} v_j / Σ_{j ≤ t} e^{s_j} (Aaren, arXiv 2405.13956).

As a recurrence over [v_t, 1], with m_t = max_{j ≤ t} s_j: U_t = e^{m_{t-1} − m_t} U_{t-1} + e^{s_t − m_t} [v_t, 1], and
y_t is U's values over its last entry: a diagonal scan (ops/diagonal.py) with both exponents ≤ 0, for scores of any
size. The maximum is exact in floating point; the log-sum n_t, which would do in exact arithmetic, is not: where it is
large, its rounding exceeds the 1/t by which it grows. y does not depend on m, so m has no gradient.

Letters: B rows, H heads with a score each, G value heads (H = r·G), T tokens, V value width. Shapes: score
[B, H, T, 1]; v [B, G, T, V + 1] with ones in the last column, zeros for a token that does not exist, which leaves no
trace whatever its score; state [B, H, V + 2] fp32, U beside m, all zero where nothing was seen. All forms compute in
fp32 (fp64 for fp64 inputs) and return y [B, H, T, V] in v's dtype (0 before the first token), its log weight n_t =
log Σ e^{s_j} [B, H, T] in fp32 (−∞ before the first token), and the state.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import diagonal


def recurrent(score: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the chunked form. Arguments and result as of `chunked`."""
    return _by_scan(diagonal.recurrent, score, v, state)


def update_state(score: Tensor, v: Tensor, state: Tensor) -> None:
    """Take in one token (T = 1; shapes as of `chunked`). `state` is updated in place."""
    state.copy_(recurrent(score, v, state)[2])


def read_state(state: Tensor) -> tuple[Tensor, Tensor]:
    """What one token reads: y [B, H, 1, V] and its log weight [B, H, 1], in the state's dtype."""
    return _mean(state[:, :, None, :-1], state[:, :, None, -1:])


def chunked(score: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """By the chunked scan: linear in T.

    Args:
        score: [B, H, T, 1].
        v: [B, G, T, V + 1], its last column 1, or all 0 for a token that does not exist.
        state: initial state [B, H, V + 2]; None stands for zeros.

    Returns:
        y [B, H, T, V] in v's dtype, its log weight [B, H, T] fp32, and the final state.
    """
    return _by_scan(diagonal.chunked, score, v, state)


def _by_scan(
    scan: Callable[..., tuple[Tensor, Tensor]], score: Tensor, v: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    s, m, values = _prepare(score, v, state)
    start, x = values[:, :, :1], (s - m).exp()[:, :, 1:] * values[:, :, 1:]
    U, _ = scan(x, m[:, :, :-1] - m[:, :, 1:], state=start.squeeze(2))
    return _read(torch.cat([start, U], dim=2), m, v.dtype)


def _prepare(score: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The state as a token before the first one: scores and their running maximum [B, H, 1 + T, 1], and values
    [B, H, 1 + T, V + 1]."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    B, H = score.shape[:2]
    v = v.to(dtype).repeat_interleave(H // v.shape[1], dim=1)
    state = v.new_zeros(B, H, v.shape[-1] + 1) if state is None else state.to(dtype)
    values = torch.cat([state[:, :, None, :-1], v], dim=2)
    s = torch.cat([state[:, :, None, -1:], score.to(dtype)], dim=2)
    # Finite where nothing exists, so that no difference of two is undefined.
    s = s.masked_fill(values[..., -1:] == 0, torch.finfo(dtype).min)
    return s, s.detach().cummax(2).values, values


def _read(U: Tensor, m: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y and n of every token but the state's, and the last state."""
    y, n = _mean(U[:, :, 1:], m[:, :, 1:])
    last = U[:, :, -1]
    # Where nothing was seen, m is no score: the state stays the zeros it was.
    return y.to(dtype), n, torch.cat([last, m[:, :, -1].masked_fill(last[..., -1:] == 0, 0.0)], dim=-1)


def _mean(U: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """y [..., V] and n [...] from sums U [..., V + 1] and the maximum m [..., 1] that they are relative to."""
    total = U[..., -1:]
    weight = total.clamp(min=torch.finfo(U.dtype).tiny)
    n = (weight.log() + m).masked_fill(total == 0, float("-inf"))
    return U[..., :-1] / weight, n.squeeze(-1)
