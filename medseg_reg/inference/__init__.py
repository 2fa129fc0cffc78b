"""A trained network at work: prediction on the source grid, scores, pictures, uncertainty."""

from medseg_reg.inference.uncertainty import Uncertainty, mc_dropout

__all__ = ["Uncertainty", "mc_dropout"]
