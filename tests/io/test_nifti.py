"""NIfTI: what is read equals nibabel and the file; what is wrong is told by the file's name."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg_reg.errors import MedsegError
from medseg_reg.io.geometry import geometry_of
from medseg_reg.io.nifti import is_nifti_name, read_nifti
from medseg_reg.io.nifti_writer import write_nifti
from medseg_reg.io.pixels import as_labels, narrowed

AFFINE = np.array([[0, -2.0, 0, 7], [1.5, 0, 0, -3], [0, 0, 3, 11], [0, 0, 0, 1]])
SHEARED = np.array([[1, 0.3, 0, 0], [0, 1.0, 0, 0], [0, 0.1, 2, 0], [0, 0, 0, 1.0]])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def numbers(dtype: str = "int16") -> np.ndarray:
    return np.arange(60).reshape(3, 4, 5).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_reads_array_type_and_affine_as_stored(tmp_path: Path, dtype: str, name: str) -> None:
    volume = read_nifti(save(tmp_path / name, numbers(dtype)))
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, numbers())
    np.testing.assert_array_equal(volume.affine, AFFINE)


def test_compression_is_known_by_the_content(tmp_path: Path) -> None:
    content = save(tmp_path / "a.nii", numbers()).read_bytes()
    (tmp_path / "b.nii").write_bytes(gzip.compress(content))
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii").array, numbers())
    np.testing.assert_array_equal(read_nifti("x", content=content).array, numbers())


def test_gzip_of_several_members_and_padding_is_read(tmp_path: Path) -> None:
    content = save(tmp_path / "a.nii", numbers()).read_bytes()
    packed = gzip.compress(content[:400]) + gzip.compress(content[400:]) + b"\0" * 512
    (tmp_path / "b.nii.gz").write_bytes(packed)
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii.gz").array, numbers())


def test_big_endian_and_nifti_2_are_read(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.save(nibabel.Nifti1Image(numbers(), AFFINE, header), tmp_path / "big.nii")
    nibabel.save(nibabel.Nifti2Image(numbers(), AFFINE), tmp_path / "two.nii.gz")
    for name in ("big.nii", "two.nii.gz"):
        volume = read_nifti(tmp_path / name)
        np.testing.assert_array_equal(volume.array, numbers())
        np.testing.assert_array_equal(volume.affine, AFFINE)


def test_scaling_is_applied_when_declared(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(numbers(), AFFINE)
    image.header.set_slope_inter(0.5, -10)
    content = bytearray(image.to_bytes())
    # nibabel rescales on writing; so the numbers are put into the header of unscaled bytes.
    content[112:120] = np.array([0.5, -10], "<f4").tobytes()
    content[352:] = numbers().tobytes(order="F")
    volume = read_nifti("scaled.nii", content=bytes(content))
    np.testing.assert_allclose(volume.array, numbers() * 0.5 - 10)


def test_a_sheared_affine_is_kept(tmp_path: Path) -> None:
    volume = read_nifti(save(tmp_path / "a.nii", numbers(), SHEARED))
    np.testing.assert_allclose(volume.affine, SHEARED, atol=1e-7)


def test_a_file_without_orientation_says_so(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(numbers(), AFFINE)
    image.set_sform(AFFINE, code=0)
    image.set_qform(AFFINE, code=0)
    nibabel.save(image, tmp_path / "a.nii")
    assert "orientation" in read_nifti(tmp_path / "a.nii").notes[0]


def test_channels_are_read_only_when_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.zeros((3, 4, 5, 2), np.int16))
    assert read_nifti(path, channels=True).array.shape == (3, 4, 5, 2)
    with pytest.raises(MedsegError, match=r"a\.nii\.gz.*\(3, 4, 5, 2\)"):
        read_nifti(path)


def test_a_fourth_axis_of_one_frame_is_dropped(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", numbers()[..., None])
    assert read_nifti(path).array.shape == (3, 4, 5)


@pytest.mark.parametrize("keep", [3, 200, 400, -30, -1])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, name: str, keep: int) -> None:
    noise = np.random.default_rng(0).integers(0, 2**15, (9, 8, 7)).astype(np.int16)
    path = save(tmp_path / name, noise)
    path.write_bytes(path.read_bytes()[:keep])
    if name.endswith(".gz") and keep == -1:
        return  # the last byte of the length field alone is not needed for the pixels
    with pytest.raises(MedsegError, match="a.nii"):
        read_nifti(path)


def test_the_truncated_real_mask_is_refused(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("mirp_sts001_ct_dicom_rtstruct") / "nifti/mask/mask.nii.gz"
    if path.stat().st_size != 2048:
        pytest.skip("the copy of the mask is whole")
    with pytest.raises(MedsegError, match="truncated: 814004 of 2360116"):
        read_nifti(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage" * 100, b"\x1f\x8b" + b"x" * 50, gzip.compress(b"y" * 999)],
    ids=["nothing", "text", "a broken gzip", "a gzip of text"],
)
def test_garbage_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.nii.gz"
    path.write_bytes(content)
    with pytest.raises(MedsegError, match=r"garbage\.nii\.gz"):
        read_nifti(path)


def test_a_flipped_bit_in_the_pixels_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).random((9, 8, 7)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(MedsegError, match=r"a\.nii\.gz"):
        read_nifti(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_affine_that_is_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    image = nibabel.Nifti1Image(numbers(), AFFINE)
    image.header["srow_x"][3] = bad
    content = bytearray(image.to_bytes())
    content[280:296] = np.array([1, 0, 0, bad], "<f4").tobytes()
    with pytest.raises(MedsegError, match="affine"):
        read_nifti(tmp_path / "a.nii", content=bytes(content))


def test_a_singular_affine_is_refused(tmp_path: Path) -> None:
    content = bytearray(nibabel.Nifti1Image(numbers(), AFFINE).to_bytes())
    content[280:296] = bytes(16)
    with pytest.raises(MedsegError, match="singular"):
        read_nifti(tmp_path / "a.nii", content=bytes(content))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_counted(tmp_path: Path, bad: float) -> None:
    array = numbers("float32")
    array[1, 2, 3:] = bad
    with pytest.raises(MedsegError, match=r"a\.nii: 2 of 60 pixels"):
        read_nifti(save(tmp_path / "a.nii", array))


def test_a_header_that_promises_too_much_is_refused_without_reserving_it(tmp_path: Path) -> None:
    content = bytearray(nibabel.Nifti1Image(numbers(), AFFINE).to_bytes())
    content[40:56] = np.array([3, 32000, 32000, 32000, 1, 1, 1, 1], "<i2").tobytes()
    with pytest.raises(MedsegError, match="damaged"):
        read_nifti(tmp_path / "a.nii", content=bytes(content))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 351), value=st.integers(0, 255), more=st.binary(max_size=8))
def test_no_header_raises_anything_but_our_error(place: int, value: int, more: bytes) -> None:
    content = bytearray(nibabel.Nifti1Image(numbers(), AFFINE).to_bytes())
    content[place] = value
    content[place : place + len(more)] = more
    try:
        read_nifti("fuzzed.nii", content=bytes(content))
    except MedsegError as error:
        assert "fuzzed.nii" in str(error)


@pytest.mark.parametrize("affine", [AFFINE, SHEARED])
def test_labels_come_back_on_their_source_grid(tmp_path: Path, affine: np.ndarray) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (3, 4, 5)).astype(np.uint8)
    geometry = geometry_of(affine, labels.shape)
    for name in ("l.nii", "l.nii.gz"):
        write_nifti(tmp_path / name, geometry.from_source(labels), geometry)
        read = nibabel.load(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(read.dataobj), labels)
        np.testing.assert_allclose(read.affine, affine, atol=1e-6)
    assert {p.name for p in tmp_path.iterdir()} == {"l.nii", "l.nii.gz"}


def test_equal_labels_give_equal_files(tmp_path: Path) -> None:
    labels = np.ones((3, 4, 5), np.uint8)
    geometry = geometry_of(AFFINE, labels.shape)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, geometry.from_source(labels), geometry)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_macos_twins_are_no_volumes() -> None:
    assert is_nifti_name("a.nii.gz")
    assert is_nifti_name("a.NII")
    assert not is_nifti_name("._a.nii.gz")
    assert not is_nifti_name("a.npy")


def test_pixels_are_stored_in_the_narrowest_exact_type() -> None:
    assert narrowed(np.array([0, 255], np.uint8)).dtype == np.uint8
    assert narrowed(np.array([-5.0, 9.0])).dtype == np.int16
    assert narrowed(np.array([0.0, 40000.0])).dtype == np.float32
    kept = np.array([0.1, 0.25], np.float32)
    assert narrowed(kept) is kept


@pytest.mark.parametrize("values", [[0.5], [-1.0], [256], [-1]])
def test_label_values_that_are_no_class_are_refused(values: list[float]) -> None:
    with pytest.raises(MedsegError, match="label"):
        as_labels("l.nii", np.array(values))
