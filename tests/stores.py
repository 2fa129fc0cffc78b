"""Small slice stores for tests, written through the real writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg_reg.data.store import Description, SliceStore
from medseg_reg.data.store_writer import CaseArrays, CaseSource, StoreWriter


def make_store(
    path: Path,
    cases: int | Sequence[str] = 6,
    slices: int | Sequence[int] = 4,
    size: int | tuple[int, int] = 32,
    classes: int | Sequence[str] = 2,
    groups: Sequence[str] | None = None,
    parts: Sequence[str | None] | None = None,
    seed: int = 0,
    *,
    dtype: str = "uint8",
    channels: int = 1,
    empty: float = 0.0,
    copies: dict[str, str] | None = None,
    ignore_label: int | None = None,
) -> SliceStore:
    """Write a store whose foreground a network can learn: bright blobs on noise.

    Args:
        path: where; must not exist.
        cases: the names of the cases, or how many (`case_00`, `case_01`, ...).
        slices: slices of each case, one number for all or one for each.
        size: (rows, columns) of a slice, or one number for both.
        classes: names, or how many with the background; class k is a blob of its own gray value.
        groups: the group of each case; by default each case is its own.
        parts: the official part of each case.
        seed: decides every pixel.
        dtype: uint8, int16 (values like HU) or float32 (0 to 1).
        channels: 1 gives (S, H, W), more give (S, H, W, C).
        empty: chance of a slice to have no foreground; the first slice of a case always has.
        copies: case -> case whose images and masks it repeats, for tests of duplicates.
        ignore_label: a label besides the classes, which a rectangle of each slice has.
    """
    names = [f"case_{i:02d}" for i in range(cases)] if isinstance(cases, int) else list(cases)
    counts = [slices] * len(names) if isinstance(slices, int) else list(slices)
    shape = (size, size) if isinstance(size, int) else size
    labels = classes if isinstance(classes, int) else len(classes)
    writer = StoreWriter(
        Path(path), describe(classes, dtype, ignore_label), {"made_by": "tests", "seed": seed}
    )
    writer.begin()
    made: dict[str, CaseArrays] = {}
    for index, (name, count) in enumerate(zip(names, counts, strict=True)):
        rng = np.random.default_rng([seed, index])
        origin = (copies or {}).get(name)
        made[name] = (
            made[origin]
            if origin is not None
            else CaseArrays(*_blobs(rng, count, shape, labels, dtype, channels, empty))
        )
        if ignore_label is not None:
            _ignore_a_rectangle(made[name].mask, ignore_label, seed + index)
        source = CaseSource(
            name=name,
            group=groups[index] if groups is not None else name,
            files=(),
            part=parts[index] if parts is not None else None,
        )
        writer.write(source, made[name], source_sha256="0" * 64)
    return writer.publish(names)


def describe(
    classes: int | Sequence[str], dtype: str, ignore_label: int | None = None
) -> Description:
    """Describe a store for tests."""
    if isinstance(classes, int):
        classes = ["background", *(f"class_{i}" for i in range(1, classes))]
    return Description(
        name="blobs",
        source="made by tests/stores.py",
        licence="none",
        citation="none",
        modality="synthetic",
        unit="HU" if dtype == "int16" else "gray value",
        classes=tuple(classes),
        ignore_label=ignore_label,
    )


def _ignore_a_rectangle(mask: np.ndarray, label: int, seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    for one in mask:
        top, left = (int(rng.integers(0, side // 2)) for side in one.shape)
        one[top : top + one.shape[0] // 3, left : left + one.shape[1] // 2] = label


def _blobs(
    rng: np.random.Generator,
    slices: int,
    shape: tuple[int, int],
    classes: int,
    dtype: str,
    channels: int,
    empty: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return images and masks: for each class one ellipse, brighter the higher the class."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    image = rng.normal(0.2, 0.04, (slices, *shape))
    mask = np.zeros((slices, *shape), np.uint8)
    for number in range(slices):
        if number > 0 and rng.random() < empty:
            continue
        for label in range(1, classes):
            centre = rng.uniform(0.25, 0.75, 2) * shape
            radii = rng.uniform(0.12, 0.22, 2) * shape
            inside = ((rows - centre[0]) / radii[0]) ** 2 + (
                (columns - centre[1]) / radii[1]
            ) ** 2 <= 1
            mask[number][inside] = label
            image[number][inside] += 0.6 * label / (classes - 1)
    image = np.clip(image, 0, 1)
    if channels > 1:
        tint = rng.uniform(0.8, 1.0, channels)
        image = image[..., None] * tint
    if dtype == "uint8":
        return np.round(image * 255).astype(np.uint8), mask
    if dtype == "int16":
        return np.round(image * 400 - 150).astype(np.int16), mask
    return image.astype(np.float32), mask
