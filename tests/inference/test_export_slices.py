"""An exported network that fits slices to its size itself does what a prediction does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medseg_reg.data.preprocessing import Fit, ImageSpec
from medseg_reg.inference.export.script import without_warnings
from medseg_reg.inference.export.scripted import WholeSlices
from medseg_reg.networks.build import probabilities


@pytest.mark.parametrize("fit", ["resize", "letterbox", "crop"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_scripted_sizes_are_those_of_prediction(fit: str, outputs: int) -> None:
    torch.manual_seed(0)
    network, rng = nn.Conv2d(1, outputs, 3, padding=1).eval(), np.random.default_rng(0)
    for size in ((24, 37), (40, 16)):
        spec = ImageSpec(window=(0, 1), size=size, fit=fit)
        with without_warnings():
            scripted = torch.jit.script(WholeSlices(network, spec))
        sources = rng.integers(1, 120, (20, 2)).tolist()
        for rows, columns in [*sources, size, (2 * size[0], 3 * size[1]), (1, 1), (9, 500)]:
            image = rng.random((rows, columns, 1), dtype=np.float32)
            plan_ = Fit.of(spec, (rows, columns))
            with torch.inference_mode():
                fitted = torch.from_numpy(plan_.image(image)).permute(2, 0, 1)[None]
                want = plan_.undo(probabilities(network(fitted)))
                got = scripted(torch.from_numpy(image).permute(2, 0, 1)[None])
            assert got.shape == want.shape == (1, max(outputs, 2), rows, columns)
            assert (got - want).abs().max() < 1e-5, (rows, columns, size)
