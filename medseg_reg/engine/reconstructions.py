"""The picture of a masked autoencoder: what it saw of some slices, and what it made of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot
from torch import Tensor

from medseg_reg.data.dataset import SliceDataset
from medseg_reg.files import replacing
from medseg_reg.networks.masked_autoencoder import MaskedAutoencoder

LINES = 4
HIDDEN = "#3b6ea5"


def write_reconstructions(network: MaskedAutoencoder, slices: SliceDataset, path: Path) -> None:
    """Draw some slices, spread evenly, without their hidden patches, and with these filled in.

    Args:
        network: in evaluation mode, on the CPU.
        slices: of which some are drawn.
        path: the picture.
    """
    numbers = np.unique(np.linspace(0, len(slices) - 1, LINES).round().astype(int)).tolist()
    images = torch.stack([slices[number]["image"] for number in numbers])
    with torch.no_grad():
        seen, filled = network.reconstructed(images)
    figure, grid = pyplot.subplots(
        len(numbers), 3, figsize=(7.5, 2.6 * len(numbers)), layout="constrained", squeeze=False
    )
    titles = ("slice", "visible patches", "hidden ones filled in")
    for line, number, *three in zip(grid, numbers, images, seen, filled, strict=True):
        case, where = slices.items[number]
        for axes, image, title in zip(line, three, titles, strict=True):
            _draw(axes, image)
            axes.set_title(title, fontsize=8)
        line[0].set_title(f"{slices.cases[case]} #{where}", fontsize=8)
    if network.normalize:
        figure.suptitle(
            "brightness and contrast of filled-in patches are the true ones", fontsize=8
        )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def _draw(axes: Any, image: Tensor) -> None:
    """Draw an image (C, H, W) with values from 0 to 1; NaN is what is hidden."""
    shown = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    axes.set_facecolor(HIDDEN)
    opaque = ~shown.isnan().any(0, keepdim=True)
    picture = torch.cat([shown.nan_to_num(0.0).clamp(0, 1), opaque.float()])
    axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
