"""Label files that lie in a folder or, packed or not, in a zip archive.

Members of an archive are read straight into memory, with a limit on their size; nothing is ever
unpacked to the disk.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medseg_reg.errors import MedsegError

MAX_MEMBER_BYTES = 1 << 31


@dataclass(frozen=True)
class LabelFile:
    """A label volume: a file, or a member of a zip archive."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    def read(self) -> bytes:
        """Return the bytes of the label file.

        Raises:
            MedsegError: the archive is damaged, encrypted, or the member is too large.
        """
        if self.member is None:
            return self.path.read_bytes()
        try:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(self.member)
                if info.flag_bits & 1 or info.file_size > MAX_MEMBER_BYTES:
                    raise MedsegError(
                        f"{self}: is encrypted, or larger than {MAX_MEMBER_BYTES >> 20} MiB "
                        f"({info.file_size >> 20} MiB). Download the archive again."
                    )
                with archive.open(info) as file:
                    # zipfile trusts the size in the archive's index; so the limit holds.
                    return file.read(info.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise MedsegError(
                f"{self}: cannot be read ({error}). Download the archive again."
            ) from None


def find_labels(where: Path, pattern: re.Pattern[str]) -> dict[int, LabelFile]:
    """Return the label files of a folder or a zip archive by the number in their names.

    Args:
        where: a zip archive, or a folder that holds label files or archives of them, at any
            depth.
        pattern: matches a whole file name; its first group is the number.

    Raises:
        MedsegError: nothing found, two files of one number, a damaged archive, or one with paths
            that lead out of it.
    """
    if where.is_file():
        found = _in_archive(where, pattern)
    elif where.is_dir():
        found = _in_folder(where, pattern)
    else:
        raise MedsegError(f"{where}: does not exist; expected a folder or a zip of labels.")
    labels: dict[int, LabelFile] = {}
    for label, number in found:
        if number in labels:
            raise MedsegError(
                f"{where}: two labels have the number {number}: {labels[number]} and {label}. "
                "Keep one of them."
            )
        labels[number] = label
    if not labels:
        raise MedsegError(f"{where}: holds no label file like label0001.nii.gz.")
    return dict(sorted(labels.items()))


def _in_folder(folder: Path, pattern: re.Pattern[str]) -> list[tuple[LabelFile, int]]:
    paths = sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names)
    found = [
        (LabelFile(path), int(match[1]))
        for path in paths
        if (match := pattern.fullmatch(path.name))
    ]
    if found:
        return found
    return [
        pair
        for path in paths
        if path.suffix.lower() == ".zip" and not path.name.startswith(".")
        for pair in _in_archive(path, pattern)
    ]


def _in_archive(path: Path, pattern: re.Pattern[str]) -> list[tuple[LabelFile, int]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise MedsegError(
            f"{path}: is not a whole zip archive ({error}). Download it again."
        ) from None
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
            raise MedsegError(
                f"{path}: holds the path {name!r}, which leads out of the archive. Do not use it."
            )
    return [
        (LabelFile(path, name), int(match[1]))
        for name in names
        if (match := pattern.fullmatch(PurePosixPath(name).name))
    ]
