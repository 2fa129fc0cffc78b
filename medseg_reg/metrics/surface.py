"""Distances between surfaces: Hausdorff distance, average distance and surface Dice.

    distances = surface_distances(prediction == 1, truth == 1, spacing=(2.5, 0.8, 0.8))
    hausdorff_distance(distances), surface_dice(distances, tolerance=2.0)

**Surface.** The voxels of a mask that have a face neighbour (6 in a volume, 4 in a picture) that
is not of the mask; outside of the array nothing is. An axis of length 1 has no neighbours. A
distance is the Euclidean one between the centres of voxels, in the unit of the spacing. MONAI and
medpy have this surface; DeepMind's surface-distance has another one, of triangles between the
voxels, each weighted by its area, and so other values, by up to a voxel.

**Empty masks.** Where both are empty, the empty policy decides (see `EmptyPolicy`): "one" is the
distance 0 and the surface Dice 1, "zero" the worst value, "nan" is left out. Where one alone is,
the surface Dice is 0 and the missing policy (see `MissingPolicy`) decides about distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from medseg_reg.metrics.overlap import EmptyPolicy, empty_score

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Distances = npt.NDArray[np.float64]

MissingPolicy = Literal["diagonal", "nan"]
"""What a distance is where one mask is empty and the other is not.

"diagonal" is the length of the array's diagonal, the worst that can be; "nan" is left out of
means, so that a network that finds nothing is not told from a good one: count such cases.
"""

# A distance equal to the tolerance is within it, however it is rounded: as a share of the diagonal.
_SLACK = 1e-6


class SurfaceDistances(NamedTuple):
    """Distances of each surface voxel of two masks to the surface of the other one.

    Attributes:
        from_prediction: of the prediction's surface; infinite where the truth is empty.
        from_truth: of the truth's surface; infinite where the prediction is empty.
        diagonal: length of the array's diagonal.
    """

    from_prediction: Distances
    from_truth: Distances
    diagonal: float


def surface(mask: Mask) -> Mask:
    """Return the surface of a mask: its voxels with a face neighbour that is not of the mask.

    Args:
        mask: boolean, of any shape.

    Example:
        >>> surface(np.ones((3, 4), dtype=bool)).astype(int).tolist()
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    """
    inner = mask.copy()
    for axis, length in enumerate(mask.shape):
        if length == 1:
            continue
        moved, still = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        still[1:] &= moved[:-1]
        still[:-1] &= moved[1:]
        still[0] = still[-1] = False
    return mask & ~inner


def surface_distances(
    prediction: Mask, truth: Mask, spacing: Sequence[float] | None = None
) -> SurfaceDistances:
    """Return the distances between the surfaces of two masks.

    The masks are cut to the box that holds both. Distances are taken in float32 (SimpleITK's
    exact Euclidean transform, rounded by less than 1e-6 of the array's diagonal), in about 20
    bytes for each voxel of the box.

    Args:
        prediction: boolean mask of a class, 2-D or 3-D.
        truth: boolean mask of the same shape.
        spacing: distance of neighbours along each axis, in millimetres; 1 where it is left out,
            so that distances are in pixels.

    Raises:
        ValueError: the masks are not boolean, not 2-D or 3-D, or differ in shape, or the spacing
            is not one positive number for each axis.

    Example:
        >>> truth, prediction = np.zeros((2, 8, 8), dtype=bool)
        >>> truth[2:5, 2], prediction[2:5, 4] = True, True
        >>> surface_distances(prediction, truth, spacing=(1.0, 0.5)).from_truth
        array([1., 1., 1.])
    """
    step = _check(prediction, truth, spacing)
    diagonal = math.hypot(*(n * s for n, s in zip(prediction.shape, step, strict=True)))
    # An axis of length 1 has no neighbours, also where the box has one voxel along another axis.
    flat = [length == 1 for length in prediction.shape]
    box = _box(prediction | truth)
    if box is None:
        return SurfaceDistances(np.zeros(0), np.zeros(0), diagonal)
    mine, other = (_surface_in_box(mask[box], flat) for mask in (prediction, truth))
    return SurfaceDistances(_to(mine, other, step), _to(other, mine, step), diagonal)


def pooled(parts: Iterable[SurfaceDistances]) -> SurfaceDistances:
    """Return the distances of several arrays, such as the frames of a video, as those of one.

    The distances of a frame whose other mask is empty stay infinite, and are what the missing
    policy says of that frame.

    Args:
        parts: distances of arrays of one shape.

    Raises:
        ValueError: there are no parts, or their diagonals differ.
    """
    found = list(parts)
    diagonals = {part.diagonal for part in found}
    if len(diagonals) != 1:
        raise ValueError(f"diagonals are {sorted(diagonals)}, expected one: arrays of one shape")
    return SurfaceDistances(
        np.concatenate([part.from_prediction for part in found]),
        np.concatenate([part.from_truth for part in found]),
        diagonals.pop(),
    )


def hausdorff_distance(
    distances: SurfaceDistances,
    percentile: float = 95.0,
    empty: EmptyPolicy = "one",
    missing: MissingPolicy = "diagonal",
) -> float:
    r"""Return the percentile Hausdorff distance: the larger of the two directed percentiles.

    .. math::
        HD_q = \max \Big( P_q \{ d(a, T) : a \in S \}, \; P_q \{ d(b, S) : b \in T \} \Big)

    over the surface S of the prediction and T of the truth; percentiles are interpolated
    linearly (NumPy's and MONAI's convention). 100 gives the Hausdorff distance. medpy takes one
    percentile of both sets together: on surfaces of unequal size it is smaller.

    Source: D. P. Huttenlocher et al., "Comparing images using the Hausdorff distance", IEEE
    TPAMI 1993, doi:10.1109/34.232073 (with ranks in place of the maximum).

    Args:
        distances: as from `surface_distances`.
        percentile: q, 0 to 100.
        empty: what it is where both masks are empty.
        missing: what it is where one of them is.

    Raises:
        ValueError: the percentile is out of range, or a policy is unknown.

    Example:
        >>> one = SurfaceDistances(np.array([0.0, 1.0, 4.0]), np.array([0.0, 1.0]), 9.0)
        >>> hausdorff_distance(one, 50), hausdorff_distance(one, 100)
        (1.0, 4.0)
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile}, expected 0 to 100")
    parts = _known(distances, empty, missing)
    return max((float(np.percentile(part, percentile)) for part in parts), default=math.nan)


def average_surface_distance(
    distances: SurfaceDistances,
    empty: EmptyPolicy = "one",
    missing: MissingPolicy = "diagonal",
) -> float:
    r"""Return the average symmetric surface distance (ASSD): the mean over both surfaces.

    .. math::
        ASSD = \frac{\sum_{a \in S} d(a, T) + \sum_{b \in T} d(b, S)}{|S| + |T|}

    MONAI's `symmetric=True` is the same; medpy's `assd` is the mean of the two directed means.

    Source: T. Heimann et al., "Comparison and evaluation of methods for liver segmentation from
    CT datasets", IEEE TMI 2009, doi:10.1109/TMI.2009.2013851.

    Args:
        distances: as from `surface_distances`.
        empty: what it is where both masks are empty.
        missing: what it is where one of them is.

    Raises:
        ValueError: a policy is unknown.

    Example:
        >>> average_surface_distance(SurfaceDistances(np.array([0.0, 4.0]), np.array([2.0]), 9.0))
        2.0
    """
    parts = _known(distances, empty, missing)
    return float(np.concatenate(parts).mean()) if parts else math.nan


def surface_dice(
    distances: SurfaceDistances, tolerance: float, empty: EmptyPolicy = "one"
) -> float:
    r"""Return the surface Dice (normalized surface Dice, NSD) at a tolerance.

    .. math::
        NSD = \frac{|\{ a \in S : d(a, T) \le \tau \}| + |\{ b \in T : d(b, S) \le \tau \}|}
        {|S| + |T|}

    Where one mask is empty it is 0. MONAI's `use_subvoxels=False` is the same.

    Source: S. Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for
    radiotherapy", JMIR 2021, doi:10.2196/26151, which counts areas of triangles, not voxels.

    Args:
        distances: as from `surface_distances`.
        tolerance: tau, in the unit of the spacing.
        empty: what it is where both masks are empty.

    Raises:
        ValueError: the tolerance is negative or not finite, or the policy is unknown.

    Example:
        >>> one = SurfaceDistances(np.array([0.0, 4.0]), np.array([2.0, math.inf]), 9.0)
        >>> surface_dice(one, tolerance=2.0)
        0.5
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}, expected a finite distance >= 0")
    agreed = empty_score(empty)
    both = np.concatenate(distances[:2])
    if both.size == 0:
        return agreed
    return float((both <= tolerance + _SLACK * distances.diagonal).mean())


def _known(
    distances: SurfaceDistances, empty: EmptyPolicy, missing: MissingPolicy
) -> list[Distances]:
    """Return the distances of each side as the policies say, without sides that have none."""
    _check_policies(empty, missing)
    worst = distances.diagonal if missing == "diagonal" else math.nan
    sides = [np.where(np.isinf(side), worst, side) for side in distances[:2]]
    if not any(side.size for side in sides):
        sides = [np.array([{"one": 0.0, "zero": worst, "nan": math.nan}[empty]])]
    known = [side[~np.isnan(side)] for side in sides]
    return [side for side in known if side.size]


def _check_policies(empty: str, missing: str) -> None:
    for name, value, policy in (("empty", empty, EmptyPolicy), ("missing", missing, MissingPolicy)):
        if value not in get_args(policy):
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(get_args(policy))}")


def _check(prediction: Mask, truth: Mask, spacing: Sequence[float] | None) -> tuple[float, ...]:
    shapes = f"prediction {prediction.shape}, truth {truth.shape}"
    if prediction.shape != truth.shape or truth.ndim not in (2, 3):
        raise ValueError(f"{shapes}: expected equal shapes of two or three axes")
    if prediction.dtype != np.bool_ or truth.dtype != np.bool_:
        raise ValueError(
            f"masks are {prediction.dtype} and {truth.dtype} ({shapes}), expected bool: compare "
            "labels with a class first"
        )
    step = (1.0,) * truth.ndim if spacing is None else tuple(float(s) for s in spacing)
    if len(step) != truth.ndim or not all(0 < s < math.inf for s in step):
        raise ValueError(
            f"spacing is {step}, expected one positive number for each axis of {truth.shape}"
        )
    return step


def _box(mask: Mask) -> tuple[slice, ...] | None:
    """Return the smallest box that holds a mask, or None for an empty one."""
    box = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if used.size == 0:
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def _surface_in_box(mask: Mask, flat: Sequence[bool]) -> Mask:
    """Return the surface of a mask with a margin of one voxel along each axis.

    The margin is what is outside of the box, where neither mask is. An axis of length 1 has none.
    """
    return surface(np.pad(mask, [(0, 0) if one else (1, 1) for one in flat]))


def _to(start: Mask, goal: Mask, step: tuple[float, ...]) -> Distances:
    """Return the distance of each voxel of `start` to the nearest one of `goal`."""
    count = int(np.count_nonzero(start))
    if count == 0 or not goal.any():
        return np.full(count, math.inf)
    if not (start & ~goal).any():
        return np.zeros(count)
    # Takes a third of a second to import, which training need not wait for.
    import SimpleITK

    sitk: Any = SimpleITK  # not all of it is typed
    image = sitk.GetImageFromArray(goal.view(np.uint8))
    image.SetSpacing(step[::-1])
    # Four times as fast as scipy's transform, in a quarter of the memory. It measures to voxels
    # with a neighbour outside of the goal, which all of the goal have, because of the margin.
    field = sitk.SignedMaurerDistanceMap(
        image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True
    )
    found: Distances = np.abs(sitk.GetArrayViewFromImage(field)[start].astype(np.float64))
    found[goal[start]] = 0
    return found
