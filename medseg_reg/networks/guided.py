"""The classification-guided module of UNet 3+: which classes a slice shows at all.

Huimin Huang et al., "UNet 3+: A Full-Scale Connected UNet for Medical Image Segmentation",
ICASSP 2020, doi 10.1109/ICASSP40776.2020.9053405, section 2.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from monai.networks.layers.factories import Conv, Pool
from torch import Tensor, nn

from medseg_reg.losses.presence import presence_bce, presence_targets

# An absent class has e^-16 = 1e-7 of the background's probability: 0 as a label, and yet the
# cross-entropy of a pixel that shows it all the same stays finite.
ABSENT = 16.0


class GuidedLogits(NamedTuple):
    """What a classification-guided network returns in training.

    Attributes:
        logits: of the segmentation; a list, the finest first, under deep supervision.
        presence: logits (B, foreground classes) of a class being shown.
    """

    logits: Tensor | list[Tensor]
    presence: Tensor


class ClassPresence(nn.Module):
    r"""Whether each foreground class is shown: dropout, 1x1 convolution, global maximum.

    .. math:: z_{bc} = \max_n (W \operatorname{dropout}(x)_{bn})_c + b_c

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the deepest map.
        classes: foreground classes.
        p: rate of the dropout; published code: 0.5.
    """

    def __init__(self, spatial_dims: int, in_channels: int, classes: int, p: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)
        self.classify = Conv[Conv.CONV, spatial_dims](in_channels, classes, 1)
        self.pool = Pool[Pool.ADAPTIVEMAX, spatial_dims](1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, *spatial) to logits (B, classes)."""
        found: Tensor = self.pool(self.classify(self.dropout(x)))
        return found.flatten(1)


def presence_loss(presence: Tensor, target: Tensor, ignore: int | None = None) -> Tensor:
    """Return the binary cross-entropy of presence logits against the labels of the slices.

    Args:
        presence: (B, K), one for each foreground class.
        target: labels (B, *spatial), 0 to K.
        ignore: a label besides. A class that is seen nowhere in a slice may be where it is, so
            such pairs of slice and class do not count; if none is left, the loss is 0.

    >>> labels = torch.tensor([[[0, 2], [0, 0]]])
    >>> round(presence_loss(torch.tensor([[-20.0, 20.0]]), labels).item(), 4)
    0.0
    >>> labels[0, 1, 1] = 255
    >>> presence_loss(torch.tensor([[20.0, 20.0]]), labels, ignore=255).item() < 1e-6
    True
    """
    return presence_bce(presence, presence_targets(target, presence.shape[1], ignore))


def guide(logits: Tensor, presence: Tensor) -> Tensor:
    """Take the classes that are not shown out of a segmentation.

    A class whose presence is unlikelier than its absence gets a logit 16 below the background's,
    whose logit is 0 where there is one channel.

    Args:
        logits: (B, K + 1, *spatial), the background first; or (B, 1, *spatial) and K = 1.
        presence: (B, K).

    >>> guide(torch.tensor([[[[1.0]], [[3.0]]]]), torch.tensor([[-0.1]])).flatten().tolist()
    [1.0, -15.0]
    """
    shown = (presence > 0).view(*presence.shape, *[1] * (logits.ndim - 2))
    if logits.shape[1] == 1:
        return torch.where(shown, logits, torch.full_like(logits, -ABSENT))
    background, foreground = logits[:, :1], logits[:, 1:]
    return torch.cat([background, torch.where(shown, foreground, background - ABSENT)], dim=1)
