"""Segmentation networks with explicit places for regularizers."""

from medseg_reg.networks.unet import UNet

__all__ = ["UNet"]
