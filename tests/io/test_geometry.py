"""Stored order of volumes: only axes are exchanged and flipped, and there is a way back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg_reg.io.geometry import geometry_of, nearest_plane

SHAPE = (3, 4, 5)
# RAS direction in which index 0, 1, 2 of the stored array must grow.
STORED = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
OPPOSITE = dict(zip("RASLPI", "LPIRAS", strict=True))


def affine_of(code: str) -> np.ndarray:
    """An affine whose axes grow towards the letters of a code such as LPS."""
    affine = np.eye(4)
    for axis, letter in enumerate(code):
        world = "RAS".find(letter)
        affine[:3, axis] = 0
        sign = 1 if world >= 0 else -1
        affine["RAS".index(letter if world >= 0 else OPPOSITE[letter]), axis] = sign * (axis + 1)
    return affine


ALL_CODES = [
    "".join(OPPOSITE[letter] if flip else letter for letter, flip in zip(order, flips, strict=True))
    for order in itertools.permutations("RAS")
    for flips in itertools.product((False, True), repeat=3)
]


@pytest.mark.parametrize("plane", STORED)
@pytest.mark.parametrize("code", ALL_CODES)
def test_every_orientation_is_stored_as_the_plane_says(code: str, plane: str) -> None:
    affine = affine_of(code)
    geometry = geometry_of(affine, SHAPE, plane)
    for axis, letter in enumerate(STORED[plane]):
        grown = code[geometry.axes[axis]]
        assert (OPPOSITE[grown] if geometry.flips[axis] else grown) == letter
        assert geometry.spacing[axis] == geometry.axes[axis] + 1


@pytest.mark.parametrize("code", ALL_CODES)
def test_the_way_back_is_exact(code: str) -> None:
    volume = np.random.default_rng(0).integers(0, 99, SHAPE)
    geometry = geometry_of(affine_of(code), SHAPE)
    np.testing.assert_array_equal(geometry.to_source(geometry.from_source(volume)), volume)


def test_oblique_axes_go_to_the_nearest_world_axis() -> None:
    turn = np.deg2rad(30)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    geometry = geometry_of(affine, SHAPE)
    assert geometry.axes == (2, 1, 0)
    assert geometry.spacing == (1, 1, 1)


def test_nearest_plane_names_how_slices_were_taken() -> None:
    affine = affine_of("LPS")
    assert [nearest_plane(affine, axis) for axis in range(3)] == ["sagittal", "coronal", "axial"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    affine = np.eye(4)
    affine[0, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        geometry_of(affine, SHAPE)


def test_axes_that_point_the_same_way_are_refused() -> None:
    affine = np.eye(4)
    affine[:3, 1] = affine[:3, 0]
    with pytest.raises(ValueError, match="same way"):
        geometry_of(affine, SHAPE)


def test_a_volume_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="source grid"):
        geometry_of(np.eye(4), SHAPE).from_source(np.zeros((1, 2, 3)))
