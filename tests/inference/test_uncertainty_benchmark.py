"""The numbers that tell whether a network errs where it is unsure."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from medseg_reg.config import Config
from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.files import read_json, sha256_of
from tests.inference.made_runs import NOISY, make_run
from tests.scripts import load_script
from tests.stores import make_store


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("benchmarks/uncertainty.py")


def counted(bins: np.ndarray, wrong: np.ndarray, fine: int) -> np.ndarray:
    return np.bincount(2 * bins + wrong, minlength=2 * fine).reshape(fine, 2)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_correlation_and_area_are_those_of_the_libraries(bench, share):
    rng = np.random.default_rng(0)
    bins = rng.integers(0, 20, 4000)
    wrong = (rng.random(4000) < share * bins / 10).astype(int)
    counts = counted(bins, wrong, 20)
    assert bench.spearman(counts) == pytest.approx(spearmanr(bins, wrong)[0], abs=1e-12)
    assert bench.area(counts) == pytest.approx(roc_auc_score(wrong, bins), abs=1e-12)


def test_perfect_order_has_the_largest_correlation(bench):
    right, wrong = np.arange(980), np.arange(980, 1000)
    counts = np.zeros((1000, 2), int)
    counts[right, 0] = counts[wrong, 1] = 1
    assert bench.area(counts) == 1
    assert bench.largest(counts) == bench.spearman(counts)
    # Without ties it depends on the share of wrong pixels alone.
    assert bench.largest(counts) == pytest.approx(np.sqrt(3 * 0.02 * 0.98), abs=1e-3)
    swapped = counts[::-1]
    assert bench.spearman(swapped) < 0
    assert bench.largest(swapped) == pytest.approx(bench.largest(counts))


def test_the_largest_correlation_splits_a_bin_where_it_must(bench):
    counts = np.array([[5, 5], [3, 1]])
    ideal = np.array([[8, 2], [0, 4]])
    assert bench.largest(counts) == pytest.approx(bench.spearman(ideal))


def test_without_right_or_wrong_pixels_there_is_no_number(bench):
    counts = np.array([[5, 0], [3, 0]])
    assert np.isnan(bench.spearman(counts))
    assert np.isnan(bench.area(counts))


def test_rates_are_shares_of_wrong_pixels(bench):
    rates = bench.rates(np.array([[3, 1], [0, 0], [0, 8]]))
    assert rates[[0, 2]].tolist() == [0.25, 1]
    assert np.isnan(rates[1])


def test_intervals_are_over_groups(bench):
    low, high = bench.interval([1.0, 1.0, 4.0], lambda some: float(np.mean(some)))
    assert 1 <= low < 2 < high <= 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    store: SliceStore = make_store(folder / "store", cases=6, slices=4, size=(24, 32))
    path = make_run(folder / "run", store, **NOISY)
    splits = make_splits(store, RunDirectory(path).config().data.split)
    splits.write(path / "splits.json")
    return path


def test_a_run_is_measured(bench, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "RESAMPLES", 20)
    out = tmp_path / "u.png"
    bench.main(["--run", str(run), "--draws", "3", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "2 patients or videos, 6144 pixels" in printed
    assert "| mutual information |" in printed
    with Image.open(out) as picture:
        assert picture.size == (800, 320)
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert set(numbers["measures"]) == set(bench.MEASURES)
    entropy = numbers["measures"]["entropy"]
    assert entropy["pixels"] == 6144
    assert sum(entropy["share_of_pixels"]) == pytest.approx(1)
    low, high = entropy["area_interval"]
    assert low <= entropy["area"] <= high
    # What is needed to train and measure it again.
    config = RunDirectory(run).config()
    assert Config.model_validate(numbers["config"]) == config
    splits = read_json(run / "splits.json")
    assert (numbers["splits_hash"], numbers["cases"]) == (splits["hash"], splits["test"])
    assert numbers["weights_sha256"] == sha256_of(run / "weights.safetensors")


def test_ignored_pixels_are_neither_right_nor_wrong(bench, tmp_path):
    store = make_store(tmp_path / "store", cases=6, slices=3, size=(24, 32), ignore_label=255)
    path = make_run(tmp_path / "run", store, data__ignore_label=255, **NOISY)
    splits = make_splits(store, RunDirectory(path).config().data.split)
    splits.write(path / "splits.json")
    found = bench.gather(RunDirectory(path), "test", draws=2, seed=0)
    truth = {case: np.array(store.mask(case)) for case in splits.test}
    for name in ("single", "entropy"):
        for case in splits.test:
            known = truth[case] != 255
            for kind in ("counts", "bins"):
                assert found[kind][name][case].sum() == known.sum()
            shares, wrong = found["slices"][name][case], found["counts"][name][case][:, 1].sum()
            assert (shares[:, 1] * known.sum(axis=(1, 2))).sum() == pytest.approx(wrong)
