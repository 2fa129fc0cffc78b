"""The phantom is the same for everyone, and hard in the ways in which the original is."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest

import data_prep.phantom
from data_prep.phantom import LABEL_FOLDER, main, make_demo, make_phantom
from data_prep.phantom_anatomy import phantom_volume
from medseg_reg import train
from medseg_reg.config import PhantomSpec
from medseg_reg.data.store import SliceStore
from medseg_reg.data.verify import verify
from medseg_reg.errors import MedsegError

Phantom = Callable[..., Path]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestAnatomy:
    def test_equal_numbers_give_equal_volumes(self) -> None:
        for one, two in zip(phantom_volume(1, 2, 40, 9), phantom_volume(1, 2, 40, 9), strict=True):
            np.testing.assert_array_equal(one, two)

    @pytest.mark.parametrize("other", [(2, 2), (1, 3)], ids=["seed", "case"])
    def test_another_seed_or_case_is_another_patient(self, other) -> None:
        one, two = phantom_volume(1, 2, 40, 9), phantom_volume(*other, 40, 9)
        assert (one[0] != two[0]).mean() > 0.5
        assert (one[1] != two[1]).any()

    @pytest.mark.parametrize("case", range(5))
    def test_the_organ_is_tissue_amid_an_abdomen(self, case) -> None:
        image, mask = phantom_volume(0, case)
        assert (image.dtype, mask.dtype) == (np.int16, np.uint8)
        assert image.shape == mask.shape == (24, 96, 96)
        assert set(np.unique(mask)) == {0, 1}
        assert 60 < image[mask > 0].mean() < 140
        assert 0.003 < mask.mean() < 0.03
        assert image.min() == -1024
        assert image.max() > 300
        assert not mask[0].any()
        assert not mask[-1].any()


class TestFiles:
    def test_equal_arguments_give_equal_files(self, phantom: Phantom) -> None:
        one, two = content(phantom("one")), content(phantom("two"))
        assert one == two
        assert len(one) == 2 * 12 + 3  # slices; labels, licence, settings

    def test_the_order_of_names_alone_differs_when_shuffled(self, phantom: Phantom) -> None:
        plain, mixed = content(phantom("one")), content(phantom("two", shuffle=True))
        names = {name for name in plain if name.endswith(".dcm")}
        assert names == {name for name in mixed if name.endswith(".dcm")}
        assert {plain[name] for name in names} == {mixed[name] for name in names}
        assert sum(plain[name] == mixed[name] for name in names) < len(names) / 2

    @pytest.mark.parametrize(
        ("layout", "pattern"),
        [
            (
                "manifest",
                "manifest-1599750808610/Pancreas-CT/PANCREAS_0001/"
                "11-24-2015-PANCREAS0001-Pancreas-?????/Pancreas-?????/1-001.dcm",
            ),
            ("doi", "DOI/PANCREAS_0001/*/*/000000.dcm"),
            ("uuid", "pancreas_ct/PANCREAS_0001/*/*/????????-????-4???-????-????????????.dcm"),
        ],
    )
    def test_layouts_are_those_of_the_downloads(self, phantom: Phantom, layout, pattern) -> None:
        folder = phantom(layout=layout)
        assert list(folder.glob(pattern))
        assert len(list(folder.rglob("*.dcm"))) == 2 * 12

    def test_every_slice_has_valid_tags_of_its_own(self, phantom: Phantom) -> None:
        slices = [pydicom.dcmread(path) for path in phantom().rglob("PANCREAS_0001/**/*.dcm")]
        assert len({one.SOPInstanceUID for one in slices}) == 12
        assert len({one.SeriesInstanceUID for one in slices}) == 1
        assert sorted(one.InstanceNumber for one in slices) == list(range(1, 13))
        for one in slices:
            assert one.SOPInstanceUID.is_valid
            assert one.SOPInstanceUID == one.file_meta.MediaStorageSOPInstanceUID
            assert one.pixel_array.shape == (48, 48)
            assert one.pixel_array.min() == one.PixelPaddingValue == -2048
            for element in one.iterall():
                if element.keyword != "PixelData":
                    pydicom.dataelem.DataElement(
                        element.tag, element.VR, element.value, validation_mode=pydicom.config.RAISE
                    )

    def test_scans_differ_in_how_they_are_stored(self, phantom: Phantom) -> None:
        ways, source = set(), phantom(cases=4)
        for number in range(1, 5):
            one = [pydicom.dcmread(p) for p in source.rglob(f"PANCREAS_000{number}/**/*.dcm")]
            one.sort(key=lambda slice_: slice_.InstanceNumber)
            upwards = one[0].ImagePositionPatient[2] < one[1].ImagePositionPatient[2]
            ways.add((upwards, float(one[0].ImageOrientationPatient[4])))
        assert ways == {(True, 1), (True, -1), (False, 1), (False, -1)}

    def test_labels_are_packed_as_asked(self, phantom: Phantom) -> None:
        zipped, packed, plain = (phantom(how, labels=how) for how in ("zip", "gz", "nii"))
        with zipfile.ZipFile(zipped / f"{LABEL_FOLDER}.zip") as archive:
            assert archive.namelist() == [
                f"{LABEL_FOLDER}/label000{number}.nii.gz" for number in (1, 2)
            ]
        one = nibabel.load(packed / LABEL_FOLDER / "label0001.nii.gz")
        two = nibabel.load(plain / LABEL_FOLDER / "label0001.nii")
        np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(two.dataobj))
        assert one.shape == (48, 48, 12)

    @pytest.mark.parametrize(("duplicates", "files"), [("none", 0), ("empty", 0), ("full", 11)])
    def test_copies_of_scan_2_are_made_as_asked(self, phantom: Phantom, duplicates, files) -> None:
        source = phantom(duplicates=duplicates, labels="gz")
        folders = list(source.rglob("PANCREAS_0025"))
        assert len(folders) == (duplicates != "none")
        assert len(list(source.rglob("PANCREAS_0025/**/*.dcm"))) == files
        assert (source / LABEL_FOLDER / "label0025.nii.gz").exists() == (duplicates != "none")


class TestCommand:
    def test_a_second_run_keeps_what_is_there(self, tmp_path: Path) -> None:
        arguments = ["--out", str(tmp_path / "p"), "--cases", "1", "--size", "32", "--slices", "8"]
        main(arguments)
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "p").rglob("*")}
        main(arguments)
        assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "p").rglob("*")}
        with pytest.raises(MedsegError, match="holds something else than this phantom"):
            main([*arguments, "--seed", "1"])

    def test_a_folder_of_other_things_is_not_touched(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.txt").write_text("years")
        with pytest.raises(MedsegError, match="mine: holds something else"):
            make_phantom(tmp_path / "mine")
        assert content(tmp_path) == {"mine/thesis.txt": b"years"}

    @pytest.mark.parametrize("option", [{"cases": 0}, {"size": 31}, {"slices": 7}, {"size": 2000}])
    def test_numbers_out_of_range_are_refused(self, tmp_path: Path, option) -> None:
        with pytest.raises(MedsegError, match="expected at least 1 case"):
            make_phantom(tmp_path / "p", **option)
        assert list(tmp_path.iterdir()) == []

    def test_the_demo_is_a_store_made_by_the_real_converter(self, tmp_path: Path, capsys) -> None:
        told: list[str] = []
        path = make_demo(
            tmp_path / "demo/store", cases=2, size=48, slices=12, seed=3, tell=told.append
        )
        assert capsys.readouterr().out == ""
        assert [str(path) in text for text in told] == [True]
        store = SliceStore(path)
        image, mask = phantom_volume(3, 2, 48, 12)
        np.testing.assert_array_equal(store.image("pancreas_0002"), image)
        np.testing.assert_array_equal(store.mask("pancreas_0002"), mask)
        assert store.manifest.description.name == "Pancreas-CT phantom"
        assert store.manifest.settings["plane"] == "axial"
        assert verify(store) == []
        assert make_demo(path, cases=2, size=48, slices=12, seed=3) == path

    def test_a_demo_that_is_there_is_taken_at_once_without_its_source(
        self, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        numbers = {"cases": 2, "size": 48, "slices": 12, "seed": 3}
        path = make_demo(tmp_path / "demo/store", **numbers)
        shutil.rmtree(tmp_path / "demo/source")
        capsys.readouterr()
        monkeypatch.setattr(data_prep.phantom, "phantom_volume", None)
        assert make_demo(path, **numbers) == path
        assert capsys.readouterr().out == ""
        assert [p.name for p in (tmp_path / "demo").iterdir()] == ["store"]

    @pytest.mark.parametrize("change", [{"cases": 4}, {"size": 32}, {"slices": 8}, {"seed": 4}])
    def test_a_demo_of_other_numbers_is_refused(self, tmp_path: Path, change) -> None:
        numbers = {"cases": 3, "size": 40, "slices": 9, "seed": 3}
        ((key, value),) = change.items()
        make_demo(tmp_path / "demo/store", **numbers)
        before = content(tmp_path)
        told = f"{key}: {numbers[key]}, now {value}"
        with pytest.raises(MedsegError, match=rf"store: was made .*\({told}\)"):
            make_demo(tmp_path / "demo/store", **{**numbers, **change})
        assert content(tmp_path) == before
        shutil.rmtree(tmp_path / "demo/store")
        with pytest.raises(MedsegError, match=rf"source: holds .* \({told}\)"):
            make_demo(tmp_path / "demo/store", **{**numbers, **change})

    def test_training_refuses_a_store_that_is_not_its_phantom(self, tmp_path: Path) -> None:
        def spec(**numbers: int) -> Any:
            data = SimpleNamespace(store=tmp_path / "store", phantom=PhantomSpec(**numbers))
            return SimpleNamespace(data=data)

        train.make_phantom(spec(cases=3, size=64, slices=16))
        train.make_phantom(spec(cases=3, size=64, slices=16))
        with pytest.raises(MedsegError, match=r"^data\.phantom: .*size: 64, now 72") as error:
            train.make_phantom(spec(cases=3, size=72, slices=16))
        assert str(error.value).endswith("\nTo train on what is there, set data.phantom=null.")
