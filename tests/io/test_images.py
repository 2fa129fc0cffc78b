"""Image files become arrays, or errors that name the file; nothing is guessed."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg_reg.errors import MedsegError
from medseg_reg.io import images
from medseg_reg.io.images import (
    image_shape,
    is_colour,
    luma,
    read_image,
    read_labels,
    resolve_color,
    write_mask_png,
)

LOSSLESS = ("png", "tif", "npy", "npz")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def save(path: Path, array: np.ndarray, key: str = "image") -> Path:
    """Write an array by whatever the ending asks for; 40 rows by 60 columns stay so."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, **{key: array})
    else:
        Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize("ending", [*LOSSLESS, "jpg"])
def test_a_picture_60_wide_and_40_high_is_40_rows_of_60(tmp_path, ending):
    image = np.zeros((40, 60), np.uint8)
    image[:10, :30] = 200
    path = save(tmp_path / f"a.{ending}", image)
    read = read_image(path)
    assert image_shape(path) == read.shape == (40, 60)
    assert read[5, 15] > 150
    assert read[5, 45] < 50
    assert read[30, 15] < 50


class TestColour:
    @pytest.mark.parametrize("ending", LOSSLESS)
    @pytest.mark.parametrize("color", ["gray", "rgb", "auto"])
    def test_gray_stored_as_colour_is_that_gray_exactly(self, tmp_path, rng, ending, color):
        gray = rng.integers(0, 256, (6, 7), np.uint8)
        path = save(tmp_path / f"a.{ending}", np.dstack([gray] * 3))
        assert not is_colour(path)
        expected = np.dstack([gray] * 3) if color == "rgb" else gray
        np.testing.assert_array_equal(read_image(path, color), expected)

    @pytest.mark.parametrize("ending", LOSSLESS)
    def test_colour_is_kept_or_weighed(self, tmp_path, rng, ending):
        rgb = rng.integers(0, 256, (6, 7, 3), np.uint8)
        path = save(tmp_path / f"a.{ending}", rgb)
        assert is_colour(path)
        np.testing.assert_array_equal(read_image(path, "rgb"), rgb)
        np.testing.assert_array_equal(read_image(path, "auto"), rgb)
        expected = rgb @ np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose(read_image(path, "gray"), expected, atol=0.51)

    def test_luma_of_other_types(self):
        rgb = np.array([[[1000, 0, 0], [0, 1000, 0], [0, 0, -1000]]])
        np.testing.assert_array_equal(luma(rgb.astype(np.int16)), [[299, 587, -114]])
        np.testing.assert_allclose(luma(rgb.astype(np.float32)), [[299, 587, -114]], rtol=1e-6)

    def test_gray_as_rgb_has_three_equal_channels(self, tmp_path, rng):
        gray = rng.integers(0, 256, (6, 7), np.uint8)
        read = read_image(save(tmp_path / "a.png", gray), "rgb")
        np.testing.assert_array_equal(read, np.dstack([gray] * 3))

    def test_one_coloured_image_settles_a_whole_set(self, tmp_path, rng):
        gray = save(tmp_path / "a.png", rng.integers(0, 256, (6, 7), np.uint8))
        colour = save(tmp_path / "b.png", rng.integers(0, 256, (6, 7, 3), np.uint8))
        assert resolve_color([gray, gray], "auto") == "gray"
        assert resolve_color([gray, colour], "auto") == "rgb"
        assert resolve_color([gray, colour], "gray") == "gray"

    def test_a_palette_is_resolved(self, tmp_path, rng):
        rgb = rng.choice([0, 255], (6, 7, 3)).astype(np.uint8)
        path = tmp_path / "a.png"
        Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(path)
        np.testing.assert_array_equal(read_image(path, "rgb"), rgb)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_opaque_alpha_is_dropped_and_transparency_refused(self, tmp_path, rng, mode):
        gray = rng.integers(0, 256, (6, 7), np.uint8)
        picture = Image.fromarray(gray).convert(mode)
        picture.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), gray)
        picture.putpixel((0, 0), (5, 5, 5, 254)[-len(mode) :])
        picture.save(tmp_path / "a.png")
        with pytest.raises(MedsegError, match=r"a\.png: has transparent pixels"):
            read_image(tmp_path / "a.png")

    def test_cmyk_is_refused(self, tmp_path):
        Image.new("CMYK", (7, 6)).save(tmp_path / "a.jpg")
        with pytest.raises(MedsegError, match=r"a\.jpg: is of the colour mode CMYK"):
            read_image(tmp_path / "a.jpg")


class TestDepth:
    @pytest.mark.parametrize("ending", LOSSLESS)
    def test_16_bits_become_int16_if_they_fit(self, tmp_path, ending):
        values = np.array([[0, 1, 255], [256, 4095, 32767]], np.uint16)
        read = read_image(save(tmp_path / f"a.{ending}", values))
        assert read.dtype == np.int16
        np.testing.assert_array_equal(read, values)

    @pytest.mark.parametrize("ending", LOSSLESS)
    def test_and_float32_if_they_do_not(self, tmp_path, ending):
        values = np.array([[0, 1, 255], [256, 4095, 65535]], np.uint16)
        read = read_image(save(tmp_path / f"a.{ending}", values))
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values)

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [("int16", "int16"), ("int64", "int16"), ("float64", "float32"), (">i2", "int16")],
    )
    def test_arrays_of_other_types(self, tmp_path, dtype, expected):
        values = np.array([[-1024, 0], [40, 1265]], dtype)
        read = read_image(save(tmp_path / "a.npz", values, "hu"))
        assert read.dtype == expected
        np.testing.assert_array_equal(read, values)

    def test_numbers_that_would_lose_digits_are_refused(self, tmp_path):
        with pytest.raises(MedsegError, match="fit neither int16 nor float32"):
            read_image(save(tmp_path / "a.npy", np.array([[0, 1 << 30]])))

    @pytest.mark.parametrize("ending", ["png", "tif"])
    @pytest.mark.parametrize("channels", [3, 4])
    def test_16_bits_in_colour_are_refused_not_cut(self, tmp_path, rng, ending, channels):
        path = tmp_path / f"a.{ending}"
        cv2.imwrite(str(path), rng.integers(0, 65536, (6, 7, channels), np.uint16))
        with pytest.raises(MedsegError, match=r"a\.\w+: (is RGB.* 16 bits|cannot be read)"):
            read_image(path)

    def test_one_bit_becomes_0_and_255(self, tmp_path):
        Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.eye(4) * 255)


class TestLabels:
    @pytest.mark.parametrize("ending", LOSSLESS)
    def test_values_come_as_they_stand(self, tmp_path, ending):
        values = np.array([[0, 128], [255, 7]], np.uint8)
        read = read_labels(save(tmp_path / f"a.{ending}", values, "mask"))
        np.testing.assert_array_equal(read, values)

    def test_bool_and_whole_floats_are_labels_others_are_not(self, tmp_path):
        eye = np.eye(3)
        for array in (eye.astype(bool), eye, eye.astype(np.int64)):
            read = read_labels(save(tmp_path / "a.npy", array))
            assert read.dtype.kind in "iu"
            np.testing.assert_array_equal(read, eye)
        with pytest.raises(MedsegError, match="whole numbers"):
            read_labels(save(tmp_path / "a.npy", eye / 2))

    def test_a_mask_of_equal_channels_is_one_and_a_coloured_one_is_not(self, tmp_path):
        rgb = np.zeros((3, 4, 3), np.uint8)
        rgb[0] = 255
        assert read_labels(save(tmp_path / "a.png", rgb)).shape == (3, 4)
        rgb[1, 0, 0] = 9
        with pytest.raises(MedsegError, match=r"a\.png: is a mask in colour"):
            read_labels(save(tmp_path / "a.png", rgb))

    @pytest.mark.parametrize(
        ("palette", "expected"),
        [([0, 0, 0, 128, 0, 0], [[0, 1]]), ([0, 0, 0, 255, 255, 255], [[0, 255]])],
    )
    def test_a_colour_palette_gives_indices_a_gray_one_its_grays(self, tmp_path, palette, expected):
        picture = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None)
        picture.putpalette(palette)
        picture.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), expected)

    def test_a_written_mask_comes_back(self, tmp_path):
        mask = np.arange(12).reshape(3, 4)
        write_mask_png(tmp_path / "a.png", mask)
        np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), mask)
        with pytest.raises(ValueError, match="0 to 255"):
            write_mask_png(tmp_path / "a.png", mask + 250)


class TestRefused:
    @pytest.mark.parametrize("ending", ["jpg", "tif", "png"])
    def test_an_exif_rotation(self, tmp_path, ending):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("L", (60, 40)).save(tmp_path / f"a.{ending}", exif=exif)
        for read in (read_image, read_labels, image_shape):
            with pytest.raises(MedsegError, match="EXIF orientation 6"):
                read(tmp_path / f"a.{ending}")
        exif[0x0112] = 1
        Image.new("L", (60, 40)).save(tmp_path / f"a.{ending}", exif=exif)
        assert read_image(tmp_path / f"a.{ending}").shape == (40, 60)

    def test_several_pages(self, tmp_path):
        page = Image.new("L", (6, 4))
        page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
        with pytest.raises(MedsegError, match=r"a\.tif: has 3 pages"):
            read_image(tmp_path / "a.tif")

    def test_a_decompression_bomb(self, tmp_path, monkeypatch):
        Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size < 100_000
        with pytest.raises(MedsegError, match="Cut it into tiles"):
            read_image(tmp_path / "a.png")
        Image.new("1", (9_500, 9_500)).save(tmp_path / "b.png")
        with pytest.raises(MedsegError, match="Cut it into tiles"):
            read_image(tmp_path / "b.png")
        monkeypatch.setattr(images, "MAX_BYTES", 1000)
        with pytest.raises(MedsegError, match="Cut it into tiles"):
            read_image(save(tmp_path / "a.npz", np.zeros((40, 60), np.uint8)))

    def test_an_array_that_promises_more_than_it_holds(self, tmp_path):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (30_000, 30_000)}
        )
        (tmp_path / "a.npy").write_bytes(header.getvalue())
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("image.npy", header.getvalue())
        for name in ("a.npy", "a.npz"):
            with pytest.raises(MedsegError, match=f"{name}: cannot be read"):
                read_image(tmp_path / name)

    @pytest.mark.parametrize("shape", [(5,), (3, 4, 5), (2, 3, 4, 3), (0, 4)])
    def test_arrays_of_other_shapes(self, tmp_path, shape):
        with pytest.raises(MedsegError, match="expected \\(rows, columns\\)"):
            read_image(save(tmp_path / "a.npy", np.zeros(shape)))

    @pytest.mark.parametrize("array", [np.array([[None]]), np.array([["x"]]), np.array([[1j]])])
    @pytest.mark.parametrize("ending", ["npy", "npz"])
    def test_arrays_of_no_numbers_pickles_among_them(self, tmp_path, array, ending):
        path = save(tmp_path / f"a.{ending}", array)
        with pytest.raises(MedsegError, match="not numbers"):
            read_image(path)

    def test_an_npz_without_the_key_lists_what_it_has(self, tmp_path):
        np.savez(tmp_path / "a.npz", scan=np.zeros((2, 2)), mask=np.zeros((2, 2)))
        with pytest.raises(MedsegError, match="holds scan, mask; expected one of image, img, hu"):
            read_image(tmp_path / "a.npz")

    @pytest.mark.parametrize("ending", ["png", "jpg", "tif", "npz", "npy"])
    def test_a_file_of_another_kind(self, tmp_path, ending):
        path = tmp_path / f"a.{ending}"
        for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"PK\x03\x04", b"II*\0"):
            path.write_bytes(content)
            for read in (read_image, read_labels, image_shape):
                with pytest.raises(MedsegError, match=f"a.{ending}: cannot be read"):
                    read(path)

    def test_a_missing_file_stays_an_error_of_the_system(self, tmp_path):
        for name in ("a.png", "a.npy", "a.npz"):
            with pytest.raises(FileNotFoundError):
                read_image(tmp_path / name)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "npy", "npz"])
def test_a_truncated_file_is_named(tmp_path, rng, ending):
    path = save(tmp_path / f"a.{ending}", rng.integers(0, 256, (40, 60), np.uint8))
    content = path.read_bytes()
    for share in (0.2, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(MedsegError, match=f"a.{ending}: cannot be read"):
            read_image(path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ending=st.sampled_from(["png", "jpg", "tif", "npy", "npz"]),
    places=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_damaged_bytes_give_an_array_or_our_error(tmp_path, ending, places):
    gray = np.random.default_rng(1).integers(0, 256, (12, 9), np.uint8)
    path = save(tmp_path / f"a.{ending}", gray)
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[int(place * len(content))] = value
    path.write_bytes(content)
    try:
        assert read_image(path).ndim == 2
    except MedsegError as error:
        told = str(error)
    else:
        told = path.name
    assert path.name in told
