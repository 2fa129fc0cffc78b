"""Dropout in a hierarchical mixture of experts: leave whole left subtrees out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medseg_reg.regularizers.base import Regularizer, check_choice, check_map, check_rate, register

__all__ = ["TreeDropout", "leaf_shares", "tree_dropout", "tree_mixture"]

EVALUATIONS = ("expected", "plain")


def tree_mixture(leaves: Tensor, gates: Tensor) -> Tensor:
    """What a soft decision tree answers: every inner node mixes its two children by its gate.

    y_m = g_m * y_left + (1 - g_m) * y_right, from the leaves up. Node 0 is the root; the children
    of node m are 2m + 1 (left) and 2m + 2 (right); the leaves follow from left to right.

    Args:
        leaves: what the L experts say, (B, L, K, *spatial), L a power of two.
        gates: the share g of the left child at each inner node, (B, L - 1, *spatial).

    Returns:
        (B, K, *spatial), computed in float32 where the leaves are of a smaller type.

    Raises:
        ValueError: the number of gates is not that of the inner nodes of a full binary tree.

    Example:
        >>> import torch
        >>> leaves = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
        >>> gates = torch.tensor([0.5, 1.0, 0.0]).view(1, 3, 1)  # the root is undecided
        >>> tree_mixture(leaves, gates).item()  # the left child says 1, the right one 4
        2.5
    """
    _check_tree(leaves.shape[1], gates.shape[1])
    dtype = torch.promote_types(leaves.dtype, torch.float32)
    mixed, gates = leaves.to(dtype), gates.to(dtype).unsqueeze(2)
    while mixed.shape[1] > 1:
        nodes = mixed.shape[1] // 2
        level = gates[:, nodes - 1 : 2 * nodes - 1]
        left, right = mixed[:, 0::2], mixed[:, 1::2]
        mixed = level * left + (1.0 - level) * right
    return mixed[:, 0].to(leaves.dtype)


def leaf_shares(gates: Tensor) -> Tensor:
    """How much each leaf counts: the product of the gates on the way to it.

    Args:
        gates: the share of the left child at each inner node, (B, L - 1, *spatial), as for
            `tree_mixture`.

    Returns:
        (B, L, *spatial); the shares of a position add up to 1.

    Raises:
        ValueError: the number of gates is not that of the inner nodes of a full binary tree.

    Example:
        >>> import torch
        >>> leaf_shares(torch.tensor([0.25, 0.5, 0.0]).view(1, 3, 1)).flatten().tolist()
        [0.125, 0.125, 0.0, 0.75]
    """
    _check_tree(gates.shape[1] + 1, gates.shape[1])
    shares, nodes = gates.new_ones(gates.shape[0], 1, *gates.shape[2:]), 1
    while nodes <= gates.shape[1]:
        level = gates[:, nodes - 1 : 2 * nodes - 1]
        shares = torch.stack([shares * level, shares * (1.0 - level)], dim=2).flatten(1, 2)
        nodes *= 2
    return shares


def tree_dropout(
    x: Tensor, p: float = 0.1, training: bool = True, *, shared: bool = False
) -> Tensor:
    """Sets gates to 0, so that the right child alone answers; see `TreeDropout`.

    Example:
        >>> import torch
        >>> y = tree_dropout(torch.full((2, 3, 4, 4), 0.7), p=0.5)
        >>> sorted(round(gate, 1) for gate in {*y.flatten().tolist()}) in ([0.0, 0.7], [0.7], [0.0])
        True
    """
    p = check_rate(p, "tree_dropout")
    if not training or p == 0.0:
        return x
    check_map(x, "tree_dropout")
    coins = (1 if shared else x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
    keep = torch.rand(coins, device=x.device) >= p
    return torch.where(keep, x, torch.zeros_like(x))


@register("tree_dropout")
class TreeDropout(Regularizer):
    """Leaves left subtrees of a hierarchical mixture of experts out.

    The mixture is a tree: y_m = g_m * y_left + (1 - g_m) * y_right at each inner node m, an
    expert at each leaf. With probability p the gate of a node is set to 0 for a whole sample, so
    that y_m = y_right: training meets trees of every size, from the whole tree to its rightmost
    leaf. Nothing is rescaled, and right subtrees are never dropped: on purpose, for which side is
    left does not matter to a tree that has not been trained, and the leaves on the right learn to
    answer alone. A node below a dropped subtree tosses its coin in vain.

    In ``eval()`` the layer returns its input, as all layers do. The gates' expectation is
    (1 - p) * g, and since the coins are independent, the tree with these gates is exactly the mean
    over all trees that training draws. The head of the mixture therefore asks the layer for
    ``evaluation_factor`` and multiplies the gates by it. At any other place than the gates of a
    tree this layer would be channel dropout without rescaling, which no network expects.

    Args:
        p: probability that a node loses its left subtree, in [0, 1).
        evaluation: "expected", gates (1 - p) * g in evaluation; or "plain", gates g, which trust
            left subtrees more than the training did, by 1 / (1 - p).
        shared: one coin of a node for the whole batch, in place of one for each sample. It
            couples the samples of a batch.

    Shapes:
        gates in [0, 1], (B, nodes, *spatial) with one to three spatial axes, one channel for each
        inner node; the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), an unknown ``evaluation``, or an input of another shape
            or kind.

    Paper:
        O. Irsoy, E. Alpaydin, "Dropout Regularization in Hierarchical Mixture of Experts",
        Neurocomputing 419, 2021, arXiv 1812.10158. There is no published code. What the tree
        does in evaluation is not confirmed; the expectation is the default here because it can be
        proved. A third-party implementation tosses one coin a node and batch, as ``shared``, and
        lowers the rate with the depth of the node, which `depth_ramp` cannot do here: all gates
        of a tree are one map.

    Example:
        >>> import torch
        >>> gates = torch.rand(2, 3, 8, 8)
        >>> layer = TreeDropout(p=0.5)
        >>> layer(gates).shape, layer.eval().evaluation_factor
        (torch.Size([2, 3, 8, 8]), 0.5)
    """

    default_places = ("tree_gates",)
    unit = "left subtree of a mixture of experts"
    paper = "Irsoy & Alpaydin, Neurocomputing 2021"
    needs = "a hierarchical mixture of experts as head: `network.tree_depth`"

    def __init__(self, p: float = 0.1, evaluation: str = "expected", shared: bool = False) -> None:
        super().__init__(p)
        self.evaluation = check_choice(evaluation, "evaluation", EVALUATIONS)
        self.shared = bool(shared)

    @property
    def evaluation_factor(self) -> float:
        """What the tree multiplies its gates by where this layer does not draw."""
        drawn = self.training or self.evaluation == "plain"
        return 1.0 if drawn else 1.0 - self.p

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `tree_dropout`."""
        return tree_dropout(x, self.p, shared=self.shared)

    def memory(self) -> dict[str, Tensor]:
        """The rate of the last step: with a schedule, that which the weights were trained with."""
        return {"p": torch.tensor(self.p, dtype=torch.float64)}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Takes the rate over, so that the gates in evaluation are those of the training.

        Raises:
            ValueError: the memory is not one of this layer.
        """
        if set(memory) != {"p"}:
            raise ValueError(f"TreeDropout remembers its rate p, got {sorted(memory)}")
        self.p = float(memory["p"])


def _check_tree(leaves: int, gates: int) -> None:
    if leaves < 1 or leaves & (leaves - 1) or gates != leaves - 1:
        raise ValueError(
            f"a full binary tree has L leaves, L a power of two, and L - 1 gates; got {leaves} "
            f"leaves and {gates} gates"
        )
