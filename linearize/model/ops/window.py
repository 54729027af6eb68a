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

BLOCK = 32
"""Queries per block: 32 makes the matrix products large enough for a CPU while W = 64 wastes only a third of each
block."""


def scores(q: Tensor, k: Tensor, bias: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """The source's own attention scores of R heads that share their keys.

    Args:
        q: [..., R, M, K].
        k: [..., N, K].
        bias: added; what broadcasts to the scores, 0 where a key is seen and −inf elsewhere.
        scaling: the source's, of q·k.
        softcap: the source's, or None.

    Returns:
        [..., R, M, N], at least fp32.
    """
    shape = *q.shape[:-1], k.shape[-2]
    rows, keys = q.reshape(-1, shape[-3] * shape[-2], q.shape[-1]), k.reshape(-1, *k.shape[-2:])
    dtype = torch.promote_types(q.dtype, torch.float32)
    if softcap is None and q.dtype == dtype:
        # The product is added to the bias in place: two passes over the scores less, and as many in the gradient.
        a = bias.to(dtype).expand(shape).clone(memory_format=torch.contiguous_format)
        return a.view(*rows.shape[:2], -1).baddbmm_(rows, keys.mT, alpha=scaling).view(shape)
    a = (rows @ keys.mT).to(dtype).view(shape) * scaling
    return (a if softcap is None else softcap * torch.tanh(a / softcap)) + bias


def bias_of(seen: Tensor) -> Tensor:
    """fp32: 0 where `seen`, −inf elsewhere."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))


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
    q: Tensor, local_k: Tensor, local_v: Tensor, sink_k: Tensor, sink_v: Tensor, *, seen: Tensor | int, window: int,
    scaling: float, softcap: float | None = None, extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Exact attention of each new token over its window and the sinks.

    Args:
        q: [B, H, T, K] queries as the source would use them (after norm and RoPE).
        local_k: [B, G, W + T, K], the W tokens before the new ones (anything where there are none) and the new ones.
        local_v: [B, G, W + T, V], the same.
        sink_k: [B, G, s, K], the first s tokens of each row.
        sink_v: [B, G, s, V], the same.
        seen: tokens before the new ones, [B] int64, or one int for all rows.
        window: W ≥ 1, counting the query's own token.
        scaling: the source's, of q·k.
        softcap: the source's, or None.
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

    qb = F.pad(q, (0, 0, 0, pad)).view(B, G, rep, N, C, K).transpose(2, 3)

    def blocks(local: Tensor, sink: Tensor) -> Tensor:
        near = F.pad(local, (0, 0, 0, pad)).unfold(2, C + window, C).mT
        return torch.cat([sink[:, :, None].expand(-1, -1, N, -1, -1), near], 3)

    kb, vb = blocks(local_k, sink_k), blocks(local_v, sink_v)
    i = torch.arange(C, device=q.device)
    e = torch.arange(C + window, device=q.device)
    near = (e > i[:, None]) & (e <= i[:, None] + window)
    seen = seen.view(-1, 1, 1) if isinstance(seen, Tensor) else seen
    block = (torch.arange(N, device=q.device) * C)[None, :, None]
    token = seen + (block + e) - window
    t = seen + (block + i)
    mask = torch.cat([torch.arange(s, device=q.device) <= t[..., None], (token >= s)[:, :, None] & near], -1)
    extra = None if extra is None else extra.float().view(G, 1, rep, 1, 1)
    p, lse = normalise(scores(qb, kb, bias_of(mask)[:, None, :, None], scaling, softcap), extra)
    y = p.to(q.dtype).flatten(3, 4) @ vb
    y = y.view(B, G, N, rep, C, V).transpose(2, 3).reshape(B, H, N * C, V)[:, :, :T]
    return y, lse.transpose(2, 3).reshape(B, H, N * C)[:, :, :T]


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scaling: float, softcap: float | None = None,
    extra: Tensor | None = None, memory: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One decoding step over cached slots, in whatever order they lie.

    Args:
        q: [B, H, 1, K].
        k: [B·G, K, S], as `Step` views it.
        v: [B·G, S, V], as `Step` views it.
        bias: [B·G, 1, S] fp32, 0 where a slot is filled and −inf elsewhere.
        scaling: the source's, of q·k.
        softcap: the source's, or None.
        extra: [H], as of `window_attention`.
        memory: one more slot, [B, H, 1, V + 1] fp32: its value, and its logit in the last column; or None.

    Returns:
        y [B, H, 1, V] in q's dtype.
    """
    B, H, _, K = q.shape
    groups, S, V = v.shape
    grouped = q.reshape(groups, -1, K)
    if softcap is None and q.dtype == torch.float32:
        a = torch.baddbmm(bias, grouped, k, alpha=scaling)  # the same in one call: calls are what a step takes
    else:
        a = scores(grouped.unsqueeze(1), k.mT, bias.unsqueeze(1), scaling, softcap).squeeze(1)
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
