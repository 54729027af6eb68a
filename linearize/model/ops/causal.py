"""The source's softmax attention over all past tokens, for rows of different length.

Letters as in ops/window.py, N slots: slot j of a row holds its token j.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .window import bias_of, normalise, scores

ELEMENTS = 2**22
"""Scores that exist at a time (16 MiB)."""


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor | int, scaling: float, softcap: float | None = None,
    extra: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Exact attention of the new tokens over all tokens of their row.

    Args:
        q: [B, H, T, K], of T new tokens.
        k: [B, G, N, K], slots with the new tokens in them, N = T + slots that were there before.
        v: [B, G, N, V], the same.
        seen: tokens before the new ones, [B] int64, or one int for all rows; at most N − T.
        scaling: the source's, of q·k.
        softcap: the source's, or None.
        extra: [H] logits that take part in the normaliser only (gpt_oss), or None.

    Returns:
        y [B, H, T, V] in q's dtype.
    """
    B, H, T, K = q.shape
    G, N, V = k.shape[1], k.shape[2], v.shape[-1]
    if T == N and T > 1 and softcap is None and extra is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=H != G)
    rep, C = H // G, max(1, ELEMENTS // (B * H * N))
    extra = None if extra is None else extra.float().view(G, rep, 1, 1)
    seen = seen.view(-1, 1, 1) if isinstance(seen, Tensor) else seen
    parts = []
    for start in range(0, T, C):
        new = q[:, :, start : start + C]
        n = new.shape[2]
        end = N - T + start + n  # no row sees a slot behind it
        token = seen + start + torch.arange(n, device=q.device)[None, :, None]
        bias = bias_of(torch.arange(end, device=q.device) <= token)[:, None, None]
        p, _ = normalise(scores(new.view(B, G, rep, n, K), k[:, :, :end], bias, scaling, softcap), extra)
        parts.append((p.to(q.dtype).view(B, G, rep * n, end) @ v[:, :, :end]).view(B, H, n, V))
    return torch.cat(parts, 2)
