"""The score of a network at smaller widths, without training it again.

A network that was trained with Structural Dropout computes at every width; `insertion.narrow` cuts
it there for good.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pandas as pd
import torch
from torch import nn

from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.evaluation import (
    Part,
    case_table,
    count_cases,
    run_predictor,
    slice_table,
    summarise,
)
from medseg_reg.inference.pictures import write_width_curve
from medseg_reg.inference.predictor import Predictor
from medseg_reg.inference.tables import write_csv
from medseg_reg.insertion.narrow import narrow
from medseg_reg.networks.build import parameter_count
from medseg_reg.regularizers import StructuralDropout

WIDTHS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def width_curve(
    run: RunDirectory, widths: Sequence[float] = WIDTHS, part: Part = "test"
) -> pd.DataFrame:
    """Score a finished run at several widths, and write `width.csv` and `width.png`.

    Args:
        run: a run that was trained with `structural_dropout` at places that can be cut.
        widths: shares of the channels that stay, in (0, 1].
        part: the part of the split.

    Returns:
        One row a width: `width`, `parameters` of the narrower network, volume `dice` and its
        interval `low` to `high` over patients.

    Raises:
        MedsegError: a width is out of range, the run has no such layer, or it cannot be cut.
    """
    if not widths or any(not 0 < width <= 1 for width in widths):
        raise MedsegError(f"--widths {list(widths)}: expected shares of the channels in (0, 1].")
    config, network = run.config(), load_run_network(run)
    if not any(isinstance(layer, StructuralDropout) for layer in network.modules()):
        raise MedsegError(
            f"{run.path}: was trained without structural_dropout, so it has one width only. Add it "
            "to regularization.architecture and train again."
        )
    store, splits = run.data(config.data.store)
    rows = []
    for width in sorted(widths):
        counts = count_cases(
            store,
            getattr(splits, part),
            _predictor(run, network, width),
            f"width {width:g}",
            config.training.progress,
        )
        per_case, per_slice = (
            table(store, counts, config.evaluation.empty) for table in (case_table, slice_table)
        )
        score = summarise(per_case, per_slice, config)
        rows.append(
            {
                "width": width,
                "parameters": _parameters(run, network, width),
                "dice": score["dice"]["mean"],
                "low": score["dice"]["low"],
                "high": score["dice"]["high"],
            }
        )
    curve = pd.DataFrame(rows)
    folder = run.path / "evaluation" / ("" if part == "test" else part)
    write_csv(curve, folder / "width.csv")
    write_width_curve(curve, folder / "width.png")
    return curve


def _predictor(run: RunDirectory, network: nn.Module, width: float) -> Predictor:
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, StructuralDropout):
            layer.width = width
    return run_predictor(run, network)


def _parameters(run: RunDirectory, network: nn.Module, width: float) -> int:
    """Count the parameters of the network cut to a width, which proves that it can be."""
    side = 2 * getattr(network, "factor", 16)
    example = torch.zeros(1, run.data_facts().channels, side, side)
    return parameter_count(narrow(network, width, example))
