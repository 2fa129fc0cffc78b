"""Segmentation networks with explicit places for regularizers."""

from medseg_reg.networks.attention_unet import AttentionUNet
from medseg_reg.networks.guided import GuidedLogits, presence_loss
from medseg_reg.networks.mixture import HierarchicalMixture
from medseg_reg.networks.sparse_experts import SparseExperts
from medseg_reg.networks.token_labels import TokenLabels
from medseg_reg.networks.token_selection import TokenSelection
from medseg_reg.networks.unet import UNet
from medseg_reg.networks.unet3plus import UNet3Plus

__all__ = [
    "AttentionUNet",
    "GuidedLogits",
    "HierarchicalMixture",
    "SparseExperts",
    "TokenLabels",
    "TokenSelection",
    "UNet",
    "UNet3Plus",
    "presence_loss",
]
