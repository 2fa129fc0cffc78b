r"""Convert a folder of images and masks (PNG, JPEG, TIFF, npy, npz) to a slice store.

Usage: python -m data_prep.image_folder --source DIR --out stores/mine
           --group-pattern 'PANCREAS_(\d+)' --threshold 127

Layouts, subfolders allowed:
    images/a.png  with  masks/a.png       or labels/, annotations/; also a_mask, a_seg, a_label
    a.png         with  a_mask.png        beside it, or a_seg, a_label
    a.npz                                 with the arrays image|img|hu and mask|label

A case is a patient: name the part of the file name that tells the patient by --group-pattern,
or, where consecutive images are of one patient, how many by --group-size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.convert import (
    add_common_arguments,
    add_ignore_argument,
    check_ignore_label,
    convert,
    ignored_setting,
    with_background,
)
from data_prep.image_pairs import Pair, cases_of, find_pairs
from data_prep.labels import check_same_shape, to_classes
from medseg_reg.data.store import Description
from medseg_reg.data.store_writer import CaseArrays, CaseSource
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.io.filters import check_settings, prepared
from medseg_reg.io.images import npz_keys, read_image, read_labels, resolve_color
from medseg_reg.io.threads import in_threads

Array = np.ndarray[Any, np.dtype[Any]]

NO_GROUPS = (
    "every image is its own group: images of one patient may train and test, and scores may be "
    "too good"
)


def read_case(source: CaseSource, *, settings: dict[str, Any]) -> CaseArrays:
    """Read the images and masks of one case; `details` tells the pairs by index."""
    pairs, files = source.details["pairs"], source.files
    read = in_threads(
        lambda pair: _read_pair(files[pair[0]], files[pair[1]], settings),
        pairs,
    )
    return CaseArrays(
        _stack([image for image, _ in read], files[0]),
        np.stack([mask for _, mask in read]),
        slice_names=tuple(name for _, _, name in pairs),
    )


def _read_pair(image_path: Path, mask_path: Path, settings: dict[str, Any]) -> tuple[Array, Array]:
    canny = settings["canny"]
    image = read_image(image_path, settings["color"])
    if settings["erosion"] is not None or canny is not None:
        if image.dtype != np.uint8:
            raise MedsegError(
                f"{image_path}: holds {image.dtype}; --erosion and --canny need 8-bit images."
            )
        filters = (settings["erosion"], tuple(canny) if canny else None)
        image = prepared(image[np.newaxis], *filters, is_hu=False)[0]
    values = read_labels(mask_path)
    check_same_shape(image, values, image_path, mask_path)
    mask = to_classes(
        values,
        mask_path,
        len(settings["classes"]),
        label_values=settings["label_values"],
        threshold=settings["threshold"],
        ignored=settings.get("ignore_label"),
    )
    return image, mask


def _stack(images: list[Array], first: Path) -> Any:
    """Stack images; 16-bit ones may need float32 together, but 8 bits do not mix with more."""
    kinds = {image.dtype.name for image in images}
    if "uint8" in kinds and len(kinds) > 1:
        raise MedsegError(
            f"{first} and others of its case: 8-bit and deeper images are mixed. Save all alike."
        )
    return np.stack(images).astype("float32" if "float32" in kinds else kinds.pop(), copy=False)


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and convert."""
    options = _parser().parse_args(arguments)
    canny = tuple(options.canny) if options.canny else None
    check_settings(options.erosion, canny)
    pairs = find_pairs(options.source)
    cases = cases_of(pairs, options.group_pattern, options.group_size)
    settings = {
        "converter": "image_folder",
        "color": resolve_color((pair.image for pair in pairs), options.color),
        "classes": list(with_background(options.classes)),
        "label_values": options.label_values,
        "threshold": options.threshold,
        "group_pattern": options.group_pattern,
        "group_size": options.group_size,
        "erosion": options.erosion,
        "canny": options.canny,
        "name": options.name,
        "licence": options.licence,
        "citation": options.citation,
        "modality": options.modality,
        "unit": options.unit,
        **ignored_setting(options.ignore_label),
    }
    _check_labels(settings)
    grouped = options.group_pattern is not None or options.group_size is not None
    convert(
        cases,
        partial(read_case, settings=settings),
        _description(options, pairs, grouped),
        options,
        settings,
    )
    if not grouped:
        print(f"WARNING: {NO_GROUPS}. Tell the patients by --group-pattern or --group-size.")


def _check_labels(settings: dict[str, Any]) -> None:
    classes, values = settings["classes"], settings["label_values"]
    if settings["threshold"] is not None and (values is not None or len(classes) != 2):
        raise MedsegError(
            f"--threshold makes one class beside the background; found --classes {classes} and "
            f"--label-values {values}. Leave one of them out."
        )
    if len(classes) < 2 or len(classes) > 256:
        raise MedsegError(
            f"--classes: {len(classes)} given; expected the background first, then each class."
        )
    if values is not None and (len(values) != len(classes) or len(set(values)) != len(values)):
        raise MedsegError(
            f"--label-values: {values} for the classes {classes}; expected a gray value of its "
            "own for each class, the background first."
        )
    if values is not None and (min(values) < 0 or max(values) > 65535):
        raise MedsegError(f"--label-values: {values}; gray values lie from 0 to 65535.")
    ignored = settings.get("ignore_label")
    check_ignore_label(ignored, classes)
    if values is not None and ignored in values:
        raise MedsegError(
            f"--ignore-label {ignored}: is the gray value of the class "
            f"'{classes[values.index(ignored)]}' in --label-values. Leave it out of one of them."
        )


def _description(options: argparse.Namespace, pairs: list[Pair], grouped: bool) -> Description:
    first = pairs[0].image
    hounsfield = first.suffix.lower() == ".npz" and "hu" in npz_keys(first)
    return Description(
        name=options.name or options.source.resolve().name,
        source=f"{len(pairs)} images",
        licence=options.licence,
        citation=options.citation,
        modality=options.modality or ("CT" if hounsfield else "image"),
        unit=options.unit or ("HU" if hounsfield else "gray value"),
        classes=with_background(options.classes),
        notes=() if grouped else (NO_GROUPS,),
        ignore_label=options.ignore_label,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.image_folder",
        description="Convert a folder of images and masks to a slice store.",
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help="the folder; layouts: see the file's top")
    add(
        "--group-pattern",
        metavar="REGEX",
        help="its one bracketed part, found in the path of an image, names the patient",
    )
    add("--group-size", type=int, metavar="N", help="each N consecutive images are one patient")
    add(
        "--color",
        choices=("auto", "gray", "rgb"),
        default="auto",
        help="channels; auto: gray unless an image of the folder is in colour (default: auto)",
    )
    add("--threshold", type=int, metavar="VALUE", help="foreground is what lies above VALUE")
    add(
        "--label-values",
        type=int,
        nargs="+",
        metavar="VALUE",
        help="gray value in the masks of each class in turn (default: 0 1 2 ..., or 0 255)",
    )
    add(
        "--classes",
        nargs="+",
        default=["foreground"],
        metavar="NAME",
        help="names of the classes after the background, in order (default: foreground)",
    )
    add_ignore_argument(parser, "masks")
    add("--name", help="name of the data set (default: the folder's name)")
    add("--licence", default="not stated", help="licence of the data")
    add("--citation", default="not stated", help="how to cite the data")
    add("--modality", help="such as CT, MR, X-ray (default: CT for arrays named hu, else image)")
    add("--unit", help="unit of the pixels (default: HU for arrays named hu, else gray value)")
    add("--erosion", type=int, metavar="N", help="erode images by a square of N pixels")
    add(
        "--canny",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="burn Canny edges into the images, after erosion",
    )
    add_common_arguments(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
