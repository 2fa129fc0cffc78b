"""Labels come back on the grid of what was predicted."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from data_prep.nifti import main as convert_nifti
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.predict import main as predict
from medseg_reg.train import main as train_main
from tests.stores import make_store
from tests.training import tiny_config, write_config

LEARNING = {
    "training__epochs": 12,
    "training__precision": "32",
    "regularization__architecture": [],
    "schedule": {"name": "constant"},
    "optimizer": {"lr": 0.01},
}


def train(folder: Path, store: Path, **changes: object) -> Path:
    content = tiny_config(store, folder / "run", **LEARNING, **changes)
    train_main(["--config", str(write_config(folder / "c.yaml", content))])
    return folder / "run"


def volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A box (X, Y, Z) in noise that has no symmetry, and its label."""
    rng = np.random.default_rng(seed)
    label = np.zeros((28, 24, 6), np.uint8)
    x, y = rng.integers(4, 12, 2)
    label[x : x + 9, y : y + 6, 1:5] = 1
    return (label * 100 + rng.normal(0, 8, label.shape)).astype(np.int16), label


def affine(orientation: str) -> np.ndarray:
    """A matrix with spacing 1.5 x 1 x 3 mm whose axes point as named."""
    codes = nibabel.orientations.axcodes2ornt(tuple(orientation))
    matrix = np.zeros((4, 4))
    for axis, ((world, sign), spacing) in enumerate(zip(codes, (1.5, 1.0, 3.0), strict=True)):
        matrix[int(world), axis] = sign * spacing
    matrix[:3, 3] = (-11, 7, 30)
    matrix[3, 3] = 1
    return matrix


@pytest.fixture(scope="module")
def nifti_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nifti")
    for part in ("imagesTr", "labelsTr"):
        (folder / "source" / part).mkdir(parents=True)
    for seed in range(6):
        image, label = volume(seed)
        matrix = affine(("RAS", "LPS", "RAS", "LAS", "RPS", "RAS")[seed])
        for part, array in (("imagesTr", image), ("labelsTr", label)):
            nibabel.save(
                nibabel.Nifti1Image(array, matrix), folder / "source" / part / f"c{seed}.nii.gz"
            )
    arguments = ["--source", folder / "source", "--out", folder / "store", "--classes", "box"]
    convert_nifti([*map(str, arguments), "--workers", "1"])
    window = {"window": [-50, 150], "size": [32, 32], "fit": "crop"}
    return train(folder, folder / "store", data__image=window)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a * b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAL", "ILA"])
def test_a_nifti_volume_of_any_orientation_comes_back_on_its_grid(nifti_run, tmp_path, orientation):
    image, label = volume(99)
    # The same anatomy, with its axes exchanged and flipped in memory and in the header.
    canonical = nibabel.Nifti1Image(image, affine("RAS"))
    truth = nibabel.Nifti1Image(label, affine("RAS"))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine("RAS")), nibabel.orientations.axcodes2ornt(orientation)
    )
    turned, truth = canonical.as_reoriented(turn), truth.as_reoriented(turn)
    nibabel.save(turned, tmp_path / "scan.nii.gz")
    output = tmp_path / "labels.nii.gz"
    predict(
        ["--run", str(nifti_run), "--input", str(tmp_path / "scan.nii.gz"), "--output", str(output)]
    )
    result = nibabel.load(output)
    np.testing.assert_allclose(result.affine, turned.affine, atol=1e-4)
    assert result.shape == turned.shape
    assert overlap(np.asarray(result.dataobj), np.asarray(truth.dataobj)) > 0.85


def test_a_store_of_volumes_becomes_volumes_on_the_source_grid(nifti_run, tmp_path):
    store = nifti_run.parent / "store"
    predict(["--run", str(nifti_run), "--input", str(store), "--output", str(tmp_path / "out")])
    for seed in range(6):
        source = nibabel.load(nifti_run.parent / "source" / "labelsTr" / f"c{seed}.nii.gz")
        result = nibabel.load(tmp_path / "out" / f"c{seed}.nii.gz")
        np.testing.assert_allclose(result.affine, source.affine, atol=1e-4)
        assert overlap(np.asarray(result.dataobj), np.asarray(source.dataobj)) > 0.85


@pytest.fixture(scope="module")
def picture_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_store(folder / "store", cases=6, slices=6, size=(32, 40))
    return train(folder, folder / "store")


def test_pictures_become_pictures_of_the_same_size_and_name(picture_run, tmp_path):
    store = SliceStore(picture_run.parent / "store")
    (tmp_path / "in").mkdir()
    for number, frame in enumerate(store.image("case_00")):
        Image.fromarray(frame).save(tmp_path / "in" / f"f{number}.png")
    predict(
        [
            "--run",
            str(picture_run),
            "--input",
            str(tmp_path / "in"),
            "--output",
            str(tmp_path / "o"),
        ]
    )
    truth = np.asarray(store.mask("case_00"))
    found = np.stack([np.asarray(Image.open(tmp_path / "o" / f"f{n}.png")) for n in range(6)])
    assert found.shape == truth.shape
    assert overlap(found, truth) > 0.8


def test_a_store_of_pictures_becomes_one_folder_a_case(picture_run, tmp_path):
    store = picture_run.parent / "store"
    predict(["--run", str(picture_run), "--input", str(store), "--output", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"case_{i:02d}" for i in range(6)
    ]
    assert len(list((tmp_path / "out/case_03").glob("*.png"))) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "does not exist. Check --input"),
        ("notes.txt", "neither NIfTI nor a picture"),
        ("broken.nii.gz", "broken.nii.gz"),
        ("broken.png", "broken.png"),
        ("empty", "empty"),
    ],
)
def test_what_cannot_be_read_is_named(picture_run, tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8b123")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    with pytest.raises(MedsegError, match=message):
        predict(
            ["--run", str(picture_run), "--input", str(tmp_path / name), "--output", str(output)]
        )
    assert not output.exists() or not list(output.iterdir())


def test_a_dicom_series_comes_back_on_its_grid(tmp_path, shared_data):
    series = shared_data("totalsegmentator_ct") / "example_ct_dicom"
    label = shared_data("totalsegmentator_ct") / "example_seg_dicom.nii.gz"
    make_store(tmp_path / "store", cases=6, slices=2, size=32, dtype="int16")
    run = train(tmp_path, tmp_path / "store", data__image={"window": [-150, 250], "size": [64, 64]})
    output = tmp_path / "labels.nii.gz"
    predict(["--run", str(run), "--input", str(series), "--output", str(output)])
    result, truth = nibabel.load(output), nibabel.load(label)
    # The label runs its rows the other way, so the two grids cover the same corners.
    assert result.shape == truth.shape
    ends = [
        np.sort(np.stack([one.affine @ (0, 0, 0, 1), one.affine @ (511, 511, 19, 1)]), axis=0)
        for one in (result, truth)
    ]
    np.testing.assert_allclose(*ends, atol=0.02)
