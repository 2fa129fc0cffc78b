"""How sure a prediction is: averages over draws or networks, their entropy, and MC dropout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medseg_reg.inference.stochastic import sampling
from medseg_reg.insertion.running import seeded
from medseg_reg.networks.build import probabilities


class Uncertainty(NamedTuple):
    """What several predictions of one batch say together.

    Attributes:
        mean: mean class probabilities (B, K, *spatial), float32.
        entropy: entropy of the mean (B, *spatial), in nats, from 0 to log K: how unsure the
            prediction is in all.
        mutual_information: entropy of the mean less the mean entropy (B, *spatial), in nats: how
            much the predictions disagree, which more training data would mend.
    """

    mean: Tensor
    entropy: Tensor
    mutual_information: Tensor


def entropy(p: Tensor) -> Tensor:
    """Return -sum_k p_k log p_k over axis 1 of probabilities (B, K, *spatial), in nats.

    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor([0.0000, 0.6931])
    """
    each: Tensor = torch.special.entr(p)
    return each.sum(dim=1)


class Average:
    """Adds up the probabilities of one batch, draw by draw, in the memory of one draw.

    A member may have seen a part of the picture only: where its probabilities are all zero it does
    not vote.

    Args:
        maps: whether entropies are wanted; without them `total` alone is kept.
    """

    def __init__(self, maps: bool = True) -> None:
        self.maps = maps
        self.members = 0
        self.total: Tensor | None = None
        self.entropies: Tensor | None = None

    def add(self, p: Tensor) -> None:
        """Add the probabilities (B, K, *spatial) of one member."""
        self.members += 1
        if self.total is None:
            self.total = p.clone()
            self.entropies = entropy(p) if self.maps else None
            return
        self.total += p
        if self.entropies is not None:
            self.entropies += entropy(p)

    def mean(self) -> Tensor:
        """Return the sum over the number of members (B, K, *spatial); 0 where none saw a pixel."""
        return self._sum() / self.members

    def labels(self) -> Tensor:
        """Return the most probable class (B, *spatial), uint8; 0 where no member saw the pixel."""
        return self._sum().argmax(dim=1).to(torch.uint8)

    def result(self) -> Uncertainty:
        """Return the mean and its entropies; NaN where no member saw the pixel.

        Raises:
            ValueError: nothing was added, or entropies were not wanted.
        """
        total = self._sum()
        if self.entropies is None:
            raise ValueError("Average(maps=False) keeps no entropies")
        votes = total.sum(dim=1)
        votes = torch.where(votes > 0, votes, torch.nan)
        mean = total / votes[:, None]
        # NaN would pass for 0 here.
        whole = torch.where(votes.isnan(), torch.nan, entropy(mean.nan_to_num()))
        # Rounding may give a little less than nothing.
        disagreement = (whole - self.entropies / votes).clamp(min=0)
        return Uncertainty(mean, whole, disagreement)

    def _sum(self) -> Tensor:
        if self.total is None:
            raise ValueError("no probabilities were added")
        return self.total


def average(members: Iterable[Tensor]) -> Uncertainty:
    """Return what the probabilities (B, K, *spatial) of several members say together.

    >>> average([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    Uncertainty(mean=tensor([[0.5000, 0.5000]]), entropy=tensor([0.6931]), \
mutual_information=tensor([0.6931]))
    """
    found = Average()
    for member in members:
        found.add(member)
    return found.result()


def mc_dropout(
    network: nn.Module,
    images: Tensor,
    draws: int = 20,
    *,
    seed: int | None = 0,
    activation: Callable[..., Tensor] = probabilities,
) -> Uncertainty:
    """Predict a batch several times with the dropouts on, and say how sure the network is.

    With p_t the class probabilities of draw t, H the entropy and T draws:

        mean = sum_t p_t / T
        entropy = H(mean)
        mutual information = H(mean) - sum_t H(p_t) / T

    Only layers that draw by chance are in training mode (see
    `medseg_reg.inference.stochastic.stochastic_layers`): our regularizers, torch's dropouts, drop
    path; so it works on networks of other libraries. Everything else, batch normalization above
    all, stays in evaluation mode. The modes of the network and torch's random state are restored.

    Args:
        network: maps images to logits (B, K, *spatial); one channel means sigmoid.
        images: (B, C, *spatial), on the device of the network.
        draws: passes, at least 2; 10 to 50 are usual.
        seed: equal seeds give equal results on one device; None draws from torch's generator as it
            stands.
        activation: makes class probabilities (B, K, *spatial) of what the network returns.

    Raises:
        ValueError: fewer than 2 draws.

    Warns:
        UserWarning: the network has no layer that draws by chance, or the draws are all equal.

    Paper:
        Y. Gal, Z. Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty
        in Deep Learning", ICML 2016, arXiv 1506.02142. The split of the entropy is that of
        S. Depeweg et al., ICML 2018, arXiv 1710.07283.

    Example:
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Dropout2d(0.5), nn.Conv2d(8, 3, 1))
        >>> found = mc_dropout(network, torch.rand(2, 1, 6, 6), draws=10)
        >>> found.mean.shape, found.entropy.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 4, 4]))
        >>> bool((found.mutual_information <= found.entropy).all())
        True
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise ValueError(f"mc_dropout: draws must be a whole number, 2 or more; got {draws!r}")
    found, first, differ = Average(), None, False
    with sampling(network) as layers, torch.no_grad():
        if not layers:
            _warn("has no layer that draws by chance")
        with nullcontext() if seed is None else seeded(images.device, seed):
            for _ in range(draws):
                p = activation(network(images))
                found.add(p)
                first = p if first is None else first
                differ = differ or not torch.equal(first, p)
    if layers and not differ:
        _warn("has layers that draw by chance, but they change nothing for these images")
    return found.result()


def _warn(what: str) -> None:
    warnings.warn(
        f"mc_dropout: the network {what}, so all draws are equal and the mutual information is 0",
        stacklevel=3,
    )
