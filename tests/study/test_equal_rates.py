"""With equal rates all methods of a study drop the same share, whatever their `p` means."""

from __future__ import annotations

import pytest

from medseg_reg.config import load_config
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, write_json
from medseg_reg.study import __main__ as study_main
from medseg_reg.study.equal_rates import match, with_equal_rates
from medseg_reg.study.grid import expand
from tests.stores import make_store
from tests.study.studies import study_of
from tests.training import tiny_config, write_config

METHODS = {
    "none": [],
    "dropout": [{"name": "dropout", "places": "between_convs"}],
    "focused": [{"name": "focused_dropout", "places": "between_convs", "gamma": [0.0, 0.2]}],
    "both": [
        {"name": "drop_block", "places": "bottleneck.*", "block_size": 3, "faithful": True},
        {"name": "dropout", "places": "input"},
    ],
}


@pytest.fixture
def cells(tmp_path):
    make_store(tmp_path / "store", cases=6, slices=4, size=32)
    study = study_of(tmp_path / "store", tmp_path, methods=METHODS, equal_rates=0.1)
    return expand(study)


def rates(cells):
    """The `p` of every layer, by method, of the first seed."""
    return {
        cell.spot.method: [one.parameters["p"] for one in cell.config.regularization.architecture]
        for cell in cells
        if cell.spot.seed == 0
    }


def test_a_layer_whose_rate_is_its_share_keeps_it_and_others_get_the_one_they_need(cells, tmp_path):
    notes = tmp_path / "study" / "equal_rates.json"
    found = rates(with_equal_rates(cells, 0.1, notes))
    assert found["none"] == []
    assert found["dropout"] == [0.1]
    assert found["focused"][0] > 0.11  # it takes part in a share of the batches
    assert found["both"][1] == 0.1
    for layers in read_json(notes)["runs"].values():
        assert all(one["realised"] == pytest.approx(0.1, rel=0.1) for one in layers)


def test_what_was_found_is_kept_for_a_study_that_goes_on(cells, tmp_path):
    notes = tmp_path / "equal_rates.json"
    first = with_equal_rates(cells, 0.1, notes)
    kept = read_json(notes)
    kept["runs"]["blobs/unet/focused"][0]["p"] = 0.7777
    write_json(notes, kept)
    assert rates(with_equal_rates(cells, 0.1, notes))["focused"] == [0.7777]
    notes.unlink()
    assert [one.config for one in with_equal_rates(cells, 0.1, notes)] == [
        one.config for one in first
    ]


def test_all_seeds_have_the_same_and_a_run_can_be_repeated_by_hand(cells, tmp_path):
    file = write_config(tmp_path / "base.yaml", tiny_config(tmp_path / "store", tmp_path / "run"))
    study = study_of(
        tmp_path / "store",
        tmp_path,
        methods={"none": [], "focused": METHODS["focused"]},
        datasets={"blobs": str(file)},
        equal_rates=0.1,
    )
    changed = with_equal_rates(expand(study), 0.1, tmp_path / "equal_rates.json")
    for cell in changed:
        assert load_config(file, cell.overrides) == cell.config
    focused = [cell for cell in changed if cell.spot.method == "focused"]
    assert len({str(cell.config.regularization.architecture) for cell in focused}) == 1


def test_a_share_that_a_layer_cannot_drop_is_refused(tmp_path):
    make_store(tmp_path / "store", cases=6, slices=4, size=32)
    methods = {"none": [], "focused": METHODS["focused"]}
    study = study_of(tmp_path / "store", tmp_path, methods=methods, equal_rates=0.95)
    with pytest.raises(MedsegError) as error:
        with_equal_rates(expand(study), 0.95, tmp_path / "equal_rates.json")
    said = str(error.value)
    assert "equal_rates 0.95: blobs unet focused seed0: focused_dropout drops 0." in said
    assert "Lower equal_rates" in said
    assert not (tmp_path / "equal_rates.json").exists()


def test_a_study_asks_for_them_before_anything_runs(tmp_path, monkeypatch):
    make_store(tmp_path / "store", cases=6, slices=4, size=32)
    methods = {"none": [], "focused": METHODS["focused"]}
    study = study_of(tmp_path / "store", tmp_path, methods=methods, equal_rates=0.1)
    seen = []
    monkeypatch.setattr(study_main, "run_cells", lambda study, cells, *_: seen.extend(cells) or [])
    monkeypatch.setattr(study_main, "write_results", lambda *_: "")
    monkeypatch.setattr(study_main, "report", lambda *_: None)
    study_main.run(study, expand(study))
    assert rates(seen)["focused"][0] > 0.11
    assert (study.directory / "equal_rates.json").exists()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_a_rate_is_found_for_shares_that_rise_with_it(share):
    p, found = match(lambda p: 0.9 * p**2, share)
    assert found == 0.9 * p**2 == pytest.approx(share, rel=0.05)


def test_a_rate_that_jumps_over_the_share_is_an_error():
    with pytest.raises(ValueError, match=r"drops 0\.500 at p = .* nothing nearer was found"):
        match(lambda p: 0.5 if p > 0.3 else 0.0, 0.2)
