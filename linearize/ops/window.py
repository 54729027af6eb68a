"""Sliding-window softmax attention with sinks, in O(T·W) time and memory.

Letters: B rows, H query heads, G key/value heads (H = r·G), T new tokens, K key width, V value width, W window, s
sinks, C block. Query t sees token j ≤ t when t − j < W or j < s; every token counts once. Keys come in two parts: the
sinks, and `local`, the W tokens before the new ones followed by the new ones, so that local index e is token n + e − W,
n being the number of tokens that came before. A query block of C needs C + W neighbouring local keys, whatever T is.

Source of the pattern: StreamingLLM, arXiv 2309.17453.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Queries per block: 64 makes the matrix products large enough for a CPU while W = 64 wastes only half of each
block."""


def scores(q: Tensor, k: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """The source's own attention scores, at least in fp32: q [..., M, K], k [..., N, K] -> [..., M, N]."""
    a = q @ k.mT
    a = a.to(torch.promote_types(a.dtype, torch.float32)) * scaling
    return a if softcap is None else softcap * torch.tanh(a / softcap)


def normalise(a: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of fp32 scores a [..., N] and their log-sum-exp [...]; `extra` [..., 1] is a logit without a value."""
    if extra is not None:
        a = torch.cat([a, extra.expand(*a.shape[:-1], 1)], dim=-1)
    p, lse = _Softmax.apply(a)  # type: ignore[misc]
    return p if extra is None else p[..., :-1], lse


class _Softmax(torch.autograd.Function):
    """Both at once: autograd would go through the largest scores, which takes longer than the softmax itself."""

    @staticmethod
    def forward(ctx, a):  # type: ignore[override]
        p = a.softmax(-1)
        ctx.save_for_backward(p)
        # For the largest score a, p = e^{a − lse}: two reductions instead of the dozen steps of logsumexp.
        return p, a.amax(-1) - p.amax(-1).log()

    @staticmethod
    def backward(ctx, p_grad, lse_grad):  # type: ignore[override]
        (p,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(p_grad, p, -1, p.dtype).addcmul_(p, lse_grad.unsqueeze(-1))


def window_attention(
    q: Tensor,
    local_k: Tensor,
    local_v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    *,
    seen: Tensor | int,
    window: int,
    scaling: float,
    softcap: float | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention of each new token over its window and the sinks.

    Args:
        q: [B, H, T, K] queries as the source would use them (after norm and RoPE).
        local_k, local_v: [B, G, W + T, K or V], the W tokens before the new ones (anything where there are none) and
            the new ones.
        sink_k, sink_v: [B, G, s, K or V], the first s tokens of each row.
        seen: tokens before the new ones, [B] int64, or one int for all rows.
        window: W ≥ 1, counting the query's own token.
        scaling, softcap: the source's.
        extra: [H] logits that take part in the normaliser only (gpt_oss), or None.

    Returns:
        y [B, H, T, V] in q's dtype and lse [B, H, T] fp32, the log of the normaliser.
    """
    B, H, T, K = q.shape
    G, s, V = local_k.shape[1], sink_k.shape[2], local_v.shape[-1]
    C = min(BLOCK, T)
    N = -(-T // C)
    pad = N * C - T
    rep = H // G

    qb = F.pad(q, (0, 0, 0, pad)).view(B, G, rep, N, C, K).transpose(2, 3).reshape(B, G, N, rep * C, K)
    kb = F.pad(local_k, (0, 0, 0, pad)).unfold(2, C + window, C).mT
    vb = F.pad(local_v, (0, 0, 0, pad)).unfold(2, C + window, C).mT

    i = torch.arange(C, device=q.device)
    e = torch.arange(C + window, device=q.device)
    near = (e > i[:, None]) & (e <= i[:, None] + window)
    seen = torch.as_tensor(seen, device=q.device).view(-1, 1)
    block = torch.arange(N, device=q.device) * C
    token = seen[:, :, None] + (block[:, None] + e) - window
    mask = (token >= s)[:, :, None] & near
    a = scores(qb, kb, scaling, softcap)
    if s:
        t = seen[:, :, None] + (block[:, None] + i)
        mask = torch.cat([torch.arange(s, device=q.device) <= t[..., None], mask], dim=-1)
        a = torch.cat([scores(qb, sink_k[:, :, None], scaling, softcap), a], dim=-1)
    a = a.view(B, G, N, rep, C, s + C + window)
    extra = None if extra is None else extra.float().view(G, 1, rep, 1, 1)
    p, lse = normalise(a.masked_fill(~mask[:, None, :, None], float("-inf")), extra)
    p = p.to(q.dtype).view(B, G, N, rep * C, s + C + window)
    y = p[..., s:] @ vb
    if s:
        y = y + p[..., :s] @ sink_v[:, :, None]
    y = y.view(B, G, N, rep, C, V).transpose(2, 3).reshape(B, H, N * C, V)[:, :, :T]
    return y, lse.transpose(2, 3).reshape(B, H, N * C)[:, :, :T]


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    extra: Tensor | None = None,
    memory: Tensor | None = None,
) -> Tensor:
    """One decoding step over cached slots, in whatever order they lie.

    Args:
        q: [B, H, 1, K]; k: [B·G, K, S] and v: [B·G, S, V], as `Step` views them.
        bias: [B·G, 1, S] fp32, 0 where a slot is filled and −inf elsewhere.
        memory: one more place to attend to, [B, H, 1, V + 1] fp32: its value, and its logit in the last column.

    Returns:
        y [B, H, 1, V] in q's dtype.
    """
    B, H, _, K = q.shape
    groups, S, V = v.shape
    grouped = q.reshape(groups, -1, K)
    if softcap is None and q.dtype == torch.float32:
        a = torch.baddbmm(bias, grouped, k, alpha=scaling)
    else:
        a = scores(grouped, k.mT, scaling, softcap) + bias
    m = None if memory is None else memory.view(groups, -1, V + 1)
    if m is not None:
        a = torch.cat([a, m[..., V:]], -1)
    if extra is not None:
        a = torch.cat([a, extra.to(a.dtype).repeat(B).view(groups, -1, 1)], -1)
    p = a.softmax(-1)
    near = p[..., :S].to(v.dtype)
    if m is None:
        y = torch.bmm(near, v)
    else:
        far = m[..., :V] * p[..., S : S + 1]
        y = torch.baddbmm(far, near, v) if v.dtype == far.dtype else far + torch.bmm(near, v)
    return y.view(B, H, 1, V).to(q.dtype)


def naive_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    scaling: float,
    softcap: float | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: the same over whole rows q [B, H, T, K], k, v [B, G, T, ·] with an explicit T×T mask."""
    B, H, T, K = q.shape
    G = k.shape[1]
    t = torch.arange(T, device=q.device)
    distance = t[:, None] - t
    mask = (distance >= 0) & ((distance < window) | (t < sinks))
    a = scores(q.view(B, G, H // G, T, K), k[:, :, None], scaling, softcap)
    extra = None if extra is None else extra.float().view(G, H // G, 1, 1)
    p, lse = normalise(a.masked_fill(~mask, float("-inf")), extra)
    return (p.to(q.dtype) @ v[:, :, None]).reshape(B, H, T, -1), lse.reshape(B, H, T)
