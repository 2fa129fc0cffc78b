"""A hierarchical mixture of experts as the head of a segmentation network.

M. Jordan, R. Jacobs, "Hierarchical Mixtures of Experts and the EM Algorithm", Neural Computation 6,
1994, doi 10.1162/neco.1994.6.2.181; O. Irsoy, E. Alpaydin, "Dropout Regularization in Hierarchical
Mixture of Experts", Neurocomputing 419, 2021, arXiv:1812.10158.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from medseg_reg.errors import MedsegError
from medseg_reg.insertion.kinds import CONV
from medseg_reg.insertion.slots import PartSlot
from medseg_reg.networks.shapes import run_on_shape
from medseg_reg.regularizers import TreeDropout, leaf_shares, tree_mixture


class HierarchicalMixture(nn.Module):
    r"""A soft decision tree of convolutions in the place of one convolution.

    Every inner node m has a gate, every leaf an expert, each a convolution on the same map x:

    .. math::
        g_m(x) &= \sigma(w_m * x + b_m) \\
        y_m(x) &= g_m(x) \, y_\text{left}(x) + (1 - g_m(x)) \, y_\text{right}(x)

    The root's answer is the output, so a pixel is segmented by the experts that the tree chooses
    for it. Place: `tree_gates`, on the gates (B, 2^depth - 1, *spatial), the root first; it is
    where `TreeDropout` goes. Where such a layer does not draw, as in evaluation, gates are
    multiplied by its `evaluation_factor`. Gates and mixing are computed in float32.

    Args:
        conv: the convolution; experts and gates have its kernel, stride, padding and dilation.
        depth: levels of inner nodes, at least 1; there are 2^depth experts.

    Raises:
        ValueError: a depth below 1, or a convolution in groups.

    >>> head = HierarchicalMixture(nn.Conv2d(16, 3, 1), depth=2)
    >>> head(torch.rand(1, 16, 8, 8)).shape
    torch.Size([1, 3, 8, 8])
    >>> head.shares(torch.rand(1, 16, 8, 8)).shape
    torch.Size([1, 4, 8, 8])
    """

    acts_as = CONV  # for whoever looks for places: before it is the head

    def __init__(self, conv: _ConvNd, depth: int) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a tree has at least one level, depth is {depth}")
        if conv.groups != 1:
            raise ValueError(f"the convolution has {conv.groups} groups; a mixture needs 1")
        self.depth, self.outputs, self.leaves = depth, conv.out_channels, 2**depth
        self.experts = _like(conv, self.leaves * conv.out_channels)
        self.gates = _like(conv, self.leaves - 1)
        self.tree_gates = PartSlot()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *spatial) to what the convolution would map it to."""
        leaves: Tensor = self.experts(x)
        return tree_mixture(leaves.unflatten(1, (self.leaves, self.outputs)), self._gated(x))

    def shares(self, x: Tensor) -> Tensor:
        """Return how much each expert counts at each position, (B, 2^depth, *spatial)."""
        return leaf_shares(self._gated(x))

    def _gated(self, x: Tensor) -> Tensor:
        gates: Tensor = self.tree_gates(torch.sigmoid(self.gates(x).float()))
        for layer in self.tree_gates:
            if isinstance(layer, TreeDropout) and layer.evaluation_factor != 1.0:
                gates = gates * layer.evaluation_factor
        return gates

    def extra_repr(self) -> str:
        """Name depth and number of experts."""
        return f"depth={self.depth}, experts={self.leaves}"


def _like(conv: _ConvNd, channels: int) -> _ConvNd:
    """Return a new convolution with other output channels."""
    kind: Any = type(conv)  # which takes fewer arguments than its base
    twin: _ConvNd = kind(
        conv.in_channels,
        channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        dilation=conv.dilation,
        bias=True,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    return twin


def mix_head(
    network: nn.Module, shape: Sequence[int], outputs: int, depth: int, owner: str
) -> HierarchicalMixture:
    """Turn the last convolution of a network into a `HierarchicalMixture` with new weights.

    Args:
        network: changed in place; it is looked at in evaluation mode.
        shape: of an input (B, C, *spatial) that it takes.
        outputs: channels of its logits.
        depth: of the tree.
        owner: its name in errors.

    Returns:
        The mixture.

    Raises:
        MedsegError: the last layer is no convolution from features to logits.
    """
    path = _last_convolution(network, shape)
    conv = network.get_submodule(path) if path else None
    if (
        not isinstance(conv, _ConvNd)
        or isinstance(conv, _ConvTransposeNd)
        or conv.out_channels != outputs
        or conv.in_channels <= outputs
    ):
        found = f"'{path}' is {conv}" if path else "there is none"
        raise MedsegError(
            f"network.tree_depth: {owner} does not end in a convolution from features to {outputs} "
            f"logits that could become a mixture of experts ({found}). Use another network, or "
            "tree_depth: 0."
        )
    try:
        mixture = HierarchicalMixture(conv, depth)
    except (ValueError, TypeError) as error:
        raise MedsegError(f"network.tree_depth: {owner}: {error}.") from None
    mixture.train(conv.training)
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, mixture)
    return mixture


def _last_convolution(network: nn.Module, shape: Sequence[int]) -> str:
    """Return the path of the convolution that runs last; empty if none runs."""
    met: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: met.append(path))
        for path, module in network.named_modules()
        if isinstance(module, _ConvNd)
    ]
    try:
        run_on_shape(network, shape, values=True)
    finally:
        for handle in handles:
            handle.remove()
    return met[-1] if met else ""
