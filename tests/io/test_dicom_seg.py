"""Labels of a DICOM series as DICOM SEG, read back by highdicom and by pydicom alone."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.pixels.utils import unpack_bits
from pydicom.sr.codedict import codes

from data_prep.phantom import make_phantom
from medseg_reg.errors import MedsegError
from medseg_reg.io.dicom import DicomVolume, list_files, read_series
from medseg_reg.io.dicom_seg import Algorithm, SegWriter
from medseg_reg.io.segment_codes import _LESIONS, _STRUCTURES, GENERIC, SegmentCode, segment_code
from tests.io.conftest import slice_dataset

MAKER = Algorithm("runs of\N{LATIN SMALL LETTER E WITH ACUTE}", "0123456789ab")
CLASSES = ("background", "pancreas", "kidney_left", "something else")
STUDY = {"StudyInstanceUID": "1.2.7", "SliceThickness": "2.5"}


def read_folder(folder: Path) -> DicomVolume:
    return read_series(list_files(folder), where=folder)


def write(volume: DicomVolume, labels: np.ndarray, path: Path, classes=CLASSES) -> list[str]:
    """Write labels (columns, rows, slices), as they lie on the source grid."""
    writer, notes = SegWriter.of(volume, classes, MAKER)
    writer.write(path, labels.transpose(2, 1, 0))
    return notes


def by_highdicom(path: Path, instances: list[str]) -> np.ndarray:
    """Return (columns, rows, slices) by the references to the instances of the source."""
    found = highdicom.seg.segread(path).get_pixels_by_source_instance(
        instances, combine_segments=True, assert_missing_frames_are_empty=True
    )
    return found.transpose(2, 1, 0)


def by_positions(path: Path, volume: DicomVolume) -> np.ndarray:
    """Return (columns, rows, slices) by the positions of the frames alone, with pydicom."""
    seg = pydicom.dcmread(path)
    labels = np.zeros(volume.array.shape, np.uint8)
    shape = (seg.NumberOfFrames, seg.Rows, seg.Columns)
    frames = unpack_bits(seg.PixelData)[: np.prod(shape)].reshape(shape)
    shared = seg.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    spacing = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)
    to_index = np.linalg.inv(volume.affine) @ np.diag([-1.0, -1, 1, 1])
    for item, frame in zip(seg.PerFrameFunctionalGroupsSequence, frames, strict=True):
        # Where all frames are of one segment, it stands in the shared part.
        group = item if "SegmentIdentificationSequence" in item else shared
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        corner = np.array(item.PlanePositionSequence[0].ImagePositionPatient, float)
        rows, columns = np.nonzero(frame)
        points = corner + (
            orientation[:3] * (columns * spacing[1])[:, None]
            + orientation[3:] * (rows * spacing[0])[:, None]
        )
        index = points @ to_index[:3, :3].T + to_index[:3, 3]
        assert len(index) == 0 or np.abs(index - index.round()).max() < 0.02
        assert not labels[tuple(index.round().astype(int).T)].any()
        labels[tuple(index.round().astype(int).T)] = number
    return labels


def instances_of(volume: DicomVolume) -> list[str]:
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in volume.files]
    return [str(one.SOPInstanceUID or one.file_meta.MediaStorageSOPInstanceUID) for one in headers]


def check_round_trip(volume: DicomVolume, labels: np.ndarray, path: Path) -> list[str]:
    notes = write(volume, labels, path)
    np.testing.assert_array_equal(by_highdicom(path, instances_of(volume)), labels)
    np.testing.assert_array_equal(by_positions(path, volume), labels)
    return notes


def scattered(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Labels without any symmetry, and slices without some of the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, shape, p=[0.9, 0.05, 0.03, 0.02]).astype(np.uint8)
    labels[:, :, : shape[2] // 4] = 0
    labels[..., shape[2] // 2] %= 2
    return labels


def turned(folder: Path, out: Path, how: str) -> Path:
    """Write the series of a folder with its slices turned, the anatomy where it was."""
    out.mkdir()
    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        dataset = pydicom.dcmread(path)
        pixels = dataset.pixel_array
        position = np.array(dataset.ImagePositionPatient, float)
        orientation = np.array(dataset.ImageOrientationPatient, float)
        along, down = orientation[:3], orientation[3:]
        spacing = np.array(dataset.PixelSpacing, float)
        rows, columns = pixels.shape
        if how == "rows reversed":
            pixels, position = pixels[::-1], position + down * spacing[0] * (rows - 1)
            down = -down
        elif how == "columns reversed":
            pixels, position = pixels[:, ::-1], position + along * spacing[1] * (columns - 1)
            along = -along
        elif how == "rows and columns exchanged":
            pixels, along, down, spacing = pixels.T, down, along, spacing[::-1]
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in position]
        dataset.ImageOrientationPatient = [*along, *down]
        dataset.PixelSpacing = [f"{v:.6f}" for v in spacing]
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.PixelData = np.ascontiguousarray(pixels).tobytes()
        dataset.save_as(out / f"{number}.dcm")
    return out


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of 32 rows and 24 columns, so that no two axes can be mistaken."""
    folder = tmp_path_factory.mktemp("phantom")
    make_phantom(folder / "all", cases=1, size=32, slices=10)
    source, out = next((folder / "all").rglob("1-001.dcm")).parent, folder / "series"
    out.mkdir()
    for path in source.glob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.PixelData = np.ascontiguousarray(dataset.pixel_array[:, 4:28]).tobytes()
        dataset.Columns = 24
        dataset.save_as(out / path.name)
    return out


ORIENTATIONS = ("as made", "rows reversed", "columns reversed", "rows and columns exchanged")


@pytest.mark.parametrize("how", ORIENTATIONS)
def test_labels_of_the_phantom_come_back_in_four_orientations(phantom, tmp_path, how):
    volume = read_folder(turned(phantom, tmp_path / "series", how))
    # From the pixels, so that what lies elsewhere than its slice is noticed.
    labels = np.digitize(volume.array, [-200, 40, 150]).astype(np.uint8)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert check_round_trip(volume, labels, tmp_path / "x.dcm") == []


def test_slices_in_any_plane_and_order_come_back(write_series, tmp_path):
    coronal = write_series(
        each=lambda i: {"ImagePositionPatient": [0, 20 - 2.5 * i, 0]},
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
        **STUDY,
    )
    volume = read_folder(coronal)
    assert volume.plane == "coronal"
    check_round_trip(volume, scattered(volume.array.shape), tmp_path / "x.dcm")


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [
        ("totalsegmentator_ct", "example_ct_dicom"),
        ("mirp_sts001_ct_dicom_rtstruct", "dicom/image"),
        ("msd_hippocampus", "dicom_Study1_13_HCropVolume"),
    ],
)
def test_labels_of_real_series_come_back(shared_data, tmp_path, dataset, folder):
    volume = read_folder(shared_data(dataset) / folder)
    notes = check_round_trip(volume, scattered(volume.array.shape), tmp_path / "x.dcm")
    # An anonymiser emptied these two.
    lacking = "no StudyInstanceUID and no SeriesInstanceUID"
    assert [lacking in note for note in notes] == [True] * (dataset == "totalsegmentator_ct")


def test_a_real_label_lies_where_its_nifti_lies(shared_data, tmp_path):
    root = shared_data("totalsegmentator_ct")
    volume = read_folder(root / "example_ct_dicom")
    truth = nibabel.load(root / "example_seg_dicom.nii.gz")
    # The rows of the label run against those of the series.
    labels = np.asarray(truth.dataobj).astype(np.uint8)[:, ::-1]
    liver = np.isin(labels, 5).astype(np.uint8)
    write(volume, liver, tmp_path / "x.dcm", ("background", "liver"))
    found = by_positions(tmp_path / "x.dcm", volume)
    assert found.sum() > 10_000
    assert abs(float(volume.array[found > 0].mean()) - 89) < 5
    centre = np.argwhere(found).mean(0)
    expected = np.argwhere(np.asarray(truth.dataobj) == 5).mean(0)
    np.testing.assert_allclose(
        volume.affine @ [*centre, 1], truth.affine @ [*expected, 1], atol=0.02
    )


def series(folder: Path, **tags: Any) -> DicomVolume:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        pixels = rng.integers(-500, 500, (6, 8)).astype(np.int16)
        dataset = slice_dataset(pixels, index, **{**STUDY, **tags})
        dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return read_folder(folder)


def test_patient_study_and_source_are_named(tmp_path):
    volume = series(tmp_path / "in", PatientID="P7", PatientName="Doe^Jane", StudyDate="20200102")
    write(volume, scattered(volume.array.shape), tmp_path / "x.dcm")
    seg, source = pydicom.dcmread(tmp_path / "x.dcm"), pydicom.dcmread(volume.files[2])
    for word in (
        "PatientID",
        "PatientName",
        "StudyInstanceUID",
        "StudyDate",
        "FrameOfReferenceUID",
    ):
        assert seg[word].value == source[word].value
    assert seg.SOPClassUID.name == "Segmentation Storage"
    assert (seg.Modality, seg.SegmentationType) == ("SEG", "BINARY")
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    referred = seg.ReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == source.SeriesInstanceUID
    known = {one.ReferencedSOPInstanceUID for one in referred.ReferencedInstanceSequence}
    assert known == set(instances_of(volume))
    assert seg.preamble == bytes(128)


def test_a_frame_refers_to_the_slice_it_lies_on(tmp_path):
    volume = series(tmp_path / "in")
    labels = np.zeros(volume.array.shape, np.uint8)
    labels[1:3, 2, 2] = 2
    write(volume, labels, tmp_path / "x.dcm")
    seg = pydicom.dcmread(tmp_path / "x.dcm")
    assert seg.NumberOfFrames == 1
    frame = seg.PerFrameFunctionalGroupsSequence[0]
    source = frame.DerivationImageSequence[0].SourceImageSequence[0]
    assert source.ReferencedSOPInstanceUID == instances_of(volume)[2]
    labels[4, 4, 3] = 1
    check_round_trip(volume, labels, tmp_path / "y.dcm")


def test_each_class_is_described(tmp_path):
    volume = series(tmp_path / "in")
    write(volume, scattered(volume.array.shape), tmp_path / "x.dcm")
    pancreas, kidney, other = pydicom.dcmread(tmp_path / "x.dcm").SegmentSequence
    assert [one.SegmentLabel for one in (pancreas, kidney, other)] == list(CLASSES[1:])
    found = [
        (
            one.SegmentedPropertyCategoryCodeSequence[0].CodeValue,
            one.SegmentedPropertyTypeCodeSequence[0].CodeValue,
            one.SegmentedPropertyTypeCodeSequence[0].CodeMeaning,
        )
        for one in (pancreas, kidney, other)
    ]
    # SNOMED CT, as in CID 7150 and CID 7166 of DICOM's part 16.
    assert found == [
        ("91723000", "15776009", "Pancreas"),
        ("91723000", "64033007", "Kidney"),
        ("85756007", "85756007", "Tissue"),
    ]
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
    assert (side[0].CodeValue, side[0].CodeMeaning) == ("7771000", "Left")
    assert pancreas.SegmentAlgorithmType == "AUTOMATIC"
    assert pancreas.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == MAKER.version


def test_labels_without_any_foreground_come_back(tmp_path):
    volume = series(tmp_path / "in")
    check_round_trip(volume, np.zeros(volume.array.shape, np.uint8), tmp_path / "x.dcm")


def test_every_object_is_a_new_one(tmp_path):
    volume = series(tmp_path / "in")
    for name in "ab":
        write(volume, scattered(volume.array.shape), tmp_path / f"{name}.dcm")
    one, two = (pydicom.dcmread(tmp_path / f"{name}.dcm").SOPInstanceUID for name in "ab")
    assert one != two


def test_long_names_are_cut(tmp_path):
    volume = series(tmp_path / "in")
    write(volume, scattered(volume.array.shape), tmp_path / "x.dcm", ("b", "a" * 99, "c", "d"))
    assert pydicom.dcmread(tmp_path / "x.dcm").SegmentSequence[0].SegmentLabel == "a" * 64


@pytest.mark.parametrize(
    "tags",
    [
        {"StudyID": "a study of seventeen"},
        {"PatientName": "one part"},
        {"AccessionNumber": "123456789012345678901"},
        {"SliceThickness": ""},
        {"StudyInstanceUID": ""},
        {"FrameOfReferenceUID": None},
        {"SeriesInstanceUID": ""},
        {"PatientBirthDate": "unknown"},
    ],
    ids=lambda tags: next(iter(tags)),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom, when the test writes such tags
def test_unusual_tags_of_the_source_do_no_harm(tmp_path, tags):
    volume = series(tmp_path / "in", **tags)
    notes = check_round_trip(volume, scattered(volume.array.shape), tmp_path / "x.dcm")
    noted = {"StudyInstanceUID", "FrameOfReferenceUID", "SeriesInstanceUID", "PatientBirthDate"}
    assert [word for word in tags if any(word in note for note in notes)] == [*noted & {*tags}]
    assert len(notes) == len(noted & {*tags})


def test_a_series_without_its_instances_is_refused(tmp_path):
    volume = series(tmp_path / "in")
    dataset = pydicom.dcmread(volume.files[1])
    del dataset.SOPInstanceUID
    del dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.save_as(volume.files[1], enforce_file_format=False)
    with pytest.raises(MedsegError, match=r"1\.dcm: has no SOPInstanceUID.*--format nifti"):
        SegWriter.of(volume, CLASSES, MAKER)


def test_what_highdicom_refuses_is_told_with_the_file(tmp_path, monkeypatch):
    volume = series(tmp_path / "in")

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(highdicom.seg, "Segmentation", refuse)
    with pytest.raises(MedsegError, match=r"0\.dcm: no DICOM SEG .*ValueError: no such thing"):
        SegWriter.of(volume, CLASSES, MAKER)


def test_without_highdicom_it_is_said_what_to_install(tmp_path, monkeypatch):
    volume = series(tmp_path / "in")
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "highdicom":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MedsegError, match=r"pip install 'medseg-reg\[dicom-seg\]'"):
        SegWriter.of(volume, CLASSES, MAKER)


NAMES: dict[str, SegmentCode] = {
    "Pancreas": SegmentCode("AnatomicalStructure", "Pancreas"),
    "left_kidney": SegmentCode("AnatomicalStructure", "Kidney", "Left"),
    "Kidney-R": GENERIC,
    "adrenal_gland_right": SegmentCode("AnatomicalStructure", "AdrenalGland", "Right"),
    "heart left ventricle": GENERIC,
    "left ventricle": SegmentCode("AnatomicalStructure", "LeftVentricle"),
    "lungs": SegmentCode("AnatomicalStructure", "Lung"),
    "Tumour": SegmentCode("MorphologicallyAbnormalStructure", "Neoplasm"),
    "GTV": SegmentCode("MorphologicallyAbnormalStructure", "Neoplasm"),
    "left": GENERIC,
    "": GENERIC,
    "vertebra_L1": GENERIC,
}


@pytest.mark.parametrize(("name", "code"), NAMES.items(), ids=NAMES)
def test_a_name_is_known_only_where_it_is_certain(name, code):
    assert segment_code(name) == code


def test_every_term_is_one_of_the_dictionary():
    kinds = [*_STRUCTURES.values(), *_LESIONS.values()]
    known: Callable[[str], Any] = lambda keyword: getattr(codes.SCT, keyword)  # noqa: E731
    assert all(known(kind).scheme_designator == "SCT" for kind in kinds)
    for keyword in (GENERIC.category, "AnatomicalStructure", "MorphologicallyAbnormalStructure"):
        assert keyword in codes.cid7150.dir()
