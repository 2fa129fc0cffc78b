"""The kernels of the regularizers as one would write them first, in whole passes of torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def level_sums(x: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Squared deviations of every channel and how many of its values reach each threshold."""
    space = tuple(range(2, x.dim()))
    exact = x.double()
    deviations = (exact - exact.mean(space, keepdim=True)).square().sum(space)
    return torch.stack([deviations, *[(exact >= t).double().sum(space) for t in thresholds]], -1)


def neighbourhood_peaks(x: Tensor, pad_with_zeros: bool) -> Tensor:
    """Pooling, argmax, and coordinates from the index."""
    sizes = x.shape[2:]
    if pad_with_zeros:
        smooth = _POOL[len(sizes)](F.pad(x, [1, 1] * len(sizes)), 3, 1)
    else:
        window = [3 if size > 2 else 1 for size in sizes]
        pad = [k // 2 for k in window]
        smooth = _POOL[len(sizes)](x, window, 1, pad, count_include_pad=False)
    index = smooth.flatten(2).argmax(-1)
    return torch.stack(torch.unravel_index(index, sizes), -1).float()


def filter_channels(x: Tensor, index: Tensor, chosen: Tensor, zero: bool) -> Tensor:
    """The Laplacian, or zeros, of the whole map where a channel is chosen."""
    space = x.dim() - 2
    window = 3**space * _POOL[space](x.float(), 3, 1, 1, count_include_pad=True)
    filtered = torch.zeros_like(x) if zero else (3**space * x.float() - window).to(x.dtype)
    taken = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, index, chosen)
    return torch.where(taken.view(*taken.shape, *[1] * space), filtered, x)


def grow(seeds: Tensor, before: int, after: int) -> Tensor:
    """A pooling of the mask, padded on both sides."""
    space = seeds.dim() - 2
    padded = F.pad(seeds.float(), [after, before] * space)
    return _MAX_POOL[space](padded, before + after + 1, 1) > 0


def stochastic_pool(x: Tensor) -> Tensor:
    """Along one axis after the other, each position with the probability of its positive mass."""
    weight = x.float().relu()
    while weight.dim() > 2:
        mass = weight.flatten(3).sum(-1) if weight.dim() > 3 else weight
        speed = mass / -torch.rand_like(mass).clamp(min=1e-30).log()
        index = speed.argmax(2).view(*mass.shape[:2], *[1] * (weight.dim() - 2))
        size = (*mass.shape[:2], 1, *weight.shape[3:])
        weight = weight.gather(2, index.expand(size)).squeeze(2)
    return weight


def multiply_masks(x: Tensor, channels: Tensor, positions: Tensor) -> Tensor:
    """Two products."""
    return x * channels * positions


def multiply_kept(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Two products."""
    return x * keep.to(x.dtype) * scale


def point_rates(strength: Tensor, alpha: Tensor) -> Tensor:
    """The probability of each element to be a point."""
    return 1 - torch.exp(-alpha * strength)
