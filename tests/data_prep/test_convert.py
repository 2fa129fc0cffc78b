"""A conversion can be killed, resumed and repaired, and tells what stopped it."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from data_prep import pancreas_ct
from data_prep.convert import summary, with_background
from data_prep.nifti import main
from medseg_reg.data.store import SliceStore
from medseg_reg.data.verify import verify
from medseg_reg.errors import MedsegError, explain_os_error, run_main

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("a", "b", "c", "d")

# Runs a converter that kills itself as with `kill -9`, with half of an array written.
KILLED = """
import os, signal, sys
from data_prep.nifti import main
from medseg_reg.data import store_writer
whole, calls = store_writer._save, []
def save(path, array):
    calls.append(path)
    if len(calls) == int(sys.argv[1]):
        whole(path, array[: len(array) // 2])
        path.rename(path.with_suffix(".tmp" if sys.argv[2] == "tmp" else ".npy"))
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, array)
store_writer._save = save
main(sys.argv[3:])
"""


def add_case(root: Path, name: str, seed: int = 0, damaged: bool = False) -> None:
    rng = np.random.default_rng([seed, ord(name[0])])
    image = rng.integers(-200, 300, (8, 7, 6)).astype(np.int16)
    label = np.zeros(image.shape, np.uint8)
    label[2:5, 2:5, 1:4] = 7 if damaged else 1
    for folder, array in (("imagesTr", image), ("labelsTr", label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / folder / f"{name}.nii.gz")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in NAMES:
        add_case(tmp_path / "task", name)
    return tmp_path / "task"


def command(source: Path, out: Path, *more: str) -> list[str]:
    return [
        "--source", str(source), "--out", str(out), "--classes", "organ", "--workers", "1", *more
    ]  # fmt: skip


def convert(source: Path, *more: str, out: str = "store") -> SliceStore:
    main(command(source, source.parent / out, *more))
    return SliceStore(source.parent / out)


def content(store: SliceStore) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.path)): path.read_bytes()
        for path in store.path.rglob("*")
        if path.is_file()
    }


class TestResume:
    @pytest.mark.parametrize(("call", "left"), [("3", "tmp"), ("4", "npy")])
    def test_a_killed_conversion_goes_on_to_the_same_store(
        self, source: Path, capsys, call, left
    ) -> None:
        out = source.parent / "store"
        done = subprocess.run(
            [sys.executable, "-c", KILLED, call, left, *command(source, out)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
        assert [p.name for p in out.parent.glob(".store.partial/cases/*")] == ["a.json"]
        store = convert(source)
        assert "going on; 1 case is already there" in capsys.readouterr().out
        assert content(store) == content(convert(source, out="whole"))
        assert verify(store) == []
        assert not (source.parent / ".store.partial").exists()

    def interrupt(self, source: Path, name: str = "c") -> None:
        """Leave a partial store in which all cases but one are written."""
        add_case(source, name, damaged=True)
        with pytest.raises(MedsegError, match=f"case {name}: .*labels"):
            convert(source)
        assert not (source.parent / "store").exists()

    def test_one_bad_case_keeps_the_others_and_its_repair_is_enough(self, source, capsys) -> None:
        self.interrupt(source)
        kept = source.parent / ".store.partial/images/a.npy"
        inode = kept.stat().st_ino
        add_case(source, "c")
        store = convert(source)
        assert "going on; 3 cases are already there" in capsys.readouterr().out
        assert (store.path / "images/a.npy").stat().st_ino == inode
        assert content(store) == content(convert(source, out="whole"))

    def test_a_bad_case_can_be_skipped_afterwards(self, source: Path) -> None:
        self.interrupt(source)
        assert list(convert(source, "--skip", "c").rows) == ["a", "b", "d"]

    def test_a_written_case_that_is_skipped_later_leaves_nothing(self, source: Path) -> None:
        self.interrupt(source)
        store = convert(source, "--skip", "a", "c")
        assert list(store.rows) == ["b", "d"]
        assert {path.stem for path in store.path.rglob("*.npy")} == {"b", "d"}

    def test_a_source_that_changed_meanwhile_is_converted_again(self, source: Path) -> None:
        self.interrupt(source)
        image = nibabel.Nifti1Image(np.full((8, 7, 6), 5, np.int16), np.eye(4))
        nibabel.save(image, source / "imagesTr/a.nii.gz")
        add_case(source, "c")
        assert (convert(source).image("a") == 5).all()

    def test_a_repaired_source_of_the_same_size_is_converted_again(self, source: Path) -> None:
        path = source / "imagesTr/a.nii.gz"
        for step, value in enumerate((5, 6)):
            image = nibabel.Nifti1Image(np.full((8, 7, 6), value, np.int16), np.eye(4))
            # Stored without compression, so that both are of one size.
            path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=0))
            os.utime(path, ns=(10**18, 10**18 + step))
            if step == 0:
                size = path.stat().st_size
                self.interrupt(source)
        assert path.stat().st_size == size
        add_case(source, "c")
        assert (convert(source).image("a") == 6).all()

    def test_a_conversion_killed_while_it_flushes_goes_on(self, source, monkeypatch, capsys):
        flush = os.fsync

        def killed(handle: int) -> None:
            if os.readlink(f"/proc/self/fd/{handle}").endswith(".npy"):
                raise KeyboardInterrupt
            flush(handle)

        if not Path("/proc/self/fd").exists():
            pytest.skip("this system does not tell the names of open files")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", killed)
            with pytest.raises(KeyboardInterrupt):
                convert(source)
        convert(source)
        assert "going on; 4 cases are already there" in capsys.readouterr().out

    def test_rests_of_killed_writes_are_no_part_of_the_store(self, source: Path) -> None:
        self.interrupt(source)
        partial = source.parent / ".store.partial"
        for rest in ("images/a.tmp", "masks/c.tmp", ".manifest.x1y2.json", "images/old/a.npy"):
            (partial / rest).parent.mkdir(exist_ok=True)
            (partial / rest).write_text("half")
        store = convert(source, "--skip", "c")
        assert set(content(store)) == {
            "manifest.json", "overview.png",
            *(f"{folder}/{name}.npy" for folder in ("images", "masks") for name in "abd"),
        }  # fmt: skip

    def test_other_settings_do_not_go_on(self, source: Path) -> None:
        self.interrupt(source)
        with pytest.raises(MedsegError, match="plane: 'axial', now 'coronal'") as error:
            convert(source, "--plane", "coronal")
        assert ".store.partial: is left from a conversion" in str(error.value)
        assert len(str(error.value).splitlines()) <= 3


class TestFinished:
    def test_a_second_run_changes_nothing(self, source: Path, capsys) -> None:
        store = convert(source)
        before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
        capsys.readouterr()
        convert(source)
        told = capsys.readouterr().out
        assert "is already complete (4 cases); nothing to do" in told
        assert "sources have the same names and sizes" in told
        assert before == {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}

    @pytest.mark.parametrize(
        ("more", "told"),
        [
            (("--plane", "sagittal"), "plane: 'axial', now 'sagittal'"),
            (("--skip", "a"), r"skip: \[\], now \['a'\]"),
        ],
    )
    def test_other_settings_are_refused(self, source: Path, more, told) -> None:
        before = content(convert(source))
        with pytest.raises(MedsegError, match=told):
            convert(source, *more)
        assert content(SliceStore(source.parent / "store")) == before

    def test_times_of_the_sources_do_not_count(self, source: Path) -> None:
        before = content(convert(source))
        os.utime(source / "imagesTr/a.nii.gz", ns=(0, 0))
        assert content(convert(source)) == before

    def test_other_sources_are_refused(self, source: Path) -> None:
        convert(source)
        add_case(source, "e")
        with pytest.raises(MedsegError, match="other settings or sources.*delete it first"):
            convert(source)

    def test_a_folder_that_is_no_store_is_not_touched(self, source: Path) -> None:
        (source.parent / "store").mkdir()
        (source.parent / "store/thesis.txt").write_text("years")
        with pytest.raises(MedsegError, match="is not a slice store.*nothing was touched"):
            convert(source)
        assert [p.name for p in (source.parent / "store").iterdir()] == ["thesis.txt"]

    def test_an_empty_folder_is_taken(self, source: Path) -> None:
        (source.parent / "store").mkdir()
        assert len(convert(source).rows) == 4

    def test_worker_processes_give_the_same_store(self, source: Path) -> None:
        one = convert(source)
        assert content(convert(source, "--workers", "2", out="two")) == content(one)


class TestFailures:
    def test_the_first_is_told_in_full_and_the_others_by_name(self, source: Path) -> None:
        for name in "bcd":
            add_case(source, name, damaged=True)
        with pytest.raises(MedsegError) as error:
            convert(source)
        first, last = str(error.value).splitlines()
        assert first.startswith("case b: the mask holds the labels [0, 7]")
        assert last == "Not converted either: c, d. 1 case is kept; repair, then run again."

    def test_nothing_is_left_when_no_case_was_converted(self, source: Path) -> None:
        for name in NAMES:
            add_case(source, name, damaged=True)
        with pytest.raises(MedsegError, match="Not converted either: b, c, d.$"):
            convert(source)
        assert {path.name for path in source.parent.iterdir()} == {"task"}

    def test_worker_processes_tell_the_same(self, source: Path) -> None:
        add_case(source, "c", damaged=True)
        with pytest.raises(MedsegError, match=r"^case c: .*\n3 cases are kept; repair"):
            convert(source, "--workers", "2")

    def test_skipping_all_is_refused(self, source: Path) -> None:
        with pytest.raises(MedsegError, match="nothing to convert"):
            convert(source, "--skip", *NAMES)


class TestDisk:
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
    def test_a_full_disk_ends_the_command_with_its_reason(
        self, source: Path, monkeypatch, capsys
    ) -> None:
        add_case(source, "b")
        big = nibabel.Nifti1Image(np.ones((64, 64, 64), np.int16), np.eye(4))
        for folder in ("imagesTr", "labelsTr"):
            nibabel.save(big, source / folder / "b.nii.gz")
        images = source.parent / ".store.partial/images"
        images.mkdir(parents=True)
        (images / "b.tmp").symlink_to("/dev/full")
        monkeypatch.setattr(sys, "argv", ["x", *command(source, source.parent / "store")])
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        assert stop.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(errors) == 1
        assert "b.npy: no space is left on this disk. Free some" in errors[0]
        assert sorted(path.name for path in images.iterdir()) == ["a.npy"]
        assert len(convert(source).rows) == 4

    def test_a_disk_that_is_full_from_the_start_is_left_as_it_was(
        self, source: Path, monkeypatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space") as error:
                convert(source)
        assert "no space is left on this disk" in explain_os_error(error.value)
        assert {path.name for path in source.parent.iterdir()} == {"task"}
        assert len(convert(source).rows) == 4

    def test_a_read_only_folder_is_told_before_the_work(self, source: Path, monkeypatch) -> None:
        def denied(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(tempfile, "TemporaryFile", denied)
        with pytest.raises(MedsegError, match=r"cannot be written to \(Permission denied\)"):
            convert(source)
        assert {path.name for path in source.parent.iterdir()} == {"task"}

    def free(self, monkeypatch, size: int) -> None:
        usage = shutil.disk_usage("/")._replace(free=size)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def test_too_little_space_for_the_sources_is_told_at_once(self, source, monkeypatch) -> None:
        self.free(monkeypatch, 100)
        with pytest.raises(MedsegError, match=r"MB are needed and 0\.0 MB are free"):
            convert(source)
        assert {path.name for path in source.parent.iterdir()} == {"task"}

    def test_sources_that_grow_are_judged_by_the_first_case(self, source, monkeypatch) -> None:
        for name in NAMES:
            for folder in ("imagesTr", "labelsTr"):
                path = source / folder / f"{name}.nii.gz"
                image = nibabel.Nifti1Image(np.ones((64, 64, 64), np.uint8), np.eye(4))
                path.write_bytes(gzip.compress(image.to_bytes()))
        # The sources are a few kB, each case is half a MB: three more do not fit.
        self.free(monkeypatch, 1_000_000)
        with pytest.raises(MedsegError, match="are needed"):
            convert(source)
        assert [p.name for p in source.parent.glob(".store.partial/cases/*")] == ["a.json"]
        self.free(monkeypatch, 10_000_000)
        assert len(convert(source).rows) == 4


class TestSummary:
    def test_a_note_of_many_cases_is_printed_once(self, phantom: Callable[..., Path]) -> None:
        source = phantom(cases=5)
        pancreas_ct.main(
            ["--images", str(source), "--labels", str(source), "--out",
             str(source.parent / "store"), "--workers", "1"]
        )  # fmt: skip
        lines = summary(SliceStore(source.parent / "store")).splitlines()
        notes = [line for line in lines if line.startswith("note on")]
        assert len(notes) == len({line.split("  ")[-1] for line in notes}) < 5
        assert any(line.startswith("note on 2 cases") for line in notes)

    def test_it_shows_counts_classes_and_channels(self, source: Path) -> None:
        text = summary(convert(source))
        for line in (
            "cases        4 of 4 patients or videos",
            "slices       24, 12 with foreground (50%)",
            "slice sizes  7x8",
            "classes      0 background, 1 organ",
            "pixels       int16, as stored, 1 channel",
        ):
            assert line in text.splitlines()

    def test_it_shows_several_channels(self, tmp_path: Path) -> None:
        source = tmp_path / "task"
        add_case(source, "a")
        for index in range(3):
            shutil.copyfile(source / "imagesTr/a.nii.gz", source / f"imagesTr/a_000{index}.nii.gz")
        (source / "imagesTr/a.nii.gz").unlink()
        assert "int16, as stored, 3 channels" in summary(convert(source))


def test_the_background_is_named_once() -> None:
    assert with_background(["Background", "organ"]) == ("Background", "organ")
    assert with_background(["organ"]) == ("background", "organ")
