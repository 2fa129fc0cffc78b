"""A run trained with Structural Dropout is scored at every width, without training again."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from medseg_reg.config import parse_config
from medseg_reg.engine.fit import fit
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.evaluation import evaluate
from medseg_reg.inference.width import width_curve
from medseg_reg.width import main
from tests.stores import make_store
from tests.training import tiny_config


def trained(tmp_path: Path, layer: dict) -> RunDirectory:
    store = make_store(tmp_path / "store", cases=6, slices=3, size=32)
    content = tiny_config(store.path, tmp_path / "run", training__epochs=2)
    content["regularization"]["architecture"] = [layer]
    return fit(parse_config(content, "test"))


def test_fewer_channels_have_fewer_parameters_and_all_of_them_the_score_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, {"name": "structural_dropout", "p": 0.5, "lower_bound": 1})
    main(["--run", str(run.path), "--widths", "1", "0.5", "0.25"])
    printed = capsys.readouterr().out
    assert "parameters" in printed
    assert "None" not in printed
    table = pd.read_csv(run.path / "evaluation" / "width.csv")
    assert table["width"].tolist() == [0.25, 0.5, 1.0]
    assert table["parameters"].is_monotonic_increasing
    assert table["parameters"].is_unique
    whole = evaluate(run)["dice"]["mean"]
    assert table["dice"].iloc[-1] == pytest.approx(whole, abs=1e-6)
    assert (run.path / "evaluation" / "width.png").stat().st_size > 1000


def test_a_run_without_the_layer_has_one_width_only(tmp_path: Path) -> None:
    run = trained(tmp_path, {"name": "spatial_dropout"})
    with pytest.raises(MedsegError, match="without structural_dropout"):
        width_curve(run)
    with pytest.raises(MedsegError, match=r"expected shares of the channels in \(0, 1\]"):
        width_curve(run, [0.5, 1.5])
