"""Labels come back on the grid of what was predicted."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_prep.nifti import main as convert_nifti
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.store import Description, SliceStore
from medseg_reg.data.store_writer import CaseArrays, CaseSource, StoreWriter
from medseg_reg.engine.run_directory import DataFacts
from medseg_reg.errors import MedsegError
from medseg_reg.inference.inputs import find_inputs
from medseg_reg.inference.predictor import Predictor
from medseg_reg.predict import main as predict
from medseg_reg.train import main as train_main
from tests.io.conftest import slice_dataset
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


def facts(**conversion: object) -> DataFacts:
    return DataFacts(
        name="x", classes=("background", "box"), channels=1, unit="gray value", modality="x",
        citation="", licence="", manifest_sha256="", conversion=conversion,
    )  # fmt: skip


def put(path: Path) -> Path:
    """Write a small picture or volume, whichever the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".nii" in path.name:
        nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 4), np.int16), np.eye(4)), path)
    else:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("files", "source", "output"),
    [
        (["d/a.png"], "d", "d"),
        (["d/a.jpg"], "d", "d"),
        (["d/a.nii.gz"], "d", "d"),
        (["d/a.nii.gz"], "d", "d/../d"),
        (["d/a.nii.gz"], "d", "link"),
        (["d/a.nii.gz"], "d/a.nii.gz", "d"),
        (["d/a.nii.gz"], "d/a.nii.gz", "d/a.nii.gz"),
        (["d/a.nii.gz"], "d", "d/a.nii.gz"),
        (["d/a.png"], "d/a.png", "d"),
    ],
)
def test_an_input_is_never_overwritten(picture_run, tmp_path, files, source, output):
    paths = [put(tmp_path / file) for file in files]
    (tmp_path / "link").symlink_to(tmp_path / "d")
    before = {path: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    arguments = ["--input", str(tmp_path / source), "--output", str(tmp_path / output)]
    with pytest.raises(MedsegError, match="Choose another --output") as error:
        predict(["--run", str(picture_run), *arguments])
    assert str(tmp_path / source) in str(error.value) or str(paths[0]) in str(error.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / "d").iterdir()}


def test_a_store_is_no_place_for_its_labels(picture_run):
    store = picture_run.parent / "store"
    with pytest.raises(MedsegError, match="Choose another --output"):
        predict(["--run", str(picture_run), "--input", str(store), "--output", str(store)])


@pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("x.nii", "x.nii.gz")])
def test_two_inputs_of_one_target_are_both_named(picture_run, tmp_path, names):
    for name in names:
        put(tmp_path / "in" / name)
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    with pytest.raises(MedsegError, match="would both be written to") as error:
        predict(["--run", str(picture_run), *arguments])
    assert all(str(tmp_path / "in" / name) in str(error.value) for name in names)
    assert not (tmp_path / "out").exists()


def store_of_slices(path: Path, names: tuple[str, ...]) -> Path:
    about = Description(
        name="x", source="x", licence="x", citation="x", modality="x", unit="x",
        classes=("background", "box"),
    )  # fmt: skip
    writer = StoreWriter(path, about, {})
    writer.begin()
    image = np.random.default_rng(0).integers(0, 255, (len(names), 32, 32), np.uint8)
    arrays = CaseArrays(image, np.zeros(image.shape, np.uint8), slice_names=names)
    writer.write(CaseSource("one", "one", ()), arrays, "0" * 64)
    return writer.publish(["one"]).path


def test_slices_keep_their_whole_names(picture_run, tmp_path):
    names = ("left/0001", "right/0001", "f_1.5", "f_1.7", "a\\b")
    store = store_of_slices(tmp_path / "store", names)
    output = tmp_path / "out"
    predict(["--run", str(picture_run), "--input", str(store), "--output", str(output)])
    assert sorted(path.relative_to(output).as_posix() for path in output.rglob("*.png")) == [
        "one/a_b.png",
        "one/f_1.5.png",
        "one/f_1.7.png",
        "one/left_0001.png",
        "one/right_0001.png",
    ]


def test_slices_of_one_file_name_are_refused(picture_run, tmp_path):
    store = store_of_slices(tmp_path / "store", ("left/1", "left_1"))
    arguments = ["--input", str(store), "--output", str(tmp_path / "out")]
    with pytest.raises(MedsegError, match=r"case one: .*'left/1' and 'left_1'.*left_1\.png"):
        predict(["--run", str(picture_run), *arguments])
    assert not (tmp_path / "out").exists()


def stored_shape(source: Path, **conversion: object) -> tuple[int, ...]:
    of_ct = facts(**conversion).model_copy(update={"unit": "HU"})
    (one,) = find_inputs(source, source.parent / "out", of_ct)
    return one.read()[0].shape


@pytest.mark.parametrize(
    ("conversion", "shape"),
    [
        ({}, (6, 10, 12)),
        ({"plane": None}, (6, 10, 12)),
        ({"plane": "axial"}, (6, 10, 12)),
        ({"plane": "coronal"}, (10, 6, 12)),
        ({"plane": "sagittal"}, (12, 6, 10)),
    ],
)
def test_volumes_are_read_in_the_plane_of_the_training(tmp_path, conversion, shape):
    array = np.arange(720, dtype=np.int16).reshape(12, 10, 6)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "scan.nii.gz")
    assert stored_shape(tmp_path / "scan.nii.gz", **conversion) == shape


@pytest.mark.parametrize(
    ("conversion", "shape"), [({}, (7, 9, 8)), ({"plane": "coronal"}, (9, 7, 8))]
)
def test_a_series_is_read_in_the_plane_of_the_training(tmp_path, conversion, shape):
    # A coronal series of 9 slices with 7 rows and 8 columns.
    pixels = np.arange(504, dtype=np.int16).reshape(9, 7, 8)
    for index, one in enumerate(pixels):
        dataset = slice_dataset(
            one,
            index,
            ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
            ImagePositionPatient=[0, 2.5 * index, 0],
        )
        (tmp_path / "series").mkdir(exist_ok=True)
        dataset.save_as(tmp_path / "series" / f"{index}.dcm", enforce_file_format=True)
    assert stored_shape(tmp_path / "series", **conversion) == shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("filters", [{}, {"erosion": 3}], ids=["plain", "eroded"])
def test_pixels_that_are_no_numbers_are_refused(tmp_path, value, filters):
    pixels = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    pixels[3, 4] = value
    np.save(tmp_path / "frame.npy", pixels)
    (one,) = find_inputs(tmp_path / "frame.npy", tmp_path / "out", facts(**filters))
    predictor = Predictor(nn.Conv2d(1, 2, 1), ImageSpec(window=(0, 1)), 1, device="cpu")
    with pytest.raises(MedsegError, match=r"frame\.npy.*1 of 64 pixels.*NaN or infinite"):
        predictor.labels(one.read()[0], one.name)


@pytest.mark.parametrize("limits", [{"window": (0, 1)}, {"percentiles": (1, 99)}])
def test_a_volume_with_nan_is_refused(limits):
    images = np.zeros((5, 8, 8), np.float32)
    images[4, 0, 0] = np.nan
    predictor = Predictor(nn.Conv2d(1, 2, 1), ImageSpec(**limits), 1, device="cpu")
    with pytest.raises(MedsegError, match="scan: .*slice 4"):
        predictor.labels(images, "scan")
    with pytest.raises(MedsegError, match="scan: .*NaN"):
        predictor.labels_of_slice(images, 4, "scan")


def test_percentiles_of_nan_are_refused_for_every_slice():
    images = np.zeros((5, 8, 8), np.float32)
    images[4, 0, 0] = np.nan
    predictor = Predictor(nn.Conv2d(1, 2, 1), ImageSpec(percentiles=(1, 99)), 1, device="cpu")
    with pytest.raises(MedsegError, match="scan: .*NaN"):
        predictor.labels_of_slice(images, 0, "scan")


def test_inference_mode_does_not_leak_between_batches():
    predictor = Predictor(nn.Conv2d(1, 2, 1), ImageSpec(), 1, batch_size=1, device="cpu")
    for _, scores in predictor.batches(np.zeros((2, 8, 8), np.uint8), "scan"):
        assert not torch.is_inference_mode_enabled()
        assert not scores.requires_grad


def test_pixels_of_another_unit_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", cases=1, slices=2, size=32)
    facts = facts_of(store, unit="HU")
    with pytest.raises(MedsegError, match="the run was trained on 'HU'"):
        find_inputs(store.path, tmp_path / "out", facts)


def test_masks_beside_their_images_are_not_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for name in ("0", "0_seg", "1", "1_seg", "b_seg"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(frames / f"{name}.png")
    store = make_store(tmp_path / "store", cases=1, slices=2, size=32)
    inputs = find_inputs(frames, tmp_path / "out", facts_of(store))
    assert [one.name for one in inputs] == ["0.png", "1.png", "b_seg.png"]
    assert "2 masks" in capsys.readouterr().out


def facts_of(store: SliceStore, **changes: object) -> DataFacts:
    return DataFacts.of(store, 1).model_copy(update=changes)
