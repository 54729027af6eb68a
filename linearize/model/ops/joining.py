"""Which clusters of keys join, and what they become; clusters.py tells the costs, letters and shapes."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 128
"""Clusters whose costs are computed at a time."""


@dataclass(frozen=True)
class Rule:
    """What does not change from token to token.

    Attributes:
        chunk: C, how many clusters are merged away when all are taken.
        mass: γ, a number or one per head, fp32 [H].
        expected: α, how much the attention that a cluster is expected to get decides what is merged.
        heads: query heads of a group.
        scaling: the source's, of q·k; only reading needs it.
        softcap: the source's, or None.
    """

    chunk: int
    mass: float | Tensor = 0.0
    expected: float = 0.0
    heads: int = 1
    scaling: float = 1.0
    softcap: float | None = None

    @property
    def weighs(self) -> bool:
        """Whether c_m is needed."""
        return isinstance(self.mass, Tensor) or self.mass != 0


def joined(means: Tensor, sizes: Tensor, metric: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Let the C clusters that cost least to join become part of others.

    Args:
        means: [B, G, M, K + V] of M taken clusters.
        sizes: [B, G, M, 2], their n and Σ_d w_d Var_d.
        metric: [B, G, 1, 2K], sums of the squares of the queries so far and of themselves.
        rule: C, and what a join costs.

    Returns:
        means and sizes of M − C taken clusters, in their order, and C free ones; and where each cluster went, as an
        index [B, G, M] into the rows of all of them, [B·G·M, ·].
    """
    K, n = metric.shape[-1] // 2, sizes[..., :1]
    into, order, gone = _partners(means, n, metric, rule)
    squares = metric[..., :K]
    total = n if not rule.weighs else torch.cat([n, _second(means[..., :K], sizes, squares)], -1)
    sums = _gathered(torch.cat([means * n, total], -1), into, order, gone)
    means, n, second = sums.tensor_split((-total.shape[-1], means.shape[-1] + 1), -1)
    means = means / n.clamp(min=1)
    spread = torch.zeros_like(n)
    if rule.weighs:
        with torch.no_grad():
            spread = second / n.clamp(min=1) - (means[..., :K].square() * _mean(squares, n)).sum(-1, keepdim=True)
    to = order.argsort(-1).gather(2, into)
    first = to.shape[2] * torch.arange(to.shape[0] * to.shape[1], device=to.device).view(*to.shape[:2], 1)
    return means, torch.cat([n, spread.clamp(min=0)], -1), to + first


@torch.no_grad()
def _second(keys: Tensor, sizes: Tensor, squares: Tensor) -> Tensor:
    """Σ_d w_d Σ k_d² over the members of each cluster, [B, G, M, 1]."""
    n, spread = sizes.split(1, -1)
    return n * (spread + (keys.square() * _mean(squares, n)).sum(-1, keepdim=True))


def _mean(sums: Tensor, n: Tensor) -> Tensor:
    """A mean over tokens, summed over the heads of a group, [B, G, 1, K]: a query of each came with each token."""
    return sums / n.sum(2, keepdim=True).clamp(min=1)


@torch.no_grad()
def _partners(means: Tensor, n: Tensor, metric: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Which of M taken clusters join which.

    Returns:
        [B, G, M], the one that each becomes part of, its own index if it stays; [B, G, M], those that stay in their
        order, then those that go; [B, G, C], those that go.
    """
    K, chunk = metric.shape[-1] // 2, rule.chunk
    keys, values = means.split((K, means.shape[-1] - K), -1)
    weight = n if rule.expected == 0 else n * (rule.expected * _log_expected(keys, n, metric, rule.heads)).exp()
    cost, partner = _cheapest(keys * metric[..., :K].sqrt(), values, weight.squeeze(-1))
    gone = cost.topk(chunk, largest=False, sorted=False).indices
    own = torch.arange(n.shape[2], device=n.device).expand_as(cost)
    into = own.scatter(2, gone, partner.gather(2, gone))
    for _ in range((chunk - 1).bit_length()):  # where a partner goes too, to where it goes
        into = into.gather(2, into)
    order = torch.sort((into != own).long(), dim=2, stable=True).indices
    return into, order, order[:, :, -chunk:]


def _cheapest(keys: Tensor, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The least that it costs each cluster to join an earlier one, inf for the first, and which that is, [B, G, M]
    each; keys [B, G, M, K] in the metric. In pieces, which a CPU's cache has room for, without the later ones."""
    (k, k_other), (v, v_other) = _forms(keys), _forms(values)
    M, parts = weight.shape[2], []
    last = (M - 1) // ROWS * ROWS
    later = weight.new_full((ROWS, last + ROWS), float("inf")).triu(last)  # adding it is much faster than masking
    for start in range(0, M, ROWS):
        rows, earlier = slice(start, start + ROWS), slice(min(start + ROWS, M))
        cost = (k[:, :, rows] @ k_other[:, :, earlier].mT).mul_(v[:, :, rows] @ v_other[:, :, earlier].mT)
        cost.mul_(torch.minimum(weight[:, :, rows, None], weight[:, :, None, earlier]))
        cost += later[: cost.shape[2], last - start : last - start + cost.shape[3]]
        parts.append(cost.min(-1))
    return tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))  # type: ignore[return-value]


def _forms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two forms of x [..., M, D], [..., M, D + 2] each, whose product is the squares of all distances, [..., M, M]."""
    square = x.square().sum(-1, keepdim=True)
    one = torch.ones_like(square)
    return torch.cat([x, square, one], -1), torch.cat([-2 * x, one, square], -1)


def _log_expected(keys: Tensor, n: Tensor, metric: Tensor, heads: int) -> Tensor:
    """ln A_m up to its largest, [B, G, M, 1]."""
    square, mean = (_mean(metric, n) / heads).chunk(2, -1)
    variance = (square - mean.square()).clamp(min=0)
    log = (keys * mean + 0.5 * keys.square() * variance).sum(-1, keepdim=True)
    return log - log.amax(2, keepdim=True)


def _gathered(x: Tensor, into: Tensor, order: Tensor, gone: Tensor) -> Tensor:
    """The rows of x [B, G, M, D] that stay, with those that go added; zeros behind.

    A product with ones and zeros: its order of adding is the same at every run, on every device.
    """

    def rows(index: Tensor) -> Tensor:
        return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))

    stay = order[:, :, : -gone.shape[2]]
    joins = (stay.unsqueeze(-1) == into.gather(2, gone).unsqueeze(2)).to(x.dtype)
    return F.pad(rows(stay) + joins @ rows(gone), (0, 0, 0, gone.shape[2]))
