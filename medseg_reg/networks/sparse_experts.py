"""Sparsely gated mixtures of experts in the place of the feed-forward blocks of a transformer.

N. Shazeer et al., ICLR 2017, arXiv:1701.06538; D. Lepikhin et al., "GShard", ICLR 2021,
arXiv:2006.16668; W. Fedus et al., "Switch Transformers", JMLR 23, 2022, arXiv:2101.03961; for
images C. Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", NeurIPS 2021,
arXiv:2106.05974.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import kinds
from medseg_reg.insertion.slots import PartSlot
from medseg_reg.networks.pass_state import PassState
from medseg_reg.networks.shapes import run_on_shape
from medseg_reg.regularizers import GatingDropout
from medseg_reg.regularizers.experts.exchange import all_to_all, exchange_counts, machine
from medseg_reg.regularizers.experts.routing import (
    Assignments,
    assign,
    balance_loss,
    expert_capacity,
)


class SparseExperts(PassState):
    r"""Several feed-forward blocks in the place of one, of which each token meets one or two.

    .. math::
        g(x) = \operatorname{softmax}(W x), \qquad y = \sum_{e \in \operatorname{top}(g)} w_e f_e(x)

    with w = g for one expert a token and g divided by its sum for two, see `assign`. In training an
    expert takes at most ``capacity`` times its equal share of the tokens; what finds no room gets
    the answer 0, and only the block's shortcut carries it on. In evaluation there is no limit, so
    that the answer for an image does not depend on the others in its batch; published is a limit
    of twice the share. Gates are computed in float32.

    Place: `routing`, on the gates (B, experts, tokens); it is where `GatingDropout` goes. Where
    that layer closes all gates, no expert is run.

    Under data-parallel training every process has all weights. By default each computes its own
    tokens. With ``exchange`` every expert is computed by one process, to which the others send
    their tokens by all-to-all, in training alone: the same network, trained with the same
    gradients, as on machines of which each holds its own experts. Weights of experts then get
    their gradient in one process, and the averaging of gradients does the rest. A step in which
    `GatingDropout` takes part makes no all-to-all.

    Args:
        feed_forward: the block, from (..., width) to (..., width); experts are copies of it whose
            weights are shuffled, so that they keep its distribution and differ.
        width: features of a token.
        experts: how many.
        top: how many each token meets, 1 or 2.
        capacity: room of an expert in training, as a multiple of its equal share; published 1.
        balance: weight of `balance_loss` in the training.
        jitter: in training the router sees x times a factor drawn from 1 - jitter to 1 + jitter.
        exchange: whether tokens travel to the process of their expert.

    Attributes:
        penalty: what a training pass adds to the loss: balance * balance_loss; else None.

    Raises:
        ValueError: an argument is out of range.

    >>> block = SparseExperts(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), 8)
    >>> block(torch.rand(2, 10, 8)).shape
    torch.Size([2, 10, 8])
    """

    acts_as = kinds.LINEAR  # for whoever looks for places

    def __init__(
        self,
        feed_forward: nn.Module,
        width: int,
        experts: int = 4,
        top: int = 1,
        capacity: float = 1.0,
        balance: float = 0.01,
        jitter: float = 0.01,
        exchange: bool = False,
    ) -> None:
        super().__init__()
        if experts < 2 or top not in (1, 2):
            raise ValueError(f"expected 2 experts or more, top 1 or 2; got {experts}, top {top}")
        if capacity <= 0 or balance < 0 or not 0 <= jitter < 1:
            raise ValueError(
                f"expected capacity > 0, balance >= 0, 0 <= jitter < 1; got {capacity}, {balance}, "
                f"{jitter}"
            )
        self.width, self.top, self.capacity = width, top, float(capacity)
        self.balance, self.jitter = float(balance), float(jitter)
        self.exchange = bool(exchange)
        like = next(feed_forward.parameters())
        self.router = nn.Linear(width, experts, bias=False, device=like.device, dtype=like.dtype)
        self.experts = nn.ModuleList(_shuffled(feed_forward) for _ in range(experts))
        self.routing = PartSlot()
        self.penalty: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ..., width) to the same shape."""
        gates = self.gates(x)
        self.penalty = None
        if self.training and torch.is_grad_enabled() and self.balance > 0:
            self.penalty = self.balance * balance_loss(gates.transpose(1, 2).flatten(0, 1))
        layer, acting = self._gating(x.device)
        gates = self._routed(gates, layer, acting)
        if acting and layer is not None and layer.mode == "gate_expert_drop":
            return torch.zeros_like(x)
        tokens = x.reshape(-1, self.width)
        return self._mixed(tokens, gates.transpose(1, 2).flatten(0, 1), acting).view(x.shape)

    def _gating(self, device: torch.device) -> tuple[GatingDropout | None, bool]:
        """Return the layer that may keep tokens at home, and whether it does in this pass."""
        layers = [layer for layer in self.routing if isinstance(layer, GatingDropout)]
        if not layers:
            return None, False
        return layers[0], layers[0].decide(device)

    def _routed(self, gates: Tensor, layer: GatingDropout | None, acting: bool) -> Tensor:
        """Run the layers on the gates, with one coin for the gates and for what follows."""
        if layer is None:
            routed: Tensor = self.routing(gates)
            return routed
        before, layer.taking_part = layer.taking_part, acting
        try:
            routed = self.routing(gates)
        finally:
            layer.taking_part = before
        return routed

    def gates(self, x: Tensor) -> Tensor:
        """Return how much each expert is chosen for each token, (B, experts, tokens), float32."""
        tokens = x.reshape(x.shape[0], -1, self.width).float()
        if self.training and self.jitter > 0:
            noise = torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
            tokens = tokens * noise
        # Shapes without values know no autocast.
        exact = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with exact:
            logits = functional.linear(tokens, self.router.weight.float())
        return torch.softmax(logits, dim=-1).transpose(1, 2)

    def _mixed(self, tokens: Tensor, gates: Tensor, at_home: bool) -> Tensor:
        if _needs_fixed_shapes():
            return self._mixed_densely(tokens, gates)
        if tokens.is_meta:
            return self._mixed_evenly(tokens)
        room = None
        if self.training:
            # At home the tokens of this process have the experts of this process alone.
            homes = min(machine()[1], len(self.experts)) if at_home else 1
            room = expert_capacity(len(tokens), len(self.experts), self.top, self.capacity * homes)
        sent = assign(gates, self.top, room)
        answers = self._answers(tokens[sent.tokens], sent, at_home)
        answers = answers * sent.weights.to(answers.dtype).unsqueeze(1)
        mixed = torch.zeros(len(tokens), self.width, dtype=answers.dtype, device=tokens.device)
        return mixed.index_add(0, sent.tokens, answers)

    def _answers(self, tokens: Tensor, sent: Assignments, at_home: bool) -> Tensor:
        """Return what each expert says to the tokens sent to it, which are sorted by expert."""
        counts = torch.bincount(sent.experts, minlength=len(self.experts))
        rank, world = machine()
        # Without gradients one process may be looking at the network alone.
        together = self.training and torch.is_grad_enabled() and world > 1
        if self.exchange and together and not at_home:
            return self._answers_from_others(tokens, counts, rank, world)
        return self.run(tokens, range(len(self.experts)), counts.tolist())

    def _answers_from_others(self, tokens: Tensor, counts: Tensor, rank: int, world: int) -> Tensor:
        """Send tokens to the processes of their experts, and get their answers back."""
        total = len(self.experts)
        if total < world:
            raise ValueError(f"exchange: {total} experts for {world} processes; give one to each")
        owner = torch.arange(total, device=counts.device) * world // total
        own = (owner == rank).nonzero().squeeze(1).tolist()
        sent = torch.zeros(world, dtype=counts.dtype, device=counts.device)
        sent.index_add_(0, owner, counts)
        coming = exchange_counts(counts, torch.bincount(owner).tolist(), len(own))
        going, received = sent.tolist(), coming.sum(1).tolist()
        arrived = all_to_all(tokens, going, received)
        # They come sorted by sender, and by expert within; experts want theirs together.
        number = torch.arange(len(own), device=counts.device).repeat(world)
        order = number.repeat_interleave(coming.flatten()).argsort(stable=True)
        answers = self.run(arrived[order], own, coming.sum(0).tolist())
        # Under autocast a process that nobody asks would have answers of another type.
        answers = answers.to(tokens.dtype)
        return all_to_all(answers[order.argsort()], received, going)

    def run(self, tokens: Tensor, experts: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Return the answers of experts to tokens, the first counts[0] for the first, and so on."""
        answers = [
            self.experts[number](part)
            for number, part in zip(experts, tokens.split(list(counts)), strict=True)
            if len(part)
        ]
        return torch.cat(answers) if answers else tokens

    def _mixed_densely(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """Ask every expert about every token: an export has no shapes that hang on data.

        The answer is that without a limit.
        """
        weights, chosen = gates.topk(self.top, dim=1)
        if self.top > 1:
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-9)
        each = torch.zeros_like(gates).scatter(1, chosen, weights).to(tokens.dtype)
        answers = [f(tokens) * each[:, i : i + 1] for i, f in enumerate(self.experts)]
        return torch.stack(answers).sum(0)

    def _mixed_evenly(self, tokens: Tensor) -> Tensor:
        """Run on shapes alone, as many operations as if the choice were even."""
        share = expert_capacity(len(tokens), len(self.experts), self.top, 1.0)
        for expert in self.experts:
            expert(tokens[:share])
        return tokens.clone()

    def extra_repr(self) -> str:
        """Name the arguments."""
        return (
            f"width={self.width}, top={self.top}, capacity={self.capacity:g}, "
            f"balance={self.balance:g}, jitter={self.jitter:g}, exchange={self.exchange}"
        )


def _needs_fixed_shapes() -> bool:
    # Documented, but neither listed nor typed.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_exporting() or bool(tracing)


def _shuffled(module: nn.Module) -> nn.Module:
    """Return a copy whose weights are shuffled, each tensor in itself."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for weight in twin.parameters():
            order = torch.randperm(weight.numel(), device=weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return twin


def use_experts(
    network: nn.Module,
    shape: Sequence[int],
    owner: str,
    *,
    every: int = 2,
    experts: int = 4,
    top: int = 1,
    capacity: float = 1.0,
    balance: float = 0.01,
    jitter: float = 0.01,
    exchange: bool = False,
) -> list[str]:
    """Turn every second feed-forward block, or every n-th, of a network into `SparseExperts`.

    A feed-forward block is a module of two linear layers, from a width to a hidden one that is no
    smaller and back, with nothing between them but activation, normalization and dropout: the
    MLPs of MONAI's and timm's transformers.

    Args:
        network: changed in place; it is looked at in evaluation mode.
        shape: of an input (B, C, *spatial) that it takes.
        owner: its name in errors.
        every: 1 for all blocks, 2 for every second one, as in GShard.
        experts: see `SparseExperts`, as the others.
        top: see there.
        capacity: see there.
        balance: see there.
        jitter: see there.
        exchange: see there.

    Returns:
        The paths of the blocks, in the order in which they run.

    Raises:
        MedsegError: the network has fewer than `every` such blocks.
    """
    found = feed_forward_blocks(network, shape)
    chosen = found[every - 1 :: every]
    if not chosen:
        raise MedsegError(
            f"network.experts: {owner} has {len(found)} feed-forward blocks of a transformer, two "
            f"linear layers each, and every={every}. "
            + ("Use a smaller number." if found else "Use a transformer, such as monai.UNETR.")
        )
    for path in chosen:
        block = network.get_submodule(path)
        width = next(m.in_features for m in block.modules() if isinstance(m, nn.Linear))
        mixture = SparseExperts(block, width, experts, top, capacity, balance, jitter, exchange)
        mixture.train(block.training)
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, mixture)
    return chosen


def feed_forward_blocks(network: nn.Module, shape: Sequence[int]) -> list[str]:
    """Return the paths of the feed-forward blocks that run, in that order, the innermost ones."""
    paths = [path for path, module in network.named_modules() if path and _is_feed_forward(module)]
    inner = [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]
    met: dict[str, None] = {}
    handles = [
        network.get_submodule(path).register_forward_pre_hook(
            lambda module, inputs, path=path: met.setdefault(path)
        )
        for path in inner
    ]
    try:
        run_on_shape(network, shape, values=True)
    finally:
        for handle in handles:
            handle.remove()
    return list(met)


def _is_feed_forward(module: nn.Module) -> bool:
    between = (kinds.ACT, kinds.NORM, kinds.DROPOUT, kinds.IDENTITY)
    leaves = [m for m in module.modules() if next(m.children(), None) is None]
    linear = [m for m in leaves if isinstance(m, nn.Linear)]
    if len(linear) != 2 or isinstance(module, nn.Linear):
        return False
    others = [m for m in leaves if not isinstance(m, nn.Linear)]
    first, second = linear
    return (
        first.in_features == second.out_features
        and first.out_features == second.in_features >= first.in_features
        and all(kinds.module_kind(m) in between for m in others)
    )
