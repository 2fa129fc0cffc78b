"""Losses from the overlap of soft regions: Dice, IoU, Tversky and focal Tversky.

Each takes probabilities and masks (B, C, *spatial), 0 where a pixel does not count, and returns
one loss for each class. Sums run over the batch as well: slices are pieces of volumes and most
hold no foreground; a ratio per slice would be the constant 1 on them, almost without gradient.
So a value depends on what shares a batch, and a class absent from the whole batch costs nearly 1.
"""

from __future__ import annotations

from monai.losses.dice import DiceLoss
from monai.losses.tversky import TverskyLoss
from torch import Tensor

# Below it the focal Tversky loss is flat: its slope is infinite at 0.
FLAT = 1e-6


def dice_loss(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return the soft Dice loss of each class (MONAI).

    .. math::
        L_c = 1 - \frac{2 \sum_n p_{nc} t_{nc} + 10^{-5}}{\sum_n p_{nc} + \sum_n t_{nc} + 10^{-5}}

    Paper: F. Milletari et al., "V-Net", 3DV 2016, doi:10.1109/3DV.2016.79; squared sums in its
    denominator, plain ones here, as in MONAI.

    Args:
        maps: probabilities, (B, C, *spatial), 0 where a pixel does not count.
        masks: 0 or 1, of the same shape, 0 where a pixel does not count.

    Example:
        >>> import torch
        >>> dice_loss(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
        tensor([0.3333])
    """
    # The background is dropped already: MONAI warns if asked to, with one channel.
    loss: Tensor = DiceLoss(include_background=True, batch=True, reduction="none")(maps, masks)
    return loss.flatten()


def iou_loss(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return the soft IoU (Jaccard) loss of each class: Tversky with alpha = beta = 1.

    .. math::
        L_c = 1 - \frac{\sum_n p_{nc} t_{nc} + 10^{-5}}
        {\sum_n p_{nc} + \sum_n t_{nc} - \sum_n p_{nc} t_{nc} + 10^{-5}}

    Paper: M. A. Rahman, Y. Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks for
    Image Segmentation", ISVC 2016, doi:10.1007/978-3-319-50835-1_22; without the constant.

    Args:
        maps: as of `dice_loss`.
        masks: as of `dice_loss`.
    """
    return tversky_loss(maps, masks, alpha=1.0, beta=1.0)


def tversky_loss(
    maps: Tensor, masks: Tensor, alpha: float = 0.3, beta: float = 0.7, gamma: float = 1.0
) -> Tensor:
    r"""Return the Tversky loss of each class (MONAI), or its focal form.

    .. math::
        L_c = \Big( 1 - \frac{TP_c + 10^{-5}}{TP_c + \alpha FP_c + \beta FN_c + 10^{-5}}
        \Big)^{1 / \gamma}

        TP_c = \sum_n p_{nc} t_{nc}, \quad FP_c = \sum_n p_{nc} (1 - t_{nc}), \quad
        FN_c = \sum_n (1 - p_{nc}) t_{nc}

    alpha = beta = 0.5 is Dice, 1 is IoU; beta > alpha punishes what is missed more.

    Papers: S. S. M. Salehi et al., "Tversky loss function for image segmentation using 3D fully
    convolutional deep networks", MLMI 2017, doi:10.1007/978-3-319-67389-9_44. N. Abraham,
    N. M. Khan, "A Novel Focal Tversky Loss Function", ISBI 2019, doi:10.1109/ISBI.2019.8759329
    (gamma; 4/3 there, with the roles of alpha and beta exchanged; it sums over classes). The
    focal form has an infinite slope where nothing is left to learn: it is flat below 1e-6.

    Args:
        maps: as of `dice_loss`.
        masks: as of `dice_loss`.
        alpha: weight of false positives.
        beta: weight of false negatives.
        gamma: above 1 classes that are nearly right pull more, below 1 less.

    Example:
        >>> import torch
        >>> tversky_loss(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
        tensor([0.4118])
    """
    loss: Tensor = TverskyLoss(alpha=alpha, beta=beta, batch=True, reduction="none")(maps, masks)
    return loss if gamma == 1 else loss.clamp_min(FLAT) ** (1 / gamma)
