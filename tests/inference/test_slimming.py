"""The patches that a finished classifier needs: found, scored, kept beside the run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from medseg_reg.config import parse_as
from medseg_reg.config_classification import ClassificationConfig
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.classification import (
    ClassificationDirectory,
    classify,
    load_run_classifier,
)
from medseg_reg.errors import MedsegError
from medseg_reg.inference.classification import evaluate_classifier, judge, score_slices
from medseg_reg.inference.slimming import load_slimmed
from medseg_reg.slim import main
from tests.stores import make_store
from tests.training import tiny_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", slices=3, empty=0.6)


@pytest.fixture(scope="module")
def run(store: SliceStore, tmp_path_factory: pytest.TempPathFactory) -> ClassificationDirectory:
    path = tmp_path_factory.mktemp("runs") / "run"
    network = {"name": "deit_tiny_patch16_224", "patch_size": 8, "embed_dim": 12, "depth": 3}
    content = tiny_config(
        store.path,
        path,
        network={**network, "num_heads": 3},
        data__image={"size": [32, 32]},
        regularization={},
        presence={},
        evaluation={"resamples": 100},
        training__epochs=1,
    )
    run = classify(parse_as(ClassificationConfig, content, "test"))
    evaluate_classifier(run)
    return run


def test_a_run_that_was_not_slimmed_is_told_how(run: ClassificationDirectory) -> None:
    with pytest.raises(MedsegError, match=r"slimming\.json: is missing.*medseg_reg\.slim --run"):
        load_slimmed(run)


def test_the_command_keeps_what_it_found_beside_the_run(
    store: SliceStore, run: ClassificationDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--run", str(run.path), "--tolerance", "0.001", "--step", "2", "--images", "4"])
    said = capsys.readouterr().out
    content = json.loads((run.path / "slimming.json").read_text())
    counts = [len(row) for row in content["keep"]]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert f"patches behind each block, of 16: {', '.join(map(str, counts))}" in said
    assert content["operations_slimmed"] < content["operations"]
    # Scores are those of the network that the file describes.
    network, config = load_slimmed(run), run.config()
    splits = json.loads((run.path / "splits.json").read_text())
    parts = {part: SliceDataset(store, splits[part], ImageSpec()) for part in ("val", "test")}
    table = pd.concat(score_slices(network, one, config).assign(part=p) for p, one in parts.items())
    assert judge(table, config)["classes"] == content["classes"]


def test_a_tolerance_of_nothing_gives_the_network_itself(run: ClassificationDirectory) -> None:
    main(["--run", str(run.path), "--tolerance", "0", "--images", "2"])
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_slimmed(run)(images), load_run_classifier(run)(images))


def test_fine_tuned_weights_stand_beside_those_of_the_run(run: ClassificationDirectory) -> None:
    before = run.weights.read_bytes()
    main(["--run", str(run.path), "--tolerance", "0", "--step", "8", "--epochs", "1"])
    assert run.weights.read_bytes() == before
    found, whole = load_slimmed(run).state_dict(), load_run_classifier(run).state_dict()
    assert found.keys() == whole.keys()
    changed = {name for name in whole if not torch.equal(found[name], whole[name])}
    assert changed
    assert all(name.startswith(("blocks.0.", "blocks.1.")) for name in changed)


def test_arguments_out_of_range_are_told(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="--tolerance and --epochs are 0 or more"):
        main(["--run", str(tmp_path), "--tolerance", "-1"])
