"""Gating Dropout: now and then, every token stays with the experts of its own machine."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_choice,
    check_count,
    check_map,
    check_rate,
    register,
)
from medseg_reg.regularizers.experts.exchange import agreed_coin, machine

__all__ = ["GatingDropout", "gating_dropout", "home_experts"]

MODES = ("gate_drop", "gate_expert_drop")


def home_experts(batch: int, experts: int, groups: int, device: torch.device) -> Tensor:
    """Which experts are on the machine of which sample.

    Experts lie in order on as many machines as there are processes. In a single process there are
    ``groups`` virtual machines, and the samples of a batch lie on them in order too. There are
    never more machines than experts.

    Args:
        batch: samples of this process.
        experts: experts on all machines.
        groups: virtual machines of a single process.
        device: of the result.

    Returns:
        bool (batch, experts).

    Example:
        >>> home_experts(2, 4, 2, torch.device("cpu")).int().tolist()
        [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    rank, world = machine()
    machines = min(world if world > 1 else groups, experts)
    of_expert = torch.arange(experts, device=device) * machines // max(1, experts)
    if world > 1:
        of_sample = torch.full((batch,), rank * machines // world, device=device)
    else:
        of_sample = torch.arange(batch, device=device) * machines // max(1, batch)
    return of_sample[:, None] == of_expert


def gating_dropout(
    x: Tensor,
    p: float = 0.3,
    training: bool = True,
    *,
    mode: str = "gate_drop",
    groups: int = 2,
    taking_part: bool | None = None,
) -> Tensor:
    """Closes the gates to experts on other machines, or all gates; see `GatingDropout`.

    Example:
        >>> import torch
        >>> gates = torch.full((2, 4, 1), 0.25)
        >>> gating_dropout(gates, taking_part=True).squeeze().tolist()
        [[0.25, 0.25, 0.0, 0.0], [0.0, 0.0, 0.25, 0.25]]
    """
    p = check_rate(p, "gating_dropout")
    check_choice(mode, "mode", MODES)
    check_count(groups, "groups", "gating_dropout")
    if not training or p == 0.0 or taking_part is False:
        return x
    check_map(x, "gating_dropout")
    closed = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if mode == "gate_drop":
        closed = ~home_experts(x.shape[0], x.shape[1], groups, x.device)
    if taking_part is None:
        closed = closed & (agreed_coin(x.device) < p)
    return torch.where(closed.view(*x.shape[:2], *[1] * (x.dim() - 2)), torch.zeros_like(x), x)


@register("gating_dropout")
class GatingDropout(Regularizer):
    """In a share p of the steps, keeps every token with the experts of its own machine.

    The gates g (samples, experts, tokens) of a sparsely gated mixture of experts become

        gate_drop           g * h, where h is 1 for the experts on the machine of the sample
        gate_expert_drop    0: no expert is asked, and the shortcut beside the block carries on

    and the mixture then sends each token to its best open gate, with the weight that was computed;
    the loss that balances the experts sees the gates before. Nothing is rescaled. As a regularizer
    it keeps tokens and experts from settling on each other; over several processes it also saves
    the exchange of tokens.

    One coin decides for all samples and all processes: a training loop sets ``taking_part``, the
    same for all layers of a step; else process 0 tosses for each layer, and the others are told
    (not where no gradients are computed; so under re-entrant checkpointing let a loop decide).
    With ``network.experts.exchange`` each process has its own experts, and a step that takes part
    makes **no** all-to-all, there and back. Without, every process computes all experts at home,
    which gives the same network, and its "machine" says which experts those are. In a single
    process, samples and experts are dealt out to ``groups`` virtual machines.

    Here p is the participation rate; of the gates, p * (1 - 1 / machines) are closed on average
    under gate_drop. It couples the samples of a batch by their common coin and by their place in
    it. For MC-dropout gate_drop counts as not random: where a sample lies in its batch is no
    chance.

    Args:
        p: share of steps that take part, in [0, 1). 0 switches the layer off, whatever
            ``taking_part`` says.
        mode: "gate_drop" or "gate_expert_drop".
        groups: virtual machines where there is a single process.

    Attributes:
        taking_part: None (at first): the layer tosses the coin. True or False: the training loop
            has decided for this step.
        magnified_weight_decay: None; the layer asks for no other weight decay.

    Shapes:
        gates (B, experts, tokens), or (B, experts, *spatial) with up to three spatial axes; the
        output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), an unknown ``mode``, ``groups`` below 1, or an input of
            another shape or kind.

    Paper:
        R. Liu, Y. J. Kim, A. Muzio, H. H. Awadalla, "Gating Dropout: Communication-efficient
        Regularization for Sparsely Activated Transformers", ICML 2022, PMLR 162:13782-13792,
        arXiv 2205.14336. The default is the published rate of Gate-Drop as far as it is known;
        that of Gate-Expert-Drop is 0.2. The paper tosses a coin for each layer; a training loop
        of this package one for all layers of a step. Virtual machines are an addition for those
        who train on one.

    Example:
        >>> import torch
        >>> layer = GatingDropout(p=0.3, mode="gate_expert_drop")
        >>> layer.taking_part = True
        >>> layer(torch.rand(2, 4, 9)).abs().max().item()
        0.0
    """

    stochastic = False
    default_places = ("routing",)
    unit = "gate to an expert on another machine"
    paper = "Liu et al., ICML 2022"
    needs = "sparsely gated experts: `network.experts`"

    def __init__(self, p: float = 0.3, mode: str = "gate_drop", groups: int = 2) -> None:
        super().__init__(p)
        self.mode = check_choice(mode, "mode", MODES)
        self.groups = check_count(groups, "groups", type(self).__name__)
        self.taking_part: bool | None = None
        self.magnified_weight_decay: float | None = None
        self.stochastic = self.mode == "gate_expert_drop"

    def decide(self, device: torch.device) -> bool:
        """Whether the layer takes part in this pass: what the loop said, or the common coin."""
        if not self.training or self.p == 0.0:
            return False
        if self.taking_part is not None:
            return self.taking_part
        return bool(agreed_coin(device) < self.p)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `gating_dropout`."""
        return gating_dropout(
            x, self.p, mode=self.mode, groups=self.groups, taking_part=self.taking_part
        )
