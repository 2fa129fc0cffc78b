"""Losses on raw logits, mixed by weights, for one-channel and multi-class networks.

    loss = MixedLoss(ce=1.0, dice=1.0, ssim=1.0)
    loss(network(images), labels).backward()

| weight    | term                                    | file             |
|-----------|-----------------------------------------|------------------|
| `ce`      | cross-entropy                           | cross_entropy.py |
| `focal`   | focal loss (Lin et al. 2017)            | focal.py         |
| `dice`    | soft Dice (Milletari et al. 2016)       | overlap.py       |
| `iou`     | soft IoU                                | overlap.py       |
| `tversky` | Tversky, focal Tversky                  | overlap.py       |
| `ssim`    | SSIM (Wang et al. 2004)                 | similarity.py    |
| `ms_ssim` | multi-scale SSIM (Wang et al. 2003)     | similarity.py    |
| `boundary`| boundary loss (Kervadec et al. 2019)    | boundary.py      |

UNet 3+'s hybrid loss is `MixedLoss(ce=0, focal=1, ms_ssim=1, iou=1)`, with a list of logits.

Raw logits and integer labels go in; activation, one-hot encoding, float32, ignored pixels and
small images are handled here, because each of them has silently spoiled published results
elsewhere.
"""

from medseg_reg.losses.boundary import boundary_loss, signed_distance
from medseg_reg.losses.cross_entropy import cross_entropy
from medseg_reg.losses.distillation import distillation_loss
from medseg_reg.losses.focal import focal_loss
from medseg_reg.losses.labels import check_labels
from medseg_reg.losses.mixed import MixedLoss
from medseg_reg.losses.overlap import dice_loss, iou_loss, tversky_loss
from medseg_reg.losses.presence import (
    presence_bce,
    presence_divergence,
    presence_logits,
    presence_targets,
)
from medseg_reg.losses.similarity import (
    ms_ssim_loss,
    ms_ssim_note,
    ms_ssim_scales,
    ssim_loss,
    ssim_window,
)

__all__ = [
    "MixedLoss",
    "boundary_loss",
    "check_labels",
    "cross_entropy",
    "dice_loss",
    "distillation_loss",
    "focal_loss",
    "iou_loss",
    "ms_ssim_loss",
    "ms_ssim_note",
    "ms_ssim_scales",
    "presence_bce",
    "presence_divergence",
    "presence_logits",
    "presence_targets",
    "signed_distance",
    "ssim_loss",
    "ssim_window",
    "tversky_loss",
]
