"""Scans whose folders have no numbers are found by the headers of their files alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest

from data_prep import pancreas_ct
from data_prep.pancreas_ct import find_scans
from medseg_reg.errors import MedsegError

Phantom = Callable[..., Path]


@pytest.fixture
def flat(phantom: Phantom, tmp_path: Path) -> Path:
    """Scans 1 and 2, all files in one folder of no number, the labels among them."""
    source, folder = phantom(), tmp_path / "flat"
    folder.mkdir()
    for index, path in enumerate(sorted(source.rglob("*.*"))):
        if path.is_file():
            shutil.copyfile(path, folder / f"{index:04d}{path.suffix}")
    return folder


def edit(path: Path, **values: Any) -> None:
    dataset = pydicom.dcmread(path)
    for word, value in values.items():
        setattr(dataset, word, value)
    dataset.save_as(path)


def counts(folder: Path) -> dict[int, int]:
    return {number: len(files) for number, files in find_scans(folder).items()}


def test_no_file_of_a_sound_tree_is_read_whole(flat: Path, monkeypatch) -> None:
    def whole(path: Path, *_: Any) -> None:
        raise AssertionError(f"{path} was read whole")

    monkeypatch.setattr(pancreas_ct, "read_slice", whole)
    assert counts(flat) == {1: 12, 2: 12}


def test_localizers_and_other_objects_are_no_slices(flat: Path) -> None:
    one, other = sorted(flat.glob("*.dcm"))[:2]
    edit(one, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    edit(other, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", Modality="RTSTRUCT")
    assert counts(flat) == {1: 10, 2: 12}


def test_slices_without_the_mark_of_dicom_count(flat: Path) -> None:
    for path in flat.glob("*.dcm"):
        dataset = pydicom.dcmread(path)
        syntax = dataset.file_meta.TransferSyntaxUID
        del dataset.file_meta, dataset.preamble
        pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=syntax.is_little_endian)
    assert counts(flat) == {1: 12, 2: 12}


def test_a_patient_of_another_data_set_is_left_out(flat: Path) -> None:
    edit(min(flat.glob("*.dcm")), PatientID="someone")
    assert counts(flat) == {1: 11, 2: 12}


@pytest.mark.parametrize("size", [300, 600, 900])
def test_a_file_cut_off_in_its_header_is_told(flat: Path, size: int) -> None:
    path = min(flat.glob("*.dcm"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(MedsegError, match=path.name):
        find_scans(flat)
