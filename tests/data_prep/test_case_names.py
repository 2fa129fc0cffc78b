"""Names of cases become names of files, so they hold nothing that a path could misread."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_prep.convert import convert
from data_prep.nifti import main
from medseg_reg.data.store import Description, SliceStore
from medseg_reg.data.store_writer import CaseArrays, CaseSource
from medseg_reg.data.verify import verify
from medseg_reg.errors import MedsegError


class TestEveryConverter:
    def convert(self, folder: Path, *names: str) -> None:
        files = (folder / "a.nii.gz",)
        arrays = CaseArrays(np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8))
        convert(
            [CaseSource(name, name, files) for name in names],
            lambda _: arrays,
            Description(
                name="d", source="s", licence="l", citation="c", modality="m", unit="u",
                classes=("background", "organ"),
            ),
            argparse.Namespace(out=folder / "store", workers=1, skip=["left out"]),
            {},
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["a b", "../../x", "", ".a", "_a", "a\n", "\u00e9", "a" * 201])
    def test_one_that_a_store_must_not_hold_is_told_before_the_work(self, tmp_path, name) -> None:
        (tmp_path / "a.nii.gz").touch()
        with pytest.raises(MedsegError, match=r"a\.nii\.gz: .*named .*A-Z a-z 0-9") as error:
            self.convert(tmp_path, "left out", "fine", name)
        assert len(str(error.value).splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]

    def test_the_longest_one_is_taken(self, tmp_path) -> None:
        (tmp_path / "a.nii.gz").touch()
        self.convert(tmp_path, "left out", "a" * 200)
        assert list(SliceStore(tmp_path / "store").rows) == ["a" * 200]

    def test_two_alike_are_told_with_their_files(self, tmp_path) -> None:
        (tmp_path / "a.nii.gz").touch()
        with pytest.raises(MedsegError, match=r"a\.nii\.gz: .*the same case b as .*a\.nii\.gz"):
            self.convert(tmp_path, "left out", "b", "b")


class TestNifti:
    def command(self, folder: Path, *files: str) -> list[str]:
        for place in ("imagesTr", "labelsTr"):
            (folder / place).mkdir()
            for name in files:
                image = nibabel.Nifti1Image(np.ones((6, 5, 4), np.uint8), np.eye(4))
                nibabel.save(image, folder / place / name)
        return [
            "--source", str(folder), "--out", str(folder / "store"), "--classes", "organ",
            "--workers", "1",
        ]  # fmt: skip

    def test_other_letters_in_the_name_of_a_file_become_underscores(self, tmp_path) -> None:
        main(self.command(tmp_path, "patient 01.nii.gz", "-x (2).nii", "\u00e9.nii", "ok-1.nii"))
        store = SliceStore(tmp_path / "store")
        assert set(store.rows) == {"patient_01", "x_2", "case", "ok-1"}
        assert store.row("patient_01").sources == ("patient 01.nii.gz", "patient 01.nii.gz")
        assert verify(store) == []

    def test_files_that_would_make_one_case_are_told(self, tmp_path) -> None:
        command = self.command(tmp_path, "a b.nii", "a_b.nii")
        with pytest.raises(MedsegError, match=r"a_b\.nii: .*same case a_b as .*a b\.nii"):
            main(command)
        assert {path.name for path in tmp_path.iterdir()} == {"imagesTr", "labelsTr"}

    def test_a_name_given_for_a_series_is_no_path(
        self, phantom: Callable[..., Path], tmp_path: Path
    ) -> None:
        scan = next(phantom().rglob("PANCREAS_0001"))
        image = nibabel.Nifti1Image(np.zeros((48, 48, 12), np.uint8), np.eye(4))
        nibabel.save(image, tmp_path / "label.nii")
        before = set(tmp_path.rglob("*"))
        with pytest.raises(MedsegError, match=r"named '\.\./\.\./x'\. Expected"):
            main(
                ["--dicom", str(scan), "--label", str(tmp_path / "label.nii"), "--name", "../../x",
                 "--out", str(tmp_path / "a/b/store"), "--classes", "organ", "--workers", "1"]
            )  # fmt: skip
        assert set(tmp_path.rglob("*")) == before
