"""Regularizers of mixtures of experts; they act on gates, which say how much an expert counts."""

from medseg_reg.regularizers.experts.gating_dropout import (
    GatingDropout,
    gating_dropout,
    home_experts,
)
from medseg_reg.regularizers.experts.tree_dropout import (
    TreeDropout,
    leaf_shares,
    tree_dropout,
    tree_mixture,
)

__all__ = [
    "GatingDropout",
    "TreeDropout",
    "gating_dropout",
    "home_experts",
    "leaf_shares",
    "tree_dropout",
    "tree_mixture",
]
