"""Finding images, their masks and their patients in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from medseg_reg.data.store_writer import CaseSource
from medseg_reg.errors import MedsegError
from medseg_reg.io.images import ARRAYS, PICTURES, image_shape

IMAGE_FOLDER = "images"
MASK_FOLDERS = ("masks", "labels", "annotations")
MASK_SUFFIXES = ("_mask", "_seg", "_label")


@dataclass(frozen=True)
class Pair:
    """An image, its mask (the same file for npz), and its path without ending as its name."""

    name: str
    image: Path
    mask: Path


def find_pairs(source: Path) -> list[Pair]:
    """Return the images of a folder with their masks, in natural order of their names.

    Raises:
        MedsegError: no images, an image without a mask or with two, a mask without an image.
    """
    if not source.is_dir():
        raise MedsegError(f"{source}: is not a folder.")
    if (source / IMAGE_FOLDER).is_dir():
        folders = [source / name for name in MASK_FOLDERS if (source / name).is_dir()]
        if len(folders) != 1:
            found = ", ".join(folder.name for folder in folders) or "none"
            raise MedsegError(
                f"{source}: beside images/ one of masks/, labels/, annotations/ is expected, "
                f"found: {found}."
            )
        images = _by_stem(source / IMAGE_FOLDER)
        masks = _by_stem(folders[0])
    else:
        every = _by_stem(source)
        masks = {stem: path for stem, path in every.items() if stem != _base(stem)}
        images = {stem: path for stem, path in every.items() if stem not in masks}
        masks |= {s: p for s, p in images.items() if p.suffix.lower() == ".npz"}
    if not images:
        raise MedsegError(
            f"{source}: has no images ({', '.join((*PICTURES, *ARRAYS))}). Expected images/ and "
            "masks/, or a.png with a_mask.png, or a.npz."
        )
    return _paired(images, masks, source)


def _paired(images: dict[str, Path], masks: dict[str, Path], source: Path) -> list[Pair]:
    pairs, used = [], set()
    for stem in sorted(images, key=_natural):
        wanted = [stem, *(stem + suffix for suffix in MASK_SUFFIXES)]
        found = [name for name in wanted if name in masks]
        if len(found) != 1:
            told = " and ".join(str(masks[name]) for name in found) or "none"
            raise MedsegError(
                f"{images[stem]}: needs one mask of the same name, with or without "
                f"{', '.join(MASK_SUFFIXES)}; found {told}."
            )
        used.add(found[0])
        pairs.append(Pair(stem, images[stem], masks[found[0]]))
    if left := sorted(set(masks) - used, key=_natural):
        more = f", and {len(left) - 1} more masks have none" if len(left) > 1 else ""
        raise MedsegError(
            f"{masks[left[0]]}: no image in {source} belongs to this mask{more}. Add the images, "
            "or remove the masks."
        )
    return pairs


def cases_of(
    pairs: Sequence[Pair], pattern: str | None = None, size: int | None = None
) -> list[CaseSource]:
    """Group images into cases, one for each patient and image size.

    Args:
        pairs: the images, in order.
        pattern: a regular expression whose one group, searched in the name, is the patient.
        size: that many consecutive images are one patient. Without either, each image is its
            own patient.

    Raises:
        MedsegError: a bad pattern, a name without a match, or images that do not divide.
    """
    groups = _groups(pairs, pattern, size)
    with ThreadPoolExecutor(8) as pool:
        shapes = list(pool.map(image_shape, (pair.image for pair in pairs)))
    members: dict[str, dict[tuple[int, int], list[Pair]]] = {}
    for group, shape, pair in zip(groups, shapes, pairs, strict=True):
        members.setdefault(group, {}).setdefault(shape, []).append(pair)
    cases = []
    for group, by_shape in members.items():
        for (rows, columns), chosen in sorted(by_shape.items()):
            name = _case_name(group) + (f"_{rows}x{columns}" if len(by_shape) > 1 else "")
            cases.append(_case(name, group, chosen))
    _check_names(cases)
    return cases


def _case(name: str, group: str, pairs: Sequence[Pair]) -> CaseSource:
    files: dict[Path, int] = {}
    for pair in pairs:
        files.setdefault(pair.image, len(files))
        files.setdefault(pair.mask, len(files))
    table = [(files[pair.image], files[pair.mask], pair.name) for pair in pairs]
    return CaseSource(name=name, group=group, files=tuple(files), details={"pairs": table})


def _groups(pairs: Sequence[Pair], pattern: str | None, size: int | None) -> list[str]:
    if pattern is not None and size is not None:
        raise MedsegError("--group-pattern and --group-size exclude each other; give one.")
    if size is not None:
        if size < 1 or len(pairs) % size:
            raise MedsegError(
                f"--group-size {size}: {len(pairs)} images do not divide into patients of {size}."
            )
        width = len(str(max(len(pairs) // size - 1, 0)))
        return [f"group_{index // size:0{max(width, 3)}d}" for index in range(len(pairs))]
    if pattern is None:
        return [pair.name for pair in pairs]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise MedsegError(
            f"--group-pattern {pattern}: is no regular expression ({error})."
        ) from None
    if compiled.groups != 1:
        raise MedsegError(
            f"--group-pattern {pattern}: has {compiled.groups} bracketed parts; expected one, "
            r"such as 'patient_(\d+)'."
        )
    found = [compiled.search(pair.name) for pair in pairs]
    groups = []
    for pair, match in zip(pairs, found, strict=True):
        if match is None or not match[1]:
            raise MedsegError(f"--group-pattern {pattern}: finds no patient in '{pair.name}'.")
        groups.append(match[1])
    return groups


def _check_names(cases: Sequence[CaseSource]) -> None:
    group_of: dict[str, str] = {}
    for case in cases:
        # Some file systems do not tell a from A.
        other = group_of.setdefault(case.name.lower(), case.group)
        if other != case.group:
            raise MedsegError(
                f"'{other}' and '{case.group}' would both be stored as the case '{case.name}'. "
                "Rename one of them."
            )


def _case_name(group: str) -> str:
    """Make a file name of a group; numbers get a word before them, for a reader's sake."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", group).strip("._-")
    return f"case_{name}" if not name or name.isdigit() else name


def _by_stem(folder: Path) -> dict[str, Path]:
    """Return the images below a folder by their paths without ending, hidden ones left out."""
    found: dict[str, Path] = {}
    for path in sorted(_files(folder)):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise MedsegError(f"{found[stem]} and {path}: one name twice. Remove one of them.")
        found[stem] = path
    return found


def _files(folder: Path) -> Iterable[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in (*PICTURES, *ARRAYS) and path.is_file() and not hidden:
            yield path


def _base(stem: str) -> str:
    """Return a mask's name without its suffix, or the name itself."""
    for suffix in MASK_SUFFIXES:
        if stem.endswith(suffix):
            return stem.removesuffix(suffix)
    return stem


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which frame 2 comes before frame 10."""
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name)]
