"""Which sizes an exported network shall take, and the proof that it gives what PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medseg_reg.export_formats import Format
from medseg_reg.networks.build import Network, probabilities
from medseg_reg.networks.foreign import ForeignNetwork
from medseg_reg.networks.reuse import coarse_of

Shape = tuple[int, int, int, int]

# Of probabilities as they are; of logits in units of the largest logit, where that is above 1.
TOLERANCE = 1e-4


class Differs(Exception):
    """An exported network does not give what PyTorch gives."""


@dataclass(frozen=True)
class Plan:
    """The sizes of one attempt to export a network.

    Attributes:
        dynamic: whether rows and columns may differ from the example's; the batch always may.
        smallest: rows and columns that a dynamic export takes at least.
        example: the shape that the network is traced with.
        probes: the shapes that the export is compared on; the first is that of the run.
    """

    dynamic: bool
    example: Shape
    probes: tuple[Shape, ...]
    smallest: int = 1

    @property
    def size(self) -> tuple[int, int] | None:
        """Rows and columns that the export takes; None for any."""
        return None if self.dynamic else self.example[2:]

    @property
    def takes(self) -> tuple[int, int] | str:
        """Rows and columns that the export takes, or which ones in words."""
        if not self.dynamic:
            return self.example[2:]
        return "any" if self.smallest == 1 else f"any, from {self.smallest} rows and columns"


def smallest_of(network: Network, channels: int, form: Format) -> int:
    """Return how many rows and columns an export for any size takes at least.

    Ours take one pixel. But a program of torch that was made with larger maps refuses maps of one
    pixel. ONNX and TorchScript refuse nothing, so what they give there is compared for ours, and is
    not promised for other networks. Images that are shrunk for a coarse network are shrunk in an
    exported program whatever their size.
    """
    if least := _shrunk_to(network):
        return max(network.factor, least) + 1
    anything = form != "pt2" and not isinstance(network, ForeignNetwork)
    return 1 if anything and _runs(network, (1, channels, 1, 1)) else network.factor + 1


def plans_of(
    network: Network, channels: int, size: tuple[int, int], form: Format = "pt2"
) -> Iterator[Plan]:
    """Yield the plans for any size, unless the network takes one alone, then that for one size.

    Args:
        network: the network.
        channels: image channels.
        size: rows and columns of the run's images.
        form: what it is exported as.
    """
    rows, columns = size
    if not (isinstance(network, ForeignNetwork) and network.fixed):
        # Neither square nor a multiple, and so large that no map on the way is one pixel wide:
        # what is 1 in the example stays 1 in an exported program.
        factor = network.factor
        example = (2, channels, max(rows, 2 * factor) + 1, max(columns, 2 * factor) + factor + 2)
        others: tuple[Shape, ...] = (
            (3, channels, rows, columns),
            (2, channels, rows + 1, columns + factor + 2),
            (1, channels, 2 * rows + factor - 1, columns),
            (1, channels, max(rows // 2, factor) + 1, max(columns // 2, factor) + 3),
        )
        first = (1, channels, rows, columns)
        few = ((1, channels, 1, 1), (2, channels, factor, columns), (1, channels, rows, 1))
        shrunk_to = _shrunk_to(network)
        if shrunk_to:
            others = tuple(one for one in others if min(one[2:]) > shrunk_to)
        least = max(factor, shrunk_to) + 1
        for smallest in dict.fromkeys((smallest_of(network, channels, form), least)):
            if shrunk_to and min(rows, columns) < smallest:
                continue  # which would leave out the run's own images
            shapes = others + few * (smallest == 1)
            probes = (first, *(one for one in shapes if _runs(network, one)))
            yield Plan(True, example, probes, smallest)
    probes = tuple((batch, channels, rows, columns) for batch in (1, 3))
    yield Plan(False, (2, channels, rows, columns), probes)


def _shrunk_to(network: nn.Module) -> int:
    """Return the longer side of what a coarse network inside sees; 0 if it takes images as is."""
    coarse = coarse_of(network)
    if coarse is None:
        return 0
    return max(*(coarse.size or (0, 0)), _shrunk_to(coarse.network))


def _runs(network: nn.Module, shape: Shape) -> bool:
    """Whether the network takes such images; some do not take small ones."""
    try:
        with torch.inference_mode():
            network(torch.zeros(shape))
    except Exception:
        return False
    return True


def images(shape: Shape, number: int) -> Tensor:
    """Return images with values from 0 to 1, the same for the same number."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(number))


def require_equal(
    network: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    plan: Plan,
    *,
    logits: bool = True,
) -> float:
    """Compare an exported network with the one it was made from, on every shape of a plan.

    Args:
        network: in evaluation mode.
        exported: maps images to what the network gives.
        plan: the shapes.
        logits: whether both give logits; else class probabilities.

    Returns:
        The largest difference of a probability.

    Raises:
        Differs: by more than `TOLERANCE`.
    """
    worst = 0.0
    for number, shape in enumerate(plan.probes):
        x = images(shape, number)
        with torch.inference_mode():
            want, got = network(x), exported(x)
        if got.shape != want.shape:
            raise Differs(
                f"the export gives {tuple(got.shape)} for images {shape}, PyTorch "
                f"{tuple(want.shape)}"
            )
        difference = _largest(want, got) / max(1.0, float(want.abs().max()))
        of_probability = difference
        if logits:
            of_probability = _largest(probabilities(want), probabilities(got))
        if not max(difference, of_probability) <= TOLERANCE:  # so that NaN does not pass
            raise Differs(
                f"the export differs from PyTorch by {max(difference, of_probability):.2g} for "
                f"images {shape}, up to {TOLERANCE:g} is tolerated"
            )
        worst = max(worst, of_probability)
    return worst


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
