"""Convert the BAGLS glottis frames to a slice store.

Usage: python -m data_prep.bagls --source DIR --out stores/bagls [--color rgb] [--workers 8]

DIR holds the unpacked archives, `training/` and `test/`, each with N.png (frame), N_seg.png
(mask, 0 and 255) and N.meta (JSON with the key "Video Id"). Frames of one video are near
duplicates, so a case is a video: `video_0149`, its frames in numerical order. Frames of several
sizes in one video make one case for each size, of the same group. The official test part stays
the test part. A mask without foreground is valid: the glottis is closed.

Data: Gomez et al., BAGLS, a multihospital Benchmark for Automatic Glottis Segmentation,
Scientific Data 7:186 (2020), doi 10.1038/s41597-020-0526-3. CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.convert import add_common_arguments, convert
from data_prep.labels import check_same_shape, to_classes
from medseg_reg.data.store import Description
from medseg_reg.data.store_writer import CaseArrays, CaseSource
from medseg_reg.errors import MedsegError, nearest, run_main
from medseg_reg.files import read_json
from medseg_reg.io.images import image_shape, read_image, read_labels
from medseg_reg.io.threads import in_threads

Array = np.ndarray[Any, np.dtype[Any]]

# Folder of the archive -> part of the store.
PARTS = {"training": "train", "test": "test"}
VIDEO_KEY = "Video Id"
# Frames of the official archive.
OFFICIAL = {"train": 55_750, "test": 3_500}

DESCRIPTION = Description(
    name="BAGLS",
    source="https://doi.org/10.5281/zenodo.3762320",
    licence="CC BY-NC-SA 4.0",
    citation=(
        "Gomez et al., BAGLS, a multihospital Benchmark for Automatic Glottis Segmentation, "
        "Scientific Data 7:186 (2020), doi 10.1038/s41597-020-0526-3"
    ),
    modality="endoscopy",
    unit="gray value",
    classes=("background", "glottis"),
)


@dataclass(frozen=True)
class Frame:
    """One frame with what its header and its metadata say."""

    number: int
    image: Path
    mask: Path
    meta: Path
    video: int
    shape: tuple[int, int]


def find_cases(source: Path) -> list[CaseSource]:
    """Return the videos of the official layout as cases, ordered by part and number.

    Raises:
        MedsegError: no such layout, archives that are not unpacked, incomplete frames, broken
            metadata, or a video in both parts.
    """
    folders = [source / name for name in PARTS if (source / name).is_dir()]
    packed = [name for name in PARTS if (source / f"{name}.zip").exists()]
    packed = [name for name in packed if not (source / name).is_dir()]
    if packed:
        zips = " and ".join(f"{name}.zip" for name in packed)
        raise MedsegError(f"{source}: {zips} must be unpacked first, into {source}/{packed[0]}/.")
    if not folders:
        raise MedsegError(
            f"{source}: has neither training/ nor test/. Give the folder into which training.zip "
            "and test.zip of BAGLS were unpacked."
        )
    cases: list[CaseSource] = []
    seen: dict[int, Frame] = {}
    for folder in folders:
        frames = _frames(folder)
        for frame in frames:
            first = seen.setdefault(frame.video, frame)
            if first.meta.parent != folder:
                raise MedsegError(
                    f"{first.meta} and {frame.meta}: both are of video {frame.video}. Frames of "
                    "one video are near duplicates and must not train and test; remove it from "
                    "one of the two folders."
                )
        cases.extend(_cases(frames, PARTS[folder.name]))
    return cases


def read_case(
    source: CaseSource, *, color: Literal["gray", "rgb"], threshold: int | None
) -> CaseArrays:
    """Read the frames of one video; the files come as image, mask, meta in turn."""

    def frame(paths: tuple[Path, Path]) -> tuple[Array, Array]:
        image, values = read_image(paths[0], color), read_labels(paths[1])
        if image.dtype != np.uint8:
            raise MedsegError(f"{paths[0]}: holds {image.dtype}, expected an 8-bit image.")
        check_same_shape(image, values, *paths)
        return image, to_classes(values, paths[1], 2, label_values=(0, 255), threshold=threshold)

    images, masks = source.files[::3], source.files[1::3]
    frames = in_threads(frame, zip(images, masks, strict=True))
    return CaseArrays(
        np.stack([image for image, _ in frames]),
        np.stack([mask for _, mask in frames]),
        slice_names=tuple(path.stem for path in images),
    )


def _frames(folder: Path) -> list[Frame]:
    """Return the frames of one part in numerical order."""
    names = {path.name for path in folder.iterdir()}
    stems = {
        "image": {n[:-4] for n in names if n.endswith(".png") and not n.endswith("_seg.png")},
        "mask (N_seg.png)": {n[:-8] for n in names if n.endswith("_seg.png")},
        "metadata (N.meta)": {n[:-5] for n in names if n.endswith(".meta")},
    }
    every = set().union(*stems.values())
    if not every:
        raise MedsegError(f"{folder}: has no frames (N.png, N_seg.png, N.meta).")
    if odd := sorted(stem for stem in every if not re.fullmatch(r"[0-9]+", stem)):
        raise MedsegError(
            f"{folder / odd[0]}.*: is not named by a number, as the frames of BAGLS are. Remove "
            "it, or convert other data with data_prep.image_folder."
        )
    for kind, found in stems.items():
        if missing := sorted(every - found, key=int):
            raise MedsegError(
                f"{folder}: frame {missing[0]} has no {kind}"
                + (f", nor have {len(missing) - 1} others" if len(missing) > 1 else "")
                + ". Unpack the archive again."
            )
    ordered = sorted(every, key=lambda stem: (int(stem), stem))
    return in_threads(partial(_frame, folder), ordered)


def _frame(folder: Path, stem: str) -> Frame:
    image, meta = folder / f"{stem}.png", folder / f"{stem}.meta"
    return Frame(
        number=int(stem),
        image=image,
        mask=folder / f"{stem}_seg.png",
        meta=meta,
        video=read_video_id(meta),
        shape=image_shape(image),
    )


def read_video_id(path: Path) -> int:
    """Return the number of the video from a .meta file; a missing or odd one is an error."""
    content = read_json(path)
    if not isinstance(content, dict) or VIDEO_KEY not in content:
        hint = nearest(VIDEO_KEY, content) if isinstance(content, dict) else ""
        raise MedsegError(f"{path}: has no key '{VIDEO_KEY}'.{hint} Get the file again.")
    value = content[VIDEO_KEY]
    if isinstance(value, str) and re.fullmatch(r"[0-9]+", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MedsegError(f"{path}: '{VIDEO_KEY}' is {value!r}, expected a number.")
    return value


def _cases(frames: Sequence[Frame], part: str) -> list[CaseSource]:
    """Group frames by video and size."""
    videos: dict[int, dict[tuple[int, int], list[Frame]]] = {}
    for frame in frames:
        videos.setdefault(frame.video, {}).setdefault(frame.shape, []).append(frame)
    cases = []
    for video in sorted(videos):
        group = f"video_{video:04d}"
        for (rows, columns), members in sorted(videos[video].items()):
            cases.append(
                CaseSource(
                    name=group if len(videos[video]) == 1 else f"{group}_{rows}x{columns}",
                    group=group,
                    files=tuple(p for f in members for p in (f.image, f.mask, f.meta)),
                    part=part,
                )
            )
    return cases


def _notes(cases: Sequence[CaseSource]) -> tuple[str, ...]:
    """Say so where this is not the whole of BAGLS."""
    found = {
        # Each frame has three files: image, mask, meta.
        part: sum(len(case.files) // 3 for case in cases if case.part == part)
        for part in OFFICIAL
    }
    if found == OFFICIAL:
        return ()
    shown = ", ".join(f"{found[part]} of {OFFICIAL[part]} {part} frames" for part in OFFICIAL)
    return (f"a part of BAGLS ({shown}): scores are not comparable with published ones",)


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.bagls", description="Convert BAGLS to a slice store."
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="the folder with training/ and test/"
    )
    parser.add_argument(
        "--color",
        choices=("gray", "rgb"),
        default="gray",
        help="channels of the images; gray is luma, and exact for gray frames (default: gray)",
    )
    parser.add_argument(
        "--threshold",
        type=int,
        metavar="VALUE",
        help="glottis is what lies above VALUE; for masks that were blurred or saved as JPEG",
    )
    add_common_arguments(parser)
    options = parser.parse_args(arguments)
    cases = find_cases(options.source)
    store = convert(
        cases,
        partial(read_case, color=options.color, threshold=options.threshold),
        DESCRIPTION.model_copy(update={"notes": _notes(cases)}),
        options,
        {"converter": "bagls", "color": options.color, "threshold": options.threshold},
    )
    counts = [count for row in store.manifest.cases for count in row.foreground]
    print(
        f"{counts.count(0)} of {len(counts)} masks have no foreground: valid, a closed glottis.\n"
        f"Licence: {DESCRIPTION.licence}, not for commercial use."
    )


if __name__ == "__main__":
    run_main(main)
