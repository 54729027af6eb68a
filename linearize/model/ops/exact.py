"""A few tokens that stay as they are: of all that came, the N of largest score, read by softmax.

A score ≥ 0 says how badly a token is kept elsewhere; see mixers/exact.py. Of tokens with equal scores the older ones
stay. So which tokens are held after t of them does not depend on how they were compared: a block of tokens is read at
once by the rank of each among those so far.

Letters and shapes as in ops/additive.py: q [B, H, T, K], k and v [B, G, T, ·], score and exists [B, G, T, 1]; a token
that does not exist leaves the state as it was. State, all zeros at first: tokens [B, G, N, K + V]; scores [B, G, N, 1];
seen [B, G, 1, 1], how many tokens came. Tokens lie in their order in the last slots, what lies before them means
nothing. A cache keeps tokens in 16 or 8 bits (`compact.stored_pairs`), rounded once, when they enter.
"""

import torch
from torch import Tensor

from . import compact
from .window import normalise, scores

State = tuple[Tensor, ...]
EMPTY = -1e30
"""Bias of what is not held: finite, so that a softmax over nothing is not NaN."""
BLOCK = 128
"""Tokens that `chunked` takes at a time."""


def initial_state(
    batch: int, kv_heads: int, key_width: int, value_width: int, kept: int, device: torch.device
) -> State:
    """Zeros on `device` for N = `kept` tokens."""
    tokens = torch.zeros(batch, kv_heads, kept, key_width + value_width, device=device)
    return tokens, tokens.new_zeros(batch, kv_heads, kept, 1), tokens.new_zeros(batch, kv_heads, 1, 1)


def stored(state: State, key_width: int, dtype: torch.dtype | None) -> State:
    """What a cache keeps of a state: tokens in `dtype`, for int8 with their scales behind them."""
    tokens, *rest = state
    return *compact.stored_pairs(tokens, key_width, dtype), *rest


def opened(kept: State, key_width: int) -> State:
    """The state of which a cache keeps this."""
    tokens, *scales, values, seen = kept
    return torch.cat(compact.opened_pairs(tokens, scales, key_width, values.dtype), -1), values, seen


def update_state(k: Tensor, v: Tensor, score: Tensor, exists: Tensor, kept: State) -> None:
    """Take in one token (T = 1), in place; `kept` as a cache keeps it."""
    *parts, values, seen = kept
    N = values.shape[2]
    slot = torch.arange(N, device=k.device)
    held = values[..., 0].masked_fill(slot < N - seen[..., 0], float("-inf"))
    # The newest of the smallest goes, which may be the new token itself, in slot N.
    gone = N - torch.cat([held, score[..., 0]], -1).flip(-1).argmin(-1, keepdim=True)
    moves = (slot >= torch.where(exists[..., 0] > 0, gone, N)).unsqueeze(-1)
    token = compact.stored_pairs(torch.cat([k, v], -1).to(values.dtype), k.shape[-1], parts[0].dtype)
    for x, new in zip((*parts, values), (*token, score), strict=True):
        x.copy_(torch.where(moves, torch.cat([x[:, :, 1:], new.to(x.dtype)], 2), x))
    seen.add_(exists > 0)


def read_state(q: Tensor, state: State, *, scaling: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """What one token q [B, H, 1, K] reads: y [B, H, 1, V] and its log weight [B, H, 1], about EMPTY of an empty
    state."""
    tokens, values, seen = state
    N = values.shape[2]
    held = torch.arange(N, device=q.device) >= N - seen
    return _read(q, tokens, held, scaling, softcap)


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor, exists: Tensor, state: State, *, scaling: float,
    softcap: float | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, State]:  # fmt: skip
    """Token by token: the definition, and the oracle of the chunked form. Arguments and result as of `chunked`."""
    kept, y, weight = tuple(x.clone() for x in stored(state, k.shape[-1], dtype)), [], []
    for t in range(q.shape[2]):
        one = slice(t, t + 1)
        update_state(k[:, :, one], v[:, :, one], score[:, :, one], exists[:, :, one], kept)
        a, b = read_state(q[:, :, one], opened(kept, k.shape[-1]), scaling=scaling, softcap=softcap)
        y.append(a)
        weight.append(b)
    return torch.cat(y, 2), torch.cat(weight, 2), opened(kept, k.shape[-1])


def chunked(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor, exists: Tensor, state: State, *, scaling: float,
    softcap: float | None = None, dtype: torch.dtype | None = None, block: int = BLOCK,
) -> tuple[Tensor, Tensor, State]:  # fmt: skip
    """Blocks of C tokens, each read beside what was held before it: time O(T·(N + C)). No value on the device decides
    what is computed; which tokens are held has no gradient, what is read of them has.

    Args:
        q: [B, H, T, K], T > 0; query t sees token t.
        k: [B, G, T, K].
        v: [B, G, T, V].
        score: [B, G, T, 1], at least 0.
        exists: [B, G, T, 1], 1 for a token and 0 for none.
        state: as `initial_state` makes it.
        scaling: the source's, of q·k.
        softcap: the source's, or None.
        dtype: what a cache rounds tokens to: bfloat16, int8, or None.
        block: C.

    Returns:
        y [B, H, T, V] and its log weight [B, H, T], both at least fp32; the final state.
    """
    both = torch.cat([k, v], -1)
    entering = compact.rounded_pairs(both.to(torch.promote_types(both.dtype, state[0].dtype)), k.shape[-1], dtype)
    y, weight = [], []
    for queries, new, scored, there in zip(*(x.split(block, 2) for x in (q, entering, score, exists)), strict=True):
        tokens, held, state = _block(new, scored, there, state)
        a, b = _read(queries, tokens, held, scaling, softcap)
        y.append(a)
        weight.append(b)
    return torch.cat(y, 2), torch.cat(weight, 2), state


def _block(new: Tensor, score: Tensor, exists: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
    """All tokens [B, G, N + C, K + V] of a block; which are held when each of C came, bool [B, G, C, N + C]; and the
    state behind it."""
    tokens, values, seen = state
    N, C = values.shape[2], new.shape[2]
    tokens = torch.cat([tokens, new], 2)
    with torch.no_grad():
        values = torch.cat([values, score], 2)
        index = torch.arange(N + C, device=new.device)
        there = torch.cat([index[:N] >= N - seen[..., 0], exists[..., 0] > 0], -1)
        ranked = values[..., 0].masked_fill(~there, float("-inf"))
        first, second = ranked.unsqueeze(-1), ranked.unsqueeze(-2)
        before = (first > second) | (first == second) & (index[:, None] < index)
        rank = before[..., N:, :].cumsum(-2, dtype=torch.int32) + before[..., :N, :].sum(-2, keepdim=True)
        held = (rank < N) & there.unsqueeze(-2) & (index <= index[N:, None])
        last = held[..., -1, :].byte().sort(dim=-1, stable=True).indices[..., C:].unsqueeze(-1)
        values, seen = values.gather(2, last), seen + (exists > 0).sum(2, keepdim=True)
    return tokens, held, (tokens.gather(2, last.expand(-1, -1, -1, tokens.shape[-1])), values, seen)


def _read(q: Tensor, tokens: Tensor, held: Tensor, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, C, K] over those of the tokens [B, G, M, K + V] that are held, bool [B, G, C, M]."""
    K, G = q.shape[-1], tokens.shape[1]
    q = q.to(tokens.dtype).unflatten(1, (G, -1))
    bias = torch.zeros(held.shape, dtype=q.dtype, device=q.device).masked_fill_(~held, EMPTY)
    p, lse = normalise(scores(q, tokens[..., :K], bias.unsqueeze(2), scaling, softcap), None)
    y = p.flatten(2, 3) @ tokens[..., K:]
    return y.view(*q.shape[:-1], -1).flatten(1, 2), lse.flatten(1, 2)
