"""Every way to lay a label onto a scan is told apart, and doubt is an error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_prep.orientation import Candidate, prove_orientation, rank_orientations
from data_prep.phantom_anatomy import phantom_volume
from medseg_reg.errors import MedsegError

WAYS = [
    (turned, flips)
    for turned in (True, False)
    for flips in itertools.product((False, True), repeat=3)
]
SPACING = (10.0, 8.0, 8.0)


@pytest.fixture(scope="module")
def scan() -> tuple[np.ndarray, np.ndarray]:
    return phantom_volume(seed=3, case=1, size=48, slices=12)


def label_of(mask: np.ndarray, transposed: bool, flips: tuple[bool, ...]) -> np.ndarray:
    """Undo `Candidate.lay`: the label (A, B, S) that a candidate lays onto the mask."""
    turned = mask[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    return turned.transpose(2, 1, 0) if transposed else turned.transpose(1, 2, 0)


@pytest.mark.parametrize(("transposed", "flips"), WAYS)
def test_every_way_is_found_and_undone(scan, transposed, flips) -> None:
    image, mask = scan
    found = prove_orientation("one", image, label_of(mask, transposed, flips), SPACING)
    assert (found.transposed, found.flips) == (transposed, flips)
    np.testing.assert_array_equal(found.lay(label_of(mask, transposed, flips)), mask)


@pytest.mark.parametrize("case", range(2, 12))
def test_the_lead_is_clear_for_every_phantom(case) -> None:
    image, mask = phantom_volume(seed=3, case=case, size=48, slices=12)
    best, second, *_ = rank_orientations("one", image, mask.transpose(2, 1, 0), SPACING)
    assert (best.transposed, best.flips) == (True, (False, False, False))
    assert best.score - second.score > 0.15


def test_a_shape_that_is_not_square_rules_out_half_of_the_ways(scan) -> None:
    image, mask = scan
    ranked = rank_orientations("one", image[:, :40], mask[:, :40].transpose(2, 1, 0), SPACING)
    assert len(ranked) == 8
    assert all(one.transposed for one in ranked)
    assert ranked[0].flips == (False, False, False)


def test_the_rank_does_not_depend_on_the_number_of_labels(scan) -> None:
    image, mask = scan
    one = rank_orientations("one", image, mask.transpose(2, 1, 0), SPACING)
    two = rank_orientations("one", image, mask.transpose(2, 1, 0) * 2, SPACING)
    assert one == two


def test_a_higher_margin_asks_for_more_proof(scan) -> None:
    image, mask = scan
    with pytest.raises(MedsegError, match="a lead of 9.00 is needed"):
        prove_orientation("one", image, mask.transpose(2, 1, 0), SPACING, margin=9)


def test_a_symmetric_scan_proves_nothing() -> None:
    image = np.full((8, 20, 20), -1000, np.int16)
    image[2:6, 5:15, 5:15] = 60
    label = (image > 0).astype(np.uint8).transpose(2, 1, 0)
    with pytest.raises(MedsegError, match="case one: the label's orientation cannot be proved"):
        prove_orientation("one", image, label, SPACING)


@pytest.mark.parametrize("count", [0, 1, 49])
def test_a_label_that_is_too_small_proves_nothing(count) -> None:
    label = np.zeros((20, 20, 8), np.uint8)
    label.ravel()[:count] = 1
    with pytest.raises(MedsegError, match=f"case one: the label marks {count} voxels, too few"):
        prove_orientation("one", np.zeros((8, 20, 20), np.int16), label, SPACING)


@pytest.mark.parametrize("shape", [(20, 20, 7), (20, 21, 8), (8, 20, 20), (20, 20)])
def test_another_shape_names_both(shape) -> None:
    with pytest.raises(MedsegError, match="case one: the label has .* voxels, the scan 20 columns"):
        prove_orientation("one", np.zeros((8, 20, 20), np.int16), np.ones(shape, np.uint8))


def test_a_candidate_says_its_way_in_words() -> None:
    assert Candidate(True, (False, True, True)).way == "label transposed, flipped rows and columns"
    assert Candidate(False, (False,) * 3).way == "label not transposed, flipped nothing"
