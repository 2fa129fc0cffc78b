"""Volumes written plane by plane are the same as those written at once."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg_reg.errors import MedsegError
from medseg_reg.io import nifti_writer
from medseg_reg.io.geometry import Geometry, geometry_of
from medseg_reg.io.nifti import open_nifti, read_nifti
from medseg_reg.io.nifti_writer import map_on_disk, write_nifti

SHEARED = np.array([[1.0, 0.3, 0, 5], [0, 1, 0, 6], [0, 0, 2, 7], [0, 0, 0, 1]])


def grid(orientation: str) -> Geometry:
    """The grid of 5 x 7 x 9 voxels whose axes point as named."""
    codes = nibabel.orientations.axcodes2ornt(tuple(orientation))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, ((world, sign), spacing) in enumerate(zip(codes, (1.5, 1.0, 3.0), strict=True)):
        affine[int(world), axis] = sign * spacing
    affine[:3, 3] = (-11, 7, 30)
    return geometry_of(affine, (5, 7, 9))


def stored(geometry: Geometry, dtype: type) -> np.ndarray:
    """Different values, in the stored order of a grid."""
    values = np.arange(5 * 7 * 9).reshape(5, 7, 9).astype(dtype)
    return geometry.from_source(values)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAL", "sheared"])
def test_the_bytes_are_those_of_nibabel(tmp_path, orientation):
    sheared = geometry_of(SHEARED, (5, 7, 9))
    geometry = sheared if orientation == "sheared" else grid(orientation)
    labels = stored(geometry, np.uint8)
    write_nifti(tmp_path / "a.nii", labels, geometry)
    affine = np.array(geometry.source_affine)
    image = nibabel.Nifti1Image(np.ascontiguousarray(geometry.to_source(labels)), affine)
    image.header.set_xyzt_units("mm")
    if geometry is not sheared:
        image.set_qform(affine, code="aligned")
    assert (tmp_path / "a.nii").read_bytes() == image.to_bytes()


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PIR", "SAL"])
def test_a_map_is_filled_some_slices_at_a_time(tmp_path, monkeypatch, orientation):
    geometry = grid(orientation)
    values = stored(geometry, np.float32) / 7
    values[0, 0, 0] = np.nan
    monkeypatch.setattr(nifti_writer, "TURNED_BYTES", 700)  # a few planes at a time
    with map_on_disk(tmp_path / "a.nii", geometry) as write:
        for start in range(0, len(values), 2):
            write(start, values[start : start + 2])
        assert not (tmp_path / "a.nii").exists()
    image = nibabel.load(tmp_path / "a.nii")
    np.testing.assert_array_equal(geometry.from_source(np.asarray(image.dataobj)), values)
    np.testing.assert_allclose(image.affine, geometry.source_affine)
    assert image.get_data_dtype() == np.float32


@pytest.mark.parametrize("orientation", ["RAS", "PIR"])
def test_a_map_that_is_not_finished_is_not_there(tmp_path, orientation):
    geometry = grid(orientation)
    try:
        with map_on_disk(tmp_path / "a.nii", geometry) as write:
            write(0, stored(geometry, np.float32)[:2])
            raise RuntimeError("stop")
    except RuntimeError as error:
        assert str(error) == "stop"
    assert list(tmp_path.iterdir()) == []


def test_a_map_is_not_compressed(tmp_path):
    with (
        pytest.raises(ValueError, match=r"ends in \.nii"),
        map_on_disk(tmp_path / "a.nii.gz", grid("RAS")),
    ):
        pass


@pytest.mark.parametrize(("orientation", "times"), [("RAS", 1), ("PIR", 2)])
def test_a_full_disk_is_told_before_the_prediction(tmp_path, monkeypatch, orientation, times):
    asked = []
    monkeypatch.setattr(nifti_writer, "require_space", lambda folder, size: asked.append(size))
    with map_on_disk(tmp_path / "a.nii", grid(orientation)) as write:
        write(0, stored(grid(orientation), np.float32))
    assert asked == [4 * 5 * 7 * 9 * times + 352]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_an_opened_volume_is_as_stored(tmp_path: Path, name: str) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(0.5, -10)
    nibabel.save(image, tmp_path / name)
    volume, whole = open_nifti(tmp_path / name), read_nifti(tmp_path / name)
    assert volume.array.dtype == np.int16
    slope, intercept = volume.scaling
    assert (slope, intercept) == (0.5, -10)
    np.testing.assert_allclose(volume.array * slope + intercept, whole.array)
    assert whole.scaling == (1, 0)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"")
    with pytest.raises(MedsegError, match=r"a\.nii: is not a NIfTI"):
        open_nifti(tmp_path / "a.nii")
