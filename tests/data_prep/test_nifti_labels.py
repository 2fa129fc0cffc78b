"""Choosing labels of a map with many classes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_prep.nifti import main
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    image = rng.integers(-50, 50, (8, 9, 4)).astype(np.int16)
    label = rng.integers(0, 118, image.shape).astype(np.uint8)
    for part, array in (("imagesTr", image), ("labelsTr", label)):
        (tmp_path / "source" / part).mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "source" / part / "a.nii.gz")
    return tmp_path / "source"


def test_chosen_labels_are_numbered_in_order_and_the_others_are_background(source, tmp_path):
    out = tmp_path / "store"
    main(
        [
            "--source",
            str(source),
            "--out",
            str(out),
            "--workers",
            "1",
            "--classes",
            "pancreas",
            "liver",
            "--labels",
            "7",
            "5",
        ]
    )
    store = SliceStore(out)
    assert store.classes == ("background", "pancreas", "liver")
    label = np.asarray(nibabel.load(source / "labelsTr" / "a.nii.gz").dataobj)
    truth = (label == 7) * 1 + (label == 5) * 2
    mask = store.row("a").geometry.to_source(np.asarray(store.mask("a")))
    assert (mask == truth).all()


@pytest.mark.parametrize("labels", [["7"], ["7", "7"], ["0", "5"], ["7", "300"]])
def test_labels_that_do_not_fit_the_classes_are_refused(source, tmp_path, labels):
    with pytest.raises(MedsegError, match="--labels .* a value from 1 to 255 for each"):
        main(
            [
                "--source",
                str(source),
                "--out",
                str(tmp_path / "s"),
                "--classes",
                "a",
                "b",
                "--labels",
                *labels,
            ]
        )
    assert not (tmp_path / "s").exists()


def test_an_ignored_label_is_kept_beside_the_chosen_ones(source, tmp_path):
    out = tmp_path / "store"
    common = ["--source", str(source), "--workers", "1", "--classes", "pancreas", "--labels", "7"]
    main([*common, "--out", str(out), "--ignore-label", "100"])
    store = SliceStore(out)
    assert (store.classes, store.ignore_label) == (("background", "pancreas"), 100)
    assert store.manifest.settings["ignore_label"] == 100
    label = np.asarray(nibabel.load(source / "labelsTr" / "a.nii.gz").dataobj)
    mask = store.row("a").geometry.to_source(np.asarray(store.mask("a")))
    assert (mask == np.where(label == 100, 100, label == 7)).all()
    for value, message in (("7", "is also in --labels"), ("1", "is the class 'pancreas'")):
        with pytest.raises(MedsegError, match=f"--ignore-label {value}.*{message}"):
            main([*common, "--out", str(tmp_path / "other"), "--ignore-label", value])


def test_the_ignored_label_of_an_nnunet_file_is_kept(source, tmp_path):
    labels = {"background": 0, **{f"organ_{i}": i for i in range(1, 117)}, "ignore": 117}
    about = {"channel_names": {"0": "CT"}, "labels": labels}
    (source / "dataset.json").write_text(json.dumps(about))
    main(["--source", str(source), "--out", str(tmp_path / "s"), "--workers", "1"])
    store = SliceStore(tmp_path / "s")
    assert len(store.classes) == store.ignore_label == 117
    assert "ignore" not in store.classes
    assert np.array(store.mask("a")).max() == 117


def test_without_dataset_json_the_names_are_asked_for(source, tmp_path):
    with pytest.raises(MedsegError, match=r"dataset\.json: is not there\. Name the labels"):
        main(["--source", str(source), "--out", str(tmp_path / "s")])


def test_the_liver_of_a_real_scan_is_chosen_by_its_value(tmp_path, shared_data):
    folder = shared_data("totalsegmentator_ct")
    main(
        [
            "--source",
            str(folder / "example_ct_dicom"),
            "--out",
            str(tmp_path / "s"),
            "--label",
            str(folder / "example_seg_dicom.nii.gz"),
            "--classes",
            "liver",
            "--labels",
            "5",
        ]
    )
    store = SliceStore(tmp_path / "s")
    (case,) = store.rows
    inside = store.image(case)[store.mask(case) == 1]
    assert inside.mean() == pytest.approx(89, abs=2)
    assert inside.std() == pytest.approx(22, abs=2)
