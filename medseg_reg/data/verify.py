"""Prove that a slice store still is what its conversion wrote.

Usage: python -m medseg_reg.data.verify STORE

Reads every byte once and compares hashes, shapes, types, labels, foreground counts, slice
fingerprints and geometry with the manifest. Exit code 0: all well; 2: the findings are listed,
each with its file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medseg_reg.data.store import CaseRow, SliceStore, open_array
from medseg_reg.data.store_writer import foreground_counts, slice_hashes, top_class
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.files import sha256_of
from medseg_reg.io.geometry import Geometry, Plane, geometry_of

Array = np.ndarray[Any, np.dtype[Any]]

_PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")


def verify(store: SliceStore) -> list[str]:
    """Return what is wrong with a store, one line for each finding; an empty list is good."""
    return _joined(store, _verify_cases(store))


def _joined(store: SliceStore, by_case: Sequence[Sequence[str]]) -> list[str]:
    findings = [line for lines in by_case for line in lines]
    return findings + _verify_folder(store) + _verify_groups(store)


def _verify_cases(store: SliceStore) -> list[list[str]]:
    """Return the findings of each case, in the order of the manifest."""
    # Threads, because hashing and counting release the interpreter's lock.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(partial(_verify_case, store), store.manifest.cases))


def _verify_case(store: SliceStore, row: CaseRow) -> list[str]:
    findings = _verify_row(store, row)
    arrays = {}
    for folder, stated, shape, dtype in (
        ("images", row.image_sha256, row.shape, row.dtype),
        ("masks", row.mask_sha256, row.shape[:3], "uint8"),
    ):
        path = store.path / folder / f"{row.name}.npy"
        try:
            # Not through the store, which would keep every map open.
            arrays[folder] = open_array(path, shape, dtype)
        except MedsegError as error:
            findings.append(str(error))
            continue
        if (found := sha256_of(path)) != stated:
            findings.append(
                f"{path}: SHA-256 is {found[:16]}..., the manifest says {stated[:16]}.... The file "
                "was changed; convert the data again."
            )
    if "images" in arrays:
        findings += _verify_image(store, row, arrays["images"])
    if "masks" in arrays:
        findings += _verify_mask(store, row, arrays["masks"])
    return findings


def _verify_row(store: SliceStore, row: CaseRow) -> list[str]:
    """Check what the manifest says of a case against itself."""
    where = f"{store.path / 'manifest.json'}: case {row.name}"
    findings = []
    for key in ("foreground", "slice_hashes", "slice_names"):
        value = getattr(row, key)
        if value is not None and len(value) != row.slices:
            findings.append(f"{where}: {key} has {len(value)} entries for {row.slices} slices.")
    if row.geometry is not None:
        findings += [f"{where}: {line}" for line in _verify_geometry(row, row.geometry)]
    return findings


def _verify_geometry(row: CaseRow, geometry: Geometry) -> list[str]:
    if sorted(geometry.axes) != [0, 1, 2]:
        return [f"axes {geometry.axes} are no order of three axes."]
    affine = np.array(geometry.source_affine)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return ["source_affine is no finite 4x4 matrix."]
    findings = []
    stored = tuple(geometry.source_shape[axis] for axis in geometry.axes)
    if stored != row.shape[:3]:
        findings.append(
            f"the arrays are {row.shape[:3]}, the source grid {geometry.source_shape} gives "
            f"{stored}."
        )
    lengths = np.linalg.norm(affine[:3, :3], axis=0)[list(geometry.axes)]
    if not np.allclose(lengths, geometry.spacing, rtol=1e-3, atol=1e-5):
        told = ", ".join(f"{value:.4g}" for value in lengths)
        findings.append(f"spacing is {geometry.spacing}, source_affine gives ({told}).")
    try:
        fits = [geometry_of(affine, geometry.source_shape, plane) for plane in _PLANES]
    except ValueError as error:
        return [*findings, f"{error}."]
    if all((one.axes, one.flips) != (geometry.axes, geometry.flips) for one in fits):
        findings.append(
            f"axes {geometry.axes} and flips {geometry.flips} bring the source to none of the "
            "planes axial, coronal, sagittal."
        )
    return findings


def _verify_image(store: SliceStore, row: CaseRow, image: Array) -> list[str]:
    path = store.path / "images" / f"{row.name}.npy"
    findings = []
    if image.dtype == np.float32 and not all(np.isfinite(one).all() for one in image):
        findings.append(f"{path}: holds NaN or infinite pixels.")
    odd = [
        number
        for number, (found, stated) in enumerate(
            zip(slice_hashes(np.ascontiguousarray(image)), row.slice_hashes, strict=False)
        )
        if found != stated
    ]
    if odd:
        findings.append(f"{path}: slices {_listed(odd)} are not those of the manifest.")
    return findings


def _verify_mask(store: SliceStore, row: CaseRow, mask: Array) -> list[str]:
    path = store.path / "masks" / f"{row.name}.npy"
    findings = []
    counts = foreground_counts(mask, store.ignore_label)
    odd = [n for n, (a, b) in enumerate(zip(counts, row.foreground, strict=False)) if a != b]
    if odd:
        first = odd[0]
        findings.append(
            f"{path}: slice {first} has {counts[first]} foreground pixels, the manifest says "
            f"{row.foreground[first]}; slices that differ: {_listed(odd)}."
        )
    if (top := max(top_class(one, store.ignore_label) for one in mask)) >= len(store.classes):
        findings.append(
            f"{path}: holds the label {top}, the classes are 0 to {len(store.classes) - 1}."
        )
    return findings


def _verify_folder(store: SliceStore) -> list[str]:
    """Find files that do not belong, and the overview missing; hidden files are not looked at."""
    names = {f"{row.name}.npy" for row in store.manifest.cases}
    expected = {Path("manifest.json"), Path("overview.png")}
    expected |= {Path(folder) / name for folder in ("images", "masks") for name in names}
    found = {path.relative_to(store.path) for path in store.path.rglob("*") if not path.is_dir()}
    findings = [
        f"{store.path / path}: does not belong to the store. Move it elsewhere."
        for path in sorted(found - expected)
        if not any(part.startswith(".") for part in path.parts)
    ]
    if Path("overview.png") not in found:
        findings.append(f"{store.path / 'overview.png'}: is missing. Convert the data again.")
    return findings


def _verify_groups(store: SliceStore) -> list[str]:
    """Find patients or videos that the official parts of the data set tear apart."""
    part_of: dict[str, set[str | None]] = {}
    for row in store.manifest.cases:
        part_of.setdefault(row.group, set()).add(row.part)
    return [
        f"{store.path / 'manifest.json'}: '{group}' has cases inside and outside the official "
        "test part."
        for group, parts in part_of.items()
        if "test" in parts and len(parts) > 1
    ]


def table(store: SliceStore, findings: Sequence[Sequence[str]]) -> str:
    """Return one line for each case: what it holds, and how many findings it has."""
    header = ("case", "group", "part", "shape", "type", "foreground", "state")
    lines = [header]
    for row, found in zip(store.manifest.cases, findings, strict=True):
        filled = sum(count > 0 for count in row.foreground)
        shape = "x".join(map(str, row.shape))
        state = f"{len(found)} findings" if found else "good"
        foreground = f"{filled} of {row.slices}"
        lines.append((row.name, row.group, row.part or "-", shape, row.dtype, foreground, state))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown + (f" ... ({len(numbers)} in all)" if len(numbers) > 6 else "")


def main(arguments: Sequence[str]) -> None:
    """Parse the command line, print the table, and fail when something was found."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.data.verify",
        description="Prove that a slice store still is what its conversion wrote.",
    )
    parser.add_argument("store", type=Path, help="the folder that holds manifest.json")
    store = SliceStore(parser.parse_args(arguments).store)
    by_case = _verify_cases(store)
    print(table(store, by_case))
    if findings := _joined(store, by_case):
        lines = "\n".join(findings)
        raise MedsegError(f"{store.path}: {len(findings)} findings\n{lines}")
    print(f"{store.path}: {len(by_case)} cases, all well.")


if __name__ == "__main__":
    run_main(main)
