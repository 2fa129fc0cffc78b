"""The baseline reproduces what it is compared with, or refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

from medseg_reg.config import parse_config
from medseg_reg.errors import MedsegError
from medseg_reg.inference.predictor import Predictor
from tests.scripts import load_script
from tests.stores import make_store
from tests.training import tiny_config, write_config


class PredictorBesideAGpu(Predictor):
    """A predictor on a machine that seems to have a GPU."""

    def __init__(self, *arguments, **named):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            super().__init__(*arguments, **named)
        assert self.device.type == "cpu"


@pytest.fixture
def baseline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("benchmarks/monai_baseline.py")
    # MONAI's own sets more than the seed, for the whole process.
    monkeypatch.setattr(module, "set_determinism", torch.manual_seed)
    return module


def config_of(folder: Path, **changes: object) -> dict[str, object]:
    changes = {
        "network__channels": [4, 4, 4, 4],
        "regularization__architecture": [],
        "training__epochs": 1,
        "training__precision": "32",
        **changes,
    }
    return tiny_config(folder / "store", folder / "run", **changes)


@pytest.mark.parametrize("empty", ["one", "nan"])
def test_it_computes_on_the_cpu_and_ends_with_or_without_a_score(
    baseline, tmp_path, monkeypatch, capsys, empty
):
    make_store(tmp_path / "store", cases=6, slices=2, size=32)
    content = config_of(tmp_path, evaluation__empty=empty, optimizer={"betas": [0.5, 0.9]})
    config = write_config(tmp_path / "c.yaml", content)
    made = []
    adam = torch.optim.Adam
    monkeypatch.setattr(baseline, "Predictor", PredictorBesideAGpu)
    monkeypatch.setattr(torch.optim, "Adam", lambda *a: made.append(adam(*a)) or made[0])
    if empty == "nan":
        nothing = torch.full((2,), torch.nan)
        monkeypatch.setattr(baseline, "dice", lambda counts, empty: nothing)
        tables = baseline.case_table
        monkeypatch.setattr(baseline, "case_table", lambda *a: tables(*a).assign(dice=float("nan")))
    baseline.main(["--config", str(config), "--out", str(tmp_path / "out"), "optimizer.eps=1e-5"])
    said = capsys.readouterr().out.splitlines()[-1]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(pd.read_csv(tmp_path / "out" / "evaluation" / "per_case.csv")) == 2
    assert made[0].defaults["betas"] == (0.5, 0.9)
    assert made[0].defaults["eps"] == 1e-5
    if empty == "nan":
        assert said == "test: no score"
    else:
        assert said == f"test DICE {summary['dice']['mean']:.4f}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer__name", "adamw"),
        ("regularization__penalty__weight_decay", 0.01),
        ("regularization__penalty__l1", 0.01),
        ("regularization__error__class_weights", [1.0, 2.0]),
        ("regularization__error__label_smoothing", 0.1),
        ("regularization__optimization__gradient_clip", 1.0),
        ("regularization__optimization__early_stopping", {"patience": 3}),
        ("regularization__optimization__select", "last"),
        ("training__accumulate", 2),
        ("network__channels", [4, 8]),
    ],
)
def test_what_it_does_not_reproduce_is_refused_in_one_line(baseline, tmp_path, key, value):
    baseline.require_reproduced(parse_config(config_of(tmp_path), "test"))
    config = parse_config(config_of(tmp_path, **{key: value}), "test")
    with pytest.raises(MedsegError, match=r"does not reproduce [^,]*\. ") as error:
        baseline.require_reproduced(config)
    assert key.rsplit("__", 1)[-1] in str(error.value)
    assert "\n" not in str(error.value)
