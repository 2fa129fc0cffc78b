"""Clustering-based dropout: channels of weak response are dropped more often than strong ones.

`cluster_rates` turns responses into rates, `clustering_dropout` is the rule, `ClusteringDropout`
the module. A reconstruction: the paper's formula was not found.
"""

from __future__ import annotations

from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_reg.regularizers.base import Regularizer, check_count, check_map, check_rate, register

__all__ = ["ClusteringDropout", "cluster_rates", "clustering_dropout"]

_ITERATIONS = 10  # Lloyd steps; on a line, with starts at quantiles, few are needed
_SPREAD_FLOOR = 1e-6  # below it, differences between responses are rounding noise


def cluster_rates(
    response: Tensor, p: float = 0.2, clusters: int = 3, max_rate: float = 0.9
) -> Tensor:
    """Drop rates that fall with the response of a unit's cluster; their mean is exactly p.

    Units without any response take no part: their rate is 0, since there is nothing to drop. The
    other responses of a sample are split by 1-D k-means; R_j is the mean response of unit j's
    cluster and w_j = (max R - R_j) / (max R - min R). Then q_j = p * w_j / mean(w): the strongest
    cluster is never dropped. Where the weakest would exceed ``max_rate``, all rates move towards
    p by the smallest share that prevents it: (1 - t) q_j + t p.

    Args:
        response: one number per unit, at least 0; a sample with NaN or infinity gets uniform
            rates.
        p: mean rate, in [0, 1).
        clusters: number of clusters; fewer are formed where there are fewer distinct responses.
            With 1, or where all responses are equal, every rate is p.
        max_rate: highest rate of a unit, in (0, 1). Where p itself is not below, every rate is p.

    Shapes:
        response (B, C); the result (B, C), float32.

    Raises:
        ValueError: a bad parameter, or a response of another shape.

    Example:
        >>> import torch
        >>> response = torch.tensor([[0.1, 0.1, 1.0, 1.0, 1.9, 1.9]])
        >>> [round(q, 3) for q in cluster_rates(response, p=0.2)[0].tolist()]
        [0.4, 0.4, 0.2, 0.2, 0.0, 0.0]
    """
    p = check_rate(p, "cluster_rates")
    clusters = check_count(clusters, "clusters", "cluster_rates")
    cap = max(_check_max_rate(max_rate, "cluster_rates"), p)
    if response.dim() != 2:
        raise ValueError(f"cluster_rates: expected (B, C), got shape {tuple(response.shape)}")
    with torch.no_grad():
        r = response.detach().float()
        live = (r != 0) | (r == 0).all(1, keepdim=True)
        # one NaN or infinity makes every mean of its sample NaN, which below counts as no spread
        r = r / r.amax(1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)
        mean = _cluster_means(r, live, clusters)
        low, high = mean.amin(1, keepdim=True), mean.amax(1, keepdim=True)
        spread = high - low
        weight = torch.where(spread > _SPREAD_FLOOR, (high - mean) / spread, 1.0) * live
        rate = p * weight * live.sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        top = rate.amax(1, keepdim=True)
        excess = (top - cap) / (top - p).clamp(min=torch.finfo(r.dtype).tiny)
        rate = torch.lerp(rate, torch.full_like(rate, p), excess.clamp(0.0, 1.0)).clamp(max=cap)
        return rate * live


def _cluster_means(r: Tensor, live: Tensor, clusters: int) -> Tensor:
    """The mean (B, C) of each unit's cluster: Lloyd's k-means on a line, all samples at once.

    The starts are quantiles of the distinct responses: many channels that respond alike would
    take several starts otherwise. A cluster without members keeps its centre, and takes no part
    in the result. Nor do units that do not live; they get the mean of the strongest cluster.
    """
    r = torch.where(live, r, r.amax(1, keepdim=True))
    number = torch.arange(clusters, device=r.device)
    ordered = r.sort(1).values
    rank = F.pad((ordered[:, 1:] > ordered[:, :-1]).int().cumsum(1), (1, 0))
    start = (2 * number + 1) * (rank[:, -1:] + 1) // (2 * clusters)  # middles of equal parts
    centre = ordered.gather(1, (rank[:, None] < start[..., None]).sum(2))
    for _ in range(_ITERATIONS):
        nearest = (r[:, :, None] - centre[:, None]).abs().argmin(2)
        member = ((nearest[..., None] == number) & live[..., None]).float()
        size = member.sum(1)
        total = (member * r[..., None]).sum(1)
        centre = torch.where(size > 0, total / size.clamp(min=1), centre)
    return centre.gather(1, nearest)


def clustering_dropout(
    x: Tensor,
    p: float = 0.2,
    clusters: int = 3,
    max_rate: float = 0.9,
    training: bool = True,
) -> Tensor:
    """Zeroes channels, weakly responding ones more often; see `ClusteringDropout`.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.1, 0.1, 1.0, 1.0]).reshape(1, 4, 1, 1).expand(1, 4, 5, 5)
        >>> clustering_dropout(x, p=0.4, clusters=2)[0, 2:].unique().tolist()  # never dropped
        [1.0]
    """
    p = check_rate(p, "clustering_dropout")
    check_count(clusters, "clusters", "clustering_dropout")
    _check_max_rate(max_rate, "clustering_dropout")
    if not training or p == 0.0:
        return x
    check_map(x, "clustering_dropout")
    with torch.no_grad():
        response = x.detach().float().abs().mean(tuple(range(2, x.dim())))
        rate = cluster_rates(response, p, clusters, max_rate)
        scale = (torch.rand_like(rate) >= rate) / (1.0 - rate)
        scale = scale.view(*scale.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    return x * scale


@register("clustering_dropout")
class ClusteringDropout(Regularizer):
    """Zeroes channels at random, the more likely the weaker their cluster responds.

    A reconstruction, inspired by the paper named below: its formula was not found, only that
    units are clustered by response and that a cluster's drop rate falls with the mean response.

    For every sample, r_j = mean |x_j| over the pixels of channel j; q = `cluster_rates` (r, p) by
    1-D k-means; channel j is dropped with probability q_j, independently, and
    y_j = x_j * m_j / (1 - q_j), which keeps the expectation of every channel. Channels that are
    zero everywhere take no part; the mean of q over the others is p in every sample. A single one
    is zeroed as a whole with probability p, as by `SpatialDropout`.

    The scale depends on the input, but is held constant in the gradient.

    Args:
        p: share of channels to drop, in [0, 1).
        clusters: number of clusters of channels. The paper's figure shows three: insignificant,
            fair, significant. With 1 the rule is `SpatialDropout`.
        max_rate: highest rate of a channel, in (0, 1); survivors are scaled by 1 / (1 - max_rate)
            at most. Where p itself is not below, every rate is p.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: a bad parameter, or an input of another shape or kind.

    Paper:
        Inspired by Z. Wen, Z. Ke, W. Xie, L. Shen, "Clustering-Based Adaptive Dropout for
        CNN-Based Classification", ACPR 2019, LNCS 12046, pp. 46-58,
        doi 10.1007/978-3-030-41404-7_4. No code was found. The paper drops single features of
        the fully connected layer of a classifier; on a (B, C, 1) map that is what happens here,
        while on a feature map the unit is a channel with all its pixels. It updates the clusters
        as training goes on, from features, weights or their derivatives; here they are formed
        anew from each sample's own features, so that nothing is remembered and samples stay
        independent. Do not report its results as the paper's.

    Example:
        >>> import torch
        >>> ClusteringDropout(p=0.2)(torch.rand(2, 8, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    unit = "channel"
    paper = "inspired by Wen et al., ACPR 2019 (no formula was found)"

    def __init__(self, p: float = 0.2, clusters: int = 3, max_rate: float = 0.9) -> None:
        super().__init__(p)
        self.clusters = check_count(clusters, "clusters", type(self).__name__)
        self.max_rate = _check_max_rate(max_rate, type(self).__name__)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `clustering_dropout`."""
        return clustering_dropout(x, self.p, self.clusters, self.max_rate)


def _check_max_rate(value: object, owner: str) -> float:
    valid = isinstance(value, Real) and not isinstance(value, bool) and 0.0 < float(value) < 1.0
    if not valid:
        raise ValueError(f"{owner}: max_rate must be a number in (0, 1), got {value!r}")
    return float(value)  # type: ignore[arg-type]
