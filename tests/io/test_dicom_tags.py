"""A tag that is missing, malformed or not supported is an error that names file and tag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg_reg.errors import MedsegError
from medseg_reg.io.dicom import list_files, read_series
from medseg_reg.io.dicom_file import read_slice

Write = Callable[..., Path]
Patch = Callable[[Path, bytes, bytes], None]


def refused(folder: Path) -> str:
    """Return the message of the error, which must be short enough to be read."""
    with pytest.raises(MedsegError) as error:
        read_series(list_files(folder), where=folder)
    assert 1 <= len(str(error.value).splitlines()) <= 3
    return str(error.value)


DECIMALS = {
    "ImagePositionPatient": ("0020,0032", ["-10.00", "-20.00", "5.00"]),
    "ImageOrientationPatient": ("0020,0037", ["1.0000", "0.0000", "0.00", "0.00", "1.0", "0.0"]),
    "PixelSpacing": ("0028,0030", ["0.8000", "0.7000"]),
    "RescaleSlope": ("0028,1053", ["1.2500"]),
    "RescaleIntercept": ("0028,1052", ["-512.5"]),
}


class TestRefusedTags:
    @pytest.mark.parametrize("tag", DECIMALS)
    def test_a_decimal_is_missing(self, write_series: Write, tag) -> None:
        message = refused(write_series(each=lambda i: {tag: None} if i == 3 else {}))
        number, values = DECIMALS[tag]
        assert f"003.dcm: {tag} ({number}) is '', expected {len(values)} finite" in message

    @pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e999", "x", "1_0", ""])
    @pytest.mark.parametrize("tag", DECIMALS)
    def test_a_decimal_is_no_number(self, write_series: Write, patch: Patch, tag, bad) -> None:
        number, values = DECIMALS[tag]
        folder = write_series(each=lambda i: {tag: values} if i == 3 else {})
        before = "\\".join(values)
        after = "\\".join([bad.ljust(len(values[0])), *values[1:]])
        patch(folder / "003.dcm", before.encode(), after.encode())
        message = refused(folder)
        assert f"003.dcm: {tag} ({number}) is " in message
        assert f"expected {len(values)} finite number" in message

    @pytest.mark.parametrize(
        "tag",
        ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"],
    )
    def test_a_whole_number_is_missing(self, write_series: Write, tag) -> None:
        message = refused(write_series(each=lambda i: {tag: None} if i == 3 else {}))
        assert f"003.dcm: {tag} is missing" in message

    @pytest.mark.parametrize(
        ("tag", "value"),
        [
            ("BitsAllocated", 12), ("BitsStored", 0), ("BitsStored", 17), ("HighBit", 11),
            ("SamplesPerPixel", 3), ("NumberOfFrames", 2),
        ],
    )  # fmt: skip
    def test_pixels_of_an_unknown_layout(self, write_series: Write, tag, value) -> None:
        message = refused(write_series(**{tag: value}))
        assert "000.dcm" in message
        assert "is not supported" in message

    @pytest.mark.parametrize("tag", ["Rows", "Columns"])
    def test_an_image_without_pixels(self, write_series: Write, tag) -> None:
        assert f"0 {tag}" in refused(write_series(**{tag: 0}))

    def test_a_slope_of_zero(self, write_series: Write) -> None:
        assert "RescaleSlope is 0" in refused(write_series(RescaleSlope=0))

    def test_pixel_data_that_are_missing(self, write_series: Write) -> None:
        text = refused(write_series(each=lambda i: {"PixelData": None} if i == 2 else {}))
        assert "002.dcm: pixel data are truncated: 0 bytes, expected 240" in text

    def test_an_encoding_that_is_not_known(self, write_series: Write, patch: Patch) -> None:
        folder = write_series()
        for path in folder.iterdir():
            patch(path, b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.7\0")
        text = refused(folder)
        assert "1.2.840.10008.1.2.7" in text
        assert "000.dcm" in text

    @pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
    def test_no_byte_raises_anything_but_our_error(self, write_series: Write) -> None:
        whole = (write_series() / "000.dcm").read_bytes()

        @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
        @given(place=st.integers(132, len(whole) - 241), value=st.binary(min_size=1, max_size=4))
        def check(place: int, value: bytes) -> None:
            content = whole[:place] + value + whole[place + len(value) :]
            try:
                one = read_slice(Path("fuzzed.dcm"), content)
                if not isinstance(one, str):
                    one.values()
            except MedsegError as error:
                assert "fuzzed.dcm" in str(error)

        check()
