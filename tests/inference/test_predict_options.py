"""The options of the command: windows, flips, several runs, MC dropout, maps, formats."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.ensemble import Way, load_runs
from medseg_reg.inference.inputs import find_inputs
from medseg_reg.predict import main as predict
from tests.inference.made_runs import FIXED, NOISY, make_run
from tests.io.conftest import slice_dataset
from tests.stores import make_store

HU = {"data__image": {"window": [-150, 250], "size": [24, 20], "fit": "crop"}}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two runs on HU, and a volume (26, 36, 11) of them whose axes point left, head, front."""
    folder = tmp_path_factory.mktemp("volumes")
    store = make_store(
        folder / "store", cases=6, slices=2, size=(32, 40), dtype="int16",
        classes=("background", "pancreas", "spleen left/part"),
    )  # fmt: skip
    runs = [make_run(folder / f"run{seed}", store, seed, **HU, **NOISY) for seed in (0, 1)]
    rng = np.random.default_rng(0)
    values = rng.integers(-200, 300, (26, 36, 11)).astype(np.int16)
    matrix = np.array([[-1.5, 0, 0, 20], [0, 0, 2, -9], [0, 1, 0, 5], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(values, matrix), folder / "scan.nii.gz")
    return runs[0], runs[1], folder / "scan.nii.gz"


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SliceStore]:
    folder = tmp_path_factory.mktemp("frames")
    store = make_store(folder / "store", cases=6, slices=3, size=(32, 40))
    return make_run(folder / "run", store, **NOISY), store


def run_predict(run: Path | list[Path], source: Path, output: Path, *options: object) -> None:
    runs = run if isinstance(run, list) else [run]
    paths = ["--run", *runs, "--input", source, "--output", output, "--device", "cpu", *options]
    predict([str(one) for one in paths])


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_maps_lie_beside_the_labels_on_the_grid_of_the_source(volumes, tmp_path, capsys):
    run, _, scan = volumes
    options = ["--mc-dropout", 4, "--probabilities", "--seed", 3]
    run_predict(run, scan, tmp_path / "out" / "labels.nii.gz", *options)
    names = [
        "labels.nii.gz",
        "labels_entropy.nii",
        "labels_mutual_information.nii",
        "labels_probability_1_pancreas.nii",
        "labels_probability_2_spleen_left_part.nii",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    source = nibabel.load(scan)
    images = {name: nibabel.load(tmp_path / "out" / name) for name in names}
    for name, image in images.items():
        assert image.shape == source.shape
        np.testing.assert_allclose(image.affine, source.affine, atol=1e-5)
        assert image.get_data_dtype() == (np.uint8 if name == names[0] else np.float32)
    labels, entropy, mutual, first, second = (np.asarray(i.dataobj) for i in images.values())
    # The crop leaves the outermost rows and columns to nobody.
    seen = np.isfinite(entropy)
    assert 0 < seen.mean() < 1
    probabilities = np.stack([1 - first - second, first, second])
    np.testing.assert_array_equal(labels[seen], probabilities.argmax(0)[seen])
    assert (mutual[seen] <= entropy[seen] + 1e-6).all()
    assert mutual[seen].max() > 1e-3
    printed = capsys.readouterr().out
    assert "beside them: entropy, mutual_information, probability_1_pancreas" in printed


def test_the_maps_are_those_of_the_networks_in_the_order_of_the_source(volumes, tmp_path):
    first, second, scan = volumes
    output = tmp_path / "labels.nii"
    run_predict([first, second], scan, output, "--uncertainty", "--flips")
    way = Way(flips=("horizontal", "vertical"), device=torch.device("cpu"))
    loaded = load_runs([RunDirectory(first), RunDirectory(second)], way)
    images = find_inputs(scan, tmp_path / "other", loaded.facts)[0].read().images
    names = ("entropy", "mutual_information")
    parts = list(loaded.ensemble.parts(images, "scan", names))
    # Columns run to the patient's left, rows to the back, slices to the head.
    for name in names:
        expected = np.concatenate([part.maps[name] for part in parts])
        found = np.asarray(nibabel.load(tmp_path / f"labels_{name}.nii").dataobj)
        np.testing.assert_array_equal(found.transpose(1, 2, 0)[:, ::-1], expected)


def test_equal_seeds_give_equal_files(volumes, tmp_path):
    run, _, scan = volumes
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_predict(run, scan, tmp_path / name / "x.nii.gz", "--mc-dropout", 3, "--seed", seed)
    for file in ("x.nii.gz", "x_entropy.nii", "x_mutual_information.nii"):
        contents = [(tmp_path / name / file).read_bytes() for name in "abc"]
        assert contents[0] == contents[1]
        assert contents[0] != contents[2] or file == "x.nii.gz"


def test_windows_see_what_the_crop_leaves_out(volumes, tmp_path):
    run, _, scan = volumes
    run_predict(run, scan, tmp_path / "x.nii.gz", "--window", "--overlap", 0.25, "--uncertainty")
    assert np.isfinite(np.asarray(nibabel.load(tmp_path / "x_entropy.nii").dataobj)).all()


def test_frames_get_an_archive_of_maps_and_a_picture_of_the_entropy(frames, tmp_path):
    run, store = frames
    (tmp_path / "in").mkdir()
    for number, frame in enumerate(store.image("case_00")):
        Image.fromarray(frame).save(tmp_path / "in" / f"f{number}.png")
    options = ["--mc-dropout", 4, "--probabilities"]
    run_predict(run, tmp_path / "in", tmp_path / "out", *options)
    assert files_of(tmp_path / "out") == [
        *(f"entropy/f{n}.png" for n in range(3)),
        *(f"f{n}{end}" for n in range(3) for end in (".png", "_maps.npz")),
    ]
    with np.load(tmp_path / "out" / "f1_maps.npz", allow_pickle=False) as maps:
        assert sorted(maps) == ["entropy", "mutual_information", "probability_1_class_1"]
        assert {maps[name].dtype for name in maps} == {np.dtype(np.float32)}
        entropy, p = maps["entropy"], maps["probability_1_class_1"]
    labels = np.asarray(Image.open(tmp_path / "out" / "f1.png"))
    np.testing.assert_array_equal(labels, p > 0.5)
    shown = np.asarray(Image.open(tmp_path / "out" / "entropy" / "f1.png"))
    np.testing.assert_allclose(shown, entropy / np.log(2) * 255, atol=0.6)


def test_a_store_of_frames_gets_them_too(frames, tmp_path):
    run, store = frames
    run_predict(run, store.path, tmp_path / "out", "--uncertainty")
    assert files_of(tmp_path / "out/case_02") == [
        *(f"000{n}{end}" for n in range(3) for end in (".png", "_maps.npz")),
        *(f"entropy/000{n}.png" for n in range(3)),
    ]
    with np.load(tmp_path / "out/case_02/0001_maps.npz") as maps:
        assert list(maps) == ["entropy"]


def test_without_draws_or_maps_labels_alone_are_written(frames, tmp_path):
    run, store = frames
    run_predict(run, store.path, tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").rglob("*.*")} == {".png"}


def test_nothing_is_left_of_a_volume_that_fails(volumes, tmp_path, monkeypatch):
    run, _, scan = volumes
    calls = []

    def stop(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return torch.rand(8, 3, 24, 20).softmax(1)

    monkeypatch.setattr("medseg_reg.inference.passes.Passes.probabilities", stop)
    with pytest.raises(KeyboardInterrupt):
        run_predict(run, scan, tmp_path / "out/x.nii.gz", "--mc-dropout", 4, "--probabilities")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_fixed_regularizer_is_refused_before_anything_is_read(frames, tmp_path):
    run = make_run(tmp_path / "run", frames[1], **FIXED)
    with pytest.raises(MedsegError, match="`selection: sampled`"):
        run_predict(run, frames[1].path, tmp_path / "out", "--mc-dropout", 5)
    assert not (tmp_path / "out").exists()


NUMBERS = {
    "--mc-dropout=1": "expected at least 2",
    "--mc-dropout=-2": "expected at least 2",
    "--batch-size=0": "expected at least 1",
    "--seed=-1 --mc-dropout=2": "expected a number from 0",
    "--overlap=1 --window=8": "expected a share",
}


@pytest.mark.parametrize(("option", "message"), NUMBERS.items(), ids=NUMBERS)
def test_numbers_out_of_range_are_refused(frames, tmp_path, option, message):
    options = option.split()
    with pytest.raises(MedsegError, match=rf"{options[0].replace('=', ' ')}: {message}"):
        run_predict(frames[0], frames[1].path, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_maps_are_never_written_over_an_input(volumes, tmp_path):
    run, _, scan = volumes
    source = tmp_path / "x_entropy.nii"
    source.write_bytes(scan.read_bytes())
    before = source.read_bytes()
    with pytest.raises(MedsegError, match="Choose another --output"):
        run_predict(run, source, tmp_path / "x.nii.gz", "--uncertainty")
    assert source.read_bytes() == before


FORMATS = {
    "seg of a volume": ("scan.nii.gz", "out", ["--format", "seg"], "of a DICOM series"),
    "dcm of a volume": ("scan.nii.gz", "x.dcm", [], "is NIfTI. A DICOM SEG refers to"),
    "seg of pictures": ("frames", "out", ["--format", "seg"], "is pictures"),
    "nifti of pictures": ("frames", "out", ["--format", "nifti"], "pictures, which become PNG"),
    "two formats": ("scan.nii.gz", "x.dcm", ["--format", "nifti"], "Leave one of them out"),
    "the other two": ("scan.nii.gz", "x.nii", ["--format", "seg"], "Leave one of them out"),
}


@pytest.mark.parametrize(("source", "output", "options", "message"), FORMATS.values(), ids=FORMATS)
def test_a_format_that_does_not_fit_is_refused(volumes, tmp_path, source, output, options, message):
    run, _, scan = volumes
    (tmp_path / "scan.nii.gz").write_bytes(scan.read_bytes())
    (tmp_path / "frames").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "frames/a.png")
    with pytest.raises(MedsegError, match=message):
        run_predict(run, tmp_path / source, tmp_path / output, *options)


def test_a_series_among_several_is_named(volumes, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for index in range(6):
        pixels = rng.integers(-200, 200, (24, 32)).astype(np.int16)
        uid = "1.2.3" if index < 3 else "1.2.5"
        dataset = slice_dataset(pixels, index, SeriesInstanceUID=uid)
        dataset.save_as(tmp_path / "in" / f"{index}.dcm", enforce_file_format=True)
    output = tmp_path / "x.nii.gz"
    with pytest.raises(MedsegError, match=r"(?s)holds 2 series.*--series UID"):
        run_predict(volumes[0], tmp_path / "in", output)
    run_predict(volumes[0], tmp_path / "in", output, "--series", "1.2.5")
    assert nibabel.load(output).affine[2, 3] == pytest.approx(5 + 2.5 * 3)


def test_scaled_values_are_scaled_slice_by_slice(volumes, tmp_path):
    run, _, scan = volumes
    source = nibabel.load(scan)
    values = np.asarray(source.dataobj)
    stored = nibabel.Nifti1Image(((values + 1024) * 2).astype(np.uint16), source.affine)
    stored.header.set_slope_inter(0.5, -1024)
    nibabel.save(stored, tmp_path / "scaled.nii")
    run_predict(run, scan, tmp_path / "plain.nii", "--uncertainty")
    run_predict(run, tmp_path / "scaled.nii", tmp_path / "labels.nii", "--uncertainty")
    for plain, scaled in (("plain", "labels"), ("plain_entropy", "labels_entropy")):
        one, two = (nibabel.load(tmp_path / f"{name}.nii") for name in (plain, scaled))
        np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(two.dataobj))
