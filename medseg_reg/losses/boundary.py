"""Boundary loss: probabilities weighted by their distance from the true outline."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor


def signed_distance(masks: Tensor, counted: Tensor | None = None) -> Tensor:
    r"""Return distances in pixels to the outline of each mask, negative inside.

    .. math::
        \phi_n = \begin{cases}
        \min_{m \in \text{mask}} |n - m| & n \text{ outside} \\
        1 - \min_{m \text{ outside}} |n - m| & n \text{ inside}
        \end{cases}

    so that it is 0 on the pixels along the inside of the outline, as in the published code. A
    mask that is empty or full has no outline: its distances are 0. Ignored pixels belong to
    neither side; distances to them are not taken.

    It is computed on the CPU (scipy), so on a GPU the host waits for it at each step.

    Args:
        masks: 0 or 1, (B, C, *spatial).
        counted: bool, (B, 1, *spatial), where pixels count; None for everywhere.

    Returns:
        float32, of the shape and on the device of the masks; 0 where a pixel does not count.

    Example:
        >>> signed_distance(torch.tensor([[[[0.0, 0.0, 1.0, 1.0, 1.0]]]])).tolist()
        [[[[2.0, 1.0, 0.0, -1.0, -2.0]]]]
    """
    inside = masks.detach().cpu().numpy() > 0.5
    known = np.ones_like(inside[:, :1]) if counted is None else counted.cpu().numpy()
    result = np.zeros(inside.shape, dtype=np.float32)
    for index in np.ndindex(inside.shape[:2]):
        mask, outside = inside[index], known[index[0], 0] & ~inside[index]
        if mask.any() and outside.any():
            far, deep = distance_transform_edt(~mask), distance_transform_edt(~outside)
            result[index] = np.where(mask, 1 - deep, np.where(outside, far, 0))
    return torch.from_numpy(result).to(masks.device)


def boundary_loss(maps: Tensor, distances: Tensor, counted: Tensor | None = None) -> Tensor:
    r"""Return the boundary loss of each class.

    .. math:: L_c = \frac{1}{N} \sum_n p_{nc} \, \phi_{nc}

    It is negative for a good segmentation, and grows with the size of the image. It says nothing
    where a class is absent from an image, and an empty prediction has the loss 0, from which it
    hardly moves away: add it to a loss of regions. The paper raises its weight from 0.01 by 0.01
    an epoch while that of the other loss falls; here a weight is constant.

    Paper: H. Kervadec et al., "Boundary loss for highly unbalanced segmentation", MIDL 2019,
    arXiv:1812.07032; Medical Image Analysis 2021, doi:10.1016/j.media.2020.101851.

    Args:
        maps: probabilities, (B, C, *spatial), 0 where a pixel does not count.
        distances: phi as from `signed_distance`, of the same shape.
        counted: bool, (B, 1, *spatial), where pixels count; None for everywhere.

    Example:
        >>> masks = torch.tensor([[[[0.0, 0.0, 1.0, 1.0, 1.0]]]])
        >>> boundary_loss(masks, signed_distance(masks))
        tensor([-0.6000])
    """
    total = (maps * distances).transpose(0, 1).flatten(1).sum(dim=1)
    if counted is None:
        return total / (maps[:, 0].numel())
    return total / counted.sum().clamp_min(1)
