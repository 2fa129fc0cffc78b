"""Inputs and outputs that would be nonsense, refused by name."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg_reg.engine.run_directory import DataFacts
from medseg_reg.errors import MedsegError
from medseg_reg.inference.inputs import Wanted, find_inputs
from medseg_reg.predict import main as predict
from tests.io.test_dicom_seg import phantom
from tests.stores import make_store

__all__ = ["phantom"]  # the fixture


@pytest.fixture
def ct(tmp_path: Path) -> DataFacts:
    return DataFacts.of(make_store(tmp_path / "store", dtype="int16", slices=1), 1)


def test_the_name_of_a_picture_is_no_name_for_labels_of_a_volume(tmp_path, ct):
    source = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 2), np.int16), np.eye(4)), source)
    with pytest.raises(MedsegError, match=r"labels\.png: is the name of a picture.*\.nii\.gz"):
        find_inputs(source, tmp_path / "labels.png", ct)
    assert len(find_inputs(source, tmp_path / "labels", ct)) == 1


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_gray_values_are_refused_where_hu_were_trained_on(tmp_path, ct, suffix):
    source = tmp_path / f"frame{suffix}"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(source)
    with pytest.raises(MedsegError, match="holds gray values, the run was trained on 'HU'"):
        find_inputs(source, tmp_path / "labels", ct)


def test_a_ct_series_is_refused_where_gray_values_were_trained_on(tmp_path, phantom):
    gray = DataFacts.of(make_store(tmp_path / "store", slices=1), 1)
    (one,) = find_inputs(phantom, tmp_path / "labels", gray)
    with pytest.raises(MedsegError, match="holds pixels in 'HU', the run was trained on 'gray"):
        one.read()


def test_a_series_is_refused_where_there_is_none(tmp_path, ct):
    source = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 2), np.int16), np.eye(4)), source)
    with pytest.raises(MedsegError, match=r"--series 1\.2: .*scan\.nii\.gz is NIfTI"):
        find_inputs(source, Wanted(tmp_path / "labels", series="1.2"), ct)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overlap", "0.25"], "--overlap: has no effect without --window"),
        (["--seed", "3"], "--seed: has no effect without --mc-dropout"),
        (["--mc-dropout", "1"], "--mc-dropout 1: expected at least 2"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, options, message):
    with pytest.raises(MedsegError, match=message):
        predict(["--run", "x", "--input", "y", "--output", str(tmp_path / "z"), *options])
