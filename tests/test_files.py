"""A file is the old one or the new one, whatever goes wrong in between."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import pytest

from medseg_reg.errors import MedsegError
from medseg_reg.files import (
    read_json,
    replacing,
    require_space,
    require_writable,
    sha256_of,
    write_json,
    write_text,
)


def full(*_: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_halfway(path: Path, error: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_file_is_written_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text.txt"
    write_text(path, "Größe\n")
    assert path.read_bytes() == "Größe\n".encode()
    write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["text.txt"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "full")])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException, existing: bool
) -> None:
    path = tmp_path / "x.txt"
    if existing:
        path.write_text("old")
    with pytest.raises(type(error)):
        fail_halfway(path, error)
    assert os.listdir(tmp_path) == (["x.txt"] if existing else [])
    assert not existing or path.read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_the_old_file_is_there_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # a rename across disks is no single step
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_the_data_are_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: (steps.append(name), real(*a))[1]
        )
    write_text(tmp_path / "x", "text")
    assert steps == ["fsync", "replace"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("existing", [True, False])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int, existing: bool) -> None:
    path = tmp_path / "x"
    if existing:
        path.touch(0o600)
    before = os.umask(mask)
    try:
        write_text(path, "x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.png", ".png"), ("a.nii.gz", ".nii.gz"), ("a", ""), ("v1.2.safetensors", ".safetensors")],
)
def test_the_temporary_file_keeps_the_suffix_and_is_hidden(
    tmp_path: Path, name: str, suffix: str
) -> None:
    with replacing(tmp_path / name) as temporary:
        assert temporary.name.endswith(suffix)
        assert temporary.name.startswith(".")
        assert temporary.name != name


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"  # the one that ended last
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("content", [{"a": [1, 2.5, None, True, "ü"]}, [], "x", 3])
def test_json_is_read_back(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize("content", [float("nan"), {"a": float("inf")}, {"a": {1, 2}}, b"x"])
def test_what_json_cannot_hold_is_an_error_and_leaves_the_old_file(
    tmp_path: Path, content: Any
) -> None:
    path = tmp_path / "x.json"
    write_json(path, 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(path, content)
    assert read_json(path) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"nonsense"],
    ids=["empty", "cut off", "no text", "deep", "long number", "no JSON"],
)
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(MedsegError, match=r"x\.json: is not valid JSON"):
        read_json(path)


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"x\.json: does not exist"):
        read_json(tmp_path / "x.json")


def test_a_fingerprint_is_that_of_the_contents_in_order(tmp_path: Path) -> None:
    big, small = tmp_path / "big", tmp_path / "small"
    big.write_bytes(b"ab" * (1 << 20))
    small.write_bytes(b"c")
    assert sha256_of(big, small) == hashlib.sha256(b"ab" * (1 << 20) + b"c").hexdigest()
    assert sha256_of(small, big) != sha256_of(big, small)


def test_a_job_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    require_space(folder, 1000)
    with pytest.raises(MedsegError, match=r"yet: 1000000000\.0 GB are needed and .* are free"):
        require_space(folder, 10**18)
    assert not folder.exists()


def test_a_folder_is_made_and_proved_writable_without_a_trace(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MedsegError, match=rf"{folder}: cannot be written to \("):
            require_writable(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MedsegError, match="Permission denied"):
        require_writable(tmp_path / "x")
    tmp_path.chmod(0o700)
