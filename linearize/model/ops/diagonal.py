"""The diagonal recurrence h_t = a_t ∘ h_{t-1} + x_t, one number per channel.

One family for RG-LRU (Griffin, arXiv 2402.19427), HGRN (arXiv 2311.04823), minGRU and minLSTM (arXiv 2410.01201), and,
with a complex a, LRU (arXiv 2303.06349). Letters: B rows, G heads, T tokens, V width, C chunk. Shapes: x [B, G, T, V],
log_decay = log |a| ≤ 0 and phase = arg a in radians (None where a is real) of x's shape or anything that broadcasts to
it; state [B, G, V]. All forms compute in fp32 (fp64 for fp64 inputs) and return (h [B, G, T, V], state): h in x's dtype
and the state in fp32 where x and a are real, both in complex64 (complex128) otherwise. A token with x = 0, log_decay =
0 and phase = 0 leaves no trace.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .decay import CHUNK


def recurrent(
    x: Tensor, log_decay: Tensor, phase: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the oracle of the chunked form. Arguments and result as of `chunked`."""
    a, y, h, dtype = _prepare(x, log_decay, phase, state)
    out = []
    for t in range(x.shape[2]):
        h = a[:, :, t] * h + y[:, :, t]
        out.append(h)
    return (torch.stack(out, dim=2) if out else y).to(dtype), h


def update_state(x: Tensor, log_decay: Tensor, phase: Tensor | None, state: Tensor) -> None:
    """Take in one token (T = 1; shapes as of `chunked`). `state` is updated in place, and is what the token reads."""
    a, y, _, _ = _prepare(x, log_decay, phase, state)
    state.mul_(a[:, :, 0]).add_(y[:, :, 0])


def chunked(
    x: Tensor, log_decay: Tensor, phase: Tensor | None = None, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens side by side, then the states between them: C + T/C steps instead of T, linear in memory.

    Args:
        x: [B, G, T, V].
        log_decay: log |a| ≤ 0, what broadcasts to x's shape.
        phase: arg a in radians, what broadcasts to x's shape, or None where a is real.
        state: initial state [B, G, V], complex with a phase; None stands for zeros.
        chunk: C.

    Returns:
        h [B, G, T, V], in x's dtype where it is real, and the final state.
    """
    a, y, h, dtype = _prepare(x, log_decay, phase, state)
    if x.shape[2] == 0:
        return y.to(dtype), h
    out: Tensor = _Scan.apply(a, y, h, chunk)  # pyright: ignore[reportAssignmentType]
    # A copy: `update_state` writes into it.
    return out.to(dtype), out[:, :, -1].clone()


def _prepare(
    x: Tensor, log_decay: Tensor, phase: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """Upcast; a of x's shape; make the state; and the dtype of the output."""
    real = torch.promote_types(x.real.dtype, torch.float32)
    a = _factor(log_decay.to(real), None if phase is None else phase.to(real)).expand(x.shape)
    dtype = torch.promote_types(a.dtype, x.dtype)
    y = x.to(dtype)
    h = y.new_zeros(*x.shape[:2], x.shape[3]) if state is None else state.to(dtype)
    return a.to(dtype), y, h, dtype if dtype.is_complex else x.dtype


def _factor(size: Tensor, angle: Tensor | None) -> Tensor:
    """e^{size + i angle}; through the modulus, so that a size of −∞ gives 0."""
    return size.exp() if angle is None else torch.polar(size.exp(), angle)


class _Scan(torch.autograd.Function):
    """The gradient of a scan is a scan from the end, and nothing but a and h is kept for it."""

    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor, state: Tensor, chunk: int) -> Tensor:
        h = _scan(a, x, state, chunk)
        ctx.save_for_backward(a, h, state)
        ctx.chunk = chunk
        return h

    @staticmethod
    def backward(ctx, *grads: Tensor):
        a, h, state = ctx.saved_tensors
        before = torch.cat([state.unsqueeze(2), h[:, :, :-1]], dim=2)
        back = F.pad(a[:, :, 1:].conj(), (0, 0, 0, 1)).flip(2)
        grad: Tensor = _Scan.apply(back, grads[0].flip(2), torch.zeros_like(state), ctx.chunk).flip(2)  # pyright: ignore
        return grad * before.conj(), grad, a[:, :, 0].conj() * grad[:, :, 0], None


def _scan(a: Tensor, x: Tensor, state: Tensor, chunk: int) -> Tensor:
    """h of every token, T ≥ 1. Twice through every chunk: for its end from an empty start, and from its start."""
    B, G, T, V = x.shape
    C = min(chunk, T)
    pad = -T % C
    if pad:
        a, x = (F.pad(z, (0, 0, 0, pad)) for z in (a, x))
    a, x = (z.unflatten(2, (-1, C)) for z in (a, x))
    decay, end = a[..., 0, :].clone(), x[..., 0, :].clone()
    for c in range(1, C):
        decay.mul_(a[..., c, :])
        torch.addcmul(x[..., c, :], a[..., c, :], end, out=end)
    start = torch.empty_like(end)
    for n in range(end.shape[2]):
        start[:, :, n] = state
        state = torch.addcmul(end[:, :, n], decay[:, :, n], state)
    h = x.new_empty(x.shape)
    for c in range(C):
        start = torch.addcmul(x[..., c, :], a[..., c, :], start, out=h[..., c, :])
    return h.flatten(2, 3)[:, :, :T]
