"""Proof of how a label volume lies on its CT, from the HU inside and around the mask.

Label headers of some data sets cannot be trusted, and a mask that lies mirrored looks plausible
to the eye. So every way to lay the label onto the image (both in-plane transpositions, the four
in-plane flips, both slice orders) is scored, and the best one must be clearly ahead.

    score = share of mask voxels in the soft-tissue range
          + (mean |HU step| across the mask's border - mean |HU step| inside it) / 30

A step is taken over about 2.2 mm in the slice, with HU clipped to the tissue range. The first
term alone can be fooled by a mask that lands inside the liver, the second one by a mask that lands
on bone. On 48 scans of Pancreas-CT, of which only 1 to 10 slices each were at hand, the right one
of the eight in-plane ways always came first, in the median 0.75 ahead of the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg_reg.errors import MedsegError

Array = np.ndarray[Any, np.dtype[Any]]
SIDES = (False, True)  # an axis as it is, and flipped

SOFT_TISSUE = (0, 200)
CLIP = (-150, 250)
EDGE_SCALE = 30.0
MARGIN = 0.10
STEP_MM = 2.2
SAMPLES = 4000
SLICES = 32
MIN_VOXELS = 50


@dataclass(frozen=True)
class Candidate:
    """One way to lay a label of axes (a, b, slices) onto an image (slices, rows, columns).

    Attributes:
        transposed: rows of the image run along axis b of the label, columns along axis a; this
            is how a label in NIfTI order (x, y, z) lies on DICOM rows.
        flips: whether slices, rows and columns run against the label's axes.
        score: see the module.
    """

    transposed: bool
    flips: tuple[bool, bool, bool]
    score: float = float("nan")

    def lay(self, label: Array) -> Array:
        """Return the label as a view in the order of the image."""
        laid = label.transpose(2, 1, 0) if self.transposed else label.transpose(2, 0, 1)
        return laid[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]

    @property
    def way(self) -> str:
        """The way in words."""
        names = [n for n, on in zip(("slices", "rows", "columns"), self.flips, strict=True) if on]
        turned = "transposed" if self.transposed else "not transposed"
        return f"label {turned}, flipped {' and '.join(names) or 'nothing'}"

    def __str__(self) -> str:
        return f"{self.way}: {self.score:.2f}"


def prove_orientation(
    name: str,
    image: Array,
    label: Array,
    spacing: Sequence[float] = (1.0, 0.75, 0.75),
    margin: float = MARGIN,
) -> Candidate:
    """Find how a label lies on its CT, and prove it.

    Args:
        name: the case, for errors.
        image: (S, H, W) in HU.
        label: (A, B, S), foreground above 0; (A, B) is (H, W) or (W, H).
        spacing: of slices, rows and columns, in millimetres.
        margin: how far the best score must be ahead of the second.

    Returns:
        The best candidate; `candidate.lay(label)` lies on the image.

    Raises:
        MedsegError: shapes do not fit, the label is empty or too small, or no candidate is
            clearly ahead.
    """
    ranked = rank_orientations(name, image, label, spacing)
    if len(ranked) > 1 and ranked[0].score - ranked[1].score < margin:
        raise MedsegError(
            f"case {name}: the label's orientation cannot be proved: best {ranked[0]}; second "
            f"{ranked[1]}; a lead of {margin:.2f} is needed. Check that label and scan belong "
            "together; leave the case out with --skip if they do not."
        )
    return ranked[0]


def rank_orientations(
    name: str, image: Array, label: Array, spacing: Sequence[float] = (1.0, 0.75, 0.75)
) -> list[Candidate]:
    """Return all candidates whose shape fits, the best first; see `prove_orientation`."""
    slices, height, width = image.shape
    turns = [
        turned
        for turned, shape in ((True, (width, height)), (False, (height, width)))
        if label.shape == (*shape, slices)
    ]
    if not turns:
        raise MedsegError(
            f"case {name}: the label has {label.shape} voxels, the scan {width} columns, {height} "
            f"rows and {slices} slices. They do not belong together, or slices are missing."
        )
    voxels, partners, border = _sample(name, label, spacing)
    ranked = []
    for turned, flips in itertools.product(turns, itertools.product(SIDES, SIDES, SIDES)):
        here = _look_up(image, voxels, turned, flips)
        there = _look_up(image, partners.reshape(-1, 3), turned, flips).reshape(border.shape)
        ranked.append(Candidate(turned, flips, _score(here, there, border)))
    return sorted(ranked, key=lambda one: -one.score)


def _sample(name: str, label: Array, spacing: Sequence[float]) -> tuple[Array, Array, Array]:
    """Return mask voxels (N, 3), their four partners (4, N, 3), and which pairs cross the border.

    Pairs that leave the volume are moved back onto their own voxel and count as inside.
    """
    filled = [index for index in range(label.shape[2]) if label[..., index].any()]
    some = [filled[i] for i in _spread(len(filled), SLICES)]
    # Of booleans, which takes NumPy a tenth of the time.
    found = [np.flatnonzero(label[..., index].T != 0) for index in some]
    places = np.concatenate([*found, np.empty(0, int)])
    if len(places) < MIN_VOXELS:
        raise MedsegError(
            f"case {name}: the label marks {len(places)} voxels, too few to prove its orientation "
            f"(at least {MIN_VOXELS})."
        )
    chosen = _spread(len(places), SAMPLES)
    columns, rows = np.divmod(places[chosen], label.shape[0])
    height = np.repeat(some, [len(one) for one in found])[chosen]
    voxels = np.stack([rows, columns, height], axis=1)
    step = max(1, round(STEP_MM / spacing[1]))
    steps = np.array([(step, 0, 0), (-step, 0, 0), (0, step, 0), (0, -step, 0)])
    partners = voxels[None] + steps[:, None]
    outside = ((partners < 0) | (partners >= label.shape)).any(axis=2)
    partners[outside] = np.broadcast_to(voxels, partners.shape)[outside]
    border = label[tuple(np.moveaxis(partners, 2, 0))] == 0
    return voxels, partners, border


def _spread(count: int, most: int) -> Array:
    """Return indices below `count`, evenly spread, at most `most` of them."""
    spread: Array = np.linspace(0, max(count - 1, 0), min(count, most)).astype(int)
    return spread


def _look_up(image: Array, places: Array, turned: bool, flips: tuple[bool, ...]) -> Array:
    """Return the HU at label indices (N, 3), laid onto the image in one of the ways."""
    rows, columns = (1, 0) if turned else (0, 1)
    where = []
    for axis, (source, flip) in enumerate(zip((2, rows, columns), flips, strict=True)):
        index = places[:, source]
        where.append(image.shape[axis] - 1 - index if flip else index)
    found: Array = image[tuple(where)].astype(np.float32)
    return found


def _score(here: Array, there: Array, border: Array) -> float:
    soft = float(np.mean((here >= SOFT_TISSUE[0]) & (here <= SOFT_TISSUE[1])))
    steps = np.abs(np.clip(here, *CLIP)[None] - np.clip(there, *CLIP))
    if border.all() or not border.any():
        return soft
    return soft + float(steps[border].mean() - steps[~border].mean()) / EDGE_SCALE
