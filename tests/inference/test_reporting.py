"""Scores of a network that reads the true labels at test time are marked, and nothing predicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg_reg.config import parse_config
from medseg_reg.data.preprocessing import Fit
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.fit import fit
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.evaluate import main as evaluate_main
from medseg_reg.inference.evaluation import evaluate, headline
from medseg_reg.predict import main as predict_main
from tests.engine.probe import Probe, register_probe
from tests.stores import make_store
from tests.training import tiny_config

NOTE = "INVALID FOR REPORTING: Probe read the true labels at test time"


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Train with a layer that may or may not read the true labels at test time."""
    register_probe(monkeypatch)
    store = make_store(tmp_path / "store", cases=6, slices=3, size=32)

    def run(valid: bool) -> RunDirectory:
        content = tiny_config(
            store.path,
            tmp_path / f"run_{valid}",
            training__epochs=1,
            data__image={"size": [24, 16], "fit": "letterbox"},
            evaluation={"batch_size": 2},
        )
        layer = {"name": "probe", "places": "bottleneck", "valid": valid}
        content["regularization"]["architecture"] = [layer]
        return fit(parse_config(content, "test"))

    return run


def test_such_scores_are_marked_wherever_they_stand(trained, capsys):
    run = trained(valid=False)
    evaluate_main(["--run", str(run.path)])
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["valid_for_reporting"] is False
    assert summary["notes"] == [NOTE]
    printed = capsys.readouterr().out.strip().split("\n")
    assert f"note: {NOTE}" in printed
    assert printed[-1].endswith(" (INVALID FOR REPORTING)")


def test_other_scores_are_not(trained):
    run = trained(valid=True)
    summary = evaluate(run)
    assert (summary["valid_for_reporting"], summary["notes"]) == (True, [])
    assert "INVALID" not in headline(run, summary)
    del summary["valid_for_reporting"]  # as in summaries from before there were such layers
    assert "INVALID" not in headline(run, summary)


def test_the_layer_gets_the_true_labels_at_the_size_of_the_network(trained, monkeypatch):
    run = trained(valid=False)
    given: list[Tensor | None] = []
    monkeypatch.setattr(Probe, "forward", lambda self, x: given.append(self.labels) or x)
    evaluate(run)
    config, store = run.config(), SliceStore(run.config().data.store)
    fitted = Fit.of(config.data.image, (32, 32))
    cases = json.loads((run.path / "splits.json").read_text())["test"]
    expected = [fitted.mask(one) for case in cases for one in store.mask(case)]
    # The tables come first, then one slice for each panel.
    tables = given[: 2 * len(cases)]
    assert [len(labels) for labels in tables] == [2, 1] * len(cases)
    assert np.array_equal(torch.cat(tables).numpy(), np.stack(expected))
    # The passes that count operations have no labels.
    later = [labels for labels in given[2 * len(cases) :] if labels is not None]
    assert later
    assert all(len(labels) == 1 for labels in later)


def test_prediction_without_labels_is_refused(trained, tmp_path):
    run = trained(valid=False)
    where = ["--input", str(tmp_path / "store"), "--output", str(tmp_path / "out")]
    with pytest.raises(MedsegError, match=r"Probe of this network reads the true labels"):
        predict_main(["--run", str(run.path), *where])
    assert not list((tmp_path / "out").glob("*"))
