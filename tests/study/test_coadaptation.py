"""Maps before the output layer are taken away, correlated, and left as they were."""

import numpy as np
import pytest
import torch

from medseg_reg.config import parse_config
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.fit import fit
from medseg_reg.engine.network import load_run_network
from medseg_reg.errors import MedsegError
from medseg_reg.inference.evaluation import case_table, count_slices, evaluate
from medseg_reg.study.coadaptation import (
    channel_correlation,
    coadaptation,
    generalization_gap,
)
from tests.stores import make_store
from tests.training import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("coadaptation")
    store = make_store(path / "store", cases=6, slices=2, size=32)
    changes = {"regularization__architecture": [], "training__epochs": 1}
    return fit(parse_config(tiny_config(store.path, path / "run", **changes), "test"))


def test_without_a_map_less_the_scores_are_those_of_the_evaluation(run):
    table = coadaptation(run, rates=(0.0,), draws=3)
    assert table["draw"].tolist() == [0, 0]
    assert table["dice"].mean() == pytest.approx(evaluate(run)["dice"]["mean"])


def test_each_rate_has_its_draws_and_equal_seeds_give_equal_tables(run):
    table = coadaptation(run, rates=(0.25, 0.5), draws=2, seed=3)
    assert list(table.columns) == ["rate", "draw", "group", "dice"]
    assert table.groupby("rate")["draw"].unique().map(list).to_dict() == {0.25: [0, 1], 0.5: [0, 1]}
    assert table["dice"].between(0, 1).all()
    again = coadaptation(run, rates=(0.25, 0.5), draws=2, seed=3)
    assert again.equals(table)


def test_the_maps_that_are_taken_away_are_zero_and_the_others_unchanged(run, monkeypatch):
    seen = []
    from medseg_reg.study import coadaptation as module

    original = module._without
    monkeypatch.setattr(
        module, "_without", lambda c: lambda x: seen.append((c, x, original(c)(x))) or seen[-1][2]
    )
    coadaptation(run, rates=(0.5,), draws=1)
    for channels, before, after in seen:
        assert len(channels) == 2  # of 4 maps
        assert not after[:, channels].any()
        kept = [n for n in range(4) if n not in channels.tolist()]
        assert torch.equal(after[:, kept], before[:, kept])
    assert seen


def test_a_network_without_any_map_says_one_class_everywhere(run):
    # 0.99 of 4 maps are all of them; what is left is the bias.
    found = coadaptation(run, rates=(0.99,), draws=1)["dice"].to_numpy()
    store = SliceStore(run.config().data.store)
    cases = sorted(run.splits(store).test, key=lambda case: store.row(case).group)
    possible = []
    for label in range(len(store.classes)):
        scores = []
        for case in cases:
            truth = store.mask(case)
            counts = {case: count_slices(np.full_like(truth, label), truth, len(store.classes))}
            scores.append(case_table(store, counts, "one")["dice"].mean())
        possible.append(scores)
    assert any(np.allclose(found, scores) for scores in possible)


def test_the_network_of_the_run_stays_as_it_is(run):
    before = {k: v.clone() for k, v in load_run_network(run).state_dict().items()}
    coadaptation(run, rates=(0.5,), draws=1)
    after = load_run_network(run).state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_correlation_is_that_of_numpy_over_all_pixels(run, monkeypatch):
    maps = []
    from medseg_reg.study import coadaptation as module

    original = module._changed_input
    monkeypatch.setattr(
        module,
        "_changed_input",
        lambda layer, f: original(layer, lambda x: maps.append(x.numpy().copy()) or f(x)),
    )
    found = channel_correlation(run)
    flat = np.concatenate([x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1) for x in maps], axis=1)
    flat = flat[flat.std(axis=1) > 1e-6]
    r = np.corrcoef(flat.astype(np.float64))
    assert found == pytest.approx(np.abs(r[np.triu_indices(len(r), 1)]).mean(), rel=1e-4)


def test_the_gap_is_training_minus_validation(run):
    gap = generalization_gap(run)
    for part in ("train", "val"):
        assert gap[part] == pytest.approx(evaluate(run, part)["dice"]["mean"])
    assert gap["gap"] == gap["train"] - gap["val"]


@pytest.mark.parametrize(
    ("changes", "words"), [({"rates": (1.0,)}, "rate 1.0"), ({"draws": 0}, "0 draws")]
)
def test_bad_numbers_are_refused(run, changes, words):
    with pytest.raises(MedsegError, match=words):
        coadaptation(run, **changes)
