"""Augmentation of whole batches by torch, where the slices lie: the same transforms as on the CPU.

What is drawn for a slice (whether a transform is applied, its angle, its factor, ...) is drawn on
the CPU by albumentations itself, by the seed of the slice; what it does to the pixels is computed
by torch, for all slices of a batch at once. So a slice is the one that `Augmentation` gives,
within the error of interpolation. Two things are drawn by torch instead, where the pixels are,
with the same distribution: the noise of GaussNoise and the displacements of ElasticTransform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from medseg_reg.data import warp
from medseg_reg.data.augment import Augmentation

Draw = dict[str, Any]
Step = Callable[[Tensor, Tensor, list[Draw], Any], tuple[Tensor, Tensor]]

_WARPS = ("Affine", "Rotate", "ElasticTransform", "GridDistortion", "OpticalDistortion")


def unsupported(transforms: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    """Return which transform of a chain cannot be computed by torch and why, or None.

    >>> unsupported([("Rotate", {"limit": 20})])
    >>> unsupported([("Rotate", {"border_mode": 3})])
    'Rotate with border_mode 3'
    """
    for name, arguments in transforms:
        known: dict[str, Callable[[Any], bool]] = {}
        if name in _WARPS:
            known = {
                "interpolation": warp.MODES.__contains__,
                "border_mode": warp.BORDERS.__contains__,
            }
        elif name == "CoarseDropout":
            known = {"fill": lambda fill: not isinstance(fill, str)}
        elif name == "GaussNoise":
            known = {"noise_scale_factor": lambda factor: factor == 1}
        elif name == "RandomBrightnessContrast" and not arguments.get("brightness_by_max", True):
            known = {"ensure_safe_range": lambda safe: not safe}
        for key, fine in known.items():
            if key in arguments and not fine(arguments[key]):
                return f"{name} with {key} {arguments[key]!r}"
    return None


class DeviceAugmentation:
    """A chain of transforms on batches, on the device where they lie.

    Args:
        transforms: pairs of a transform's name and its arguments, as of `Augmentation`, all of
            which `unsupported` lets through.
    """

    def __init__(self, transforms: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self._drawing = Augmentation(transforms)
        self._steps = [STEPS[name] for name, _ in transforms]

    def __call__(
        self, images: Tensor, masks: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Transform images (B, C, H, W) float32 in [0, 1] and masks (B, H, W) alike."""
        if not self._steps:
            return images, masks
        shape = (*images.shape[2:], images.shape[1])
        drawn = [self.draw(shape, seed) for seed in seeds]
        for number, step in enumerate(self._steps):
            chosen = [index for index, draws in enumerate(drawn) if draws[number] is not None]
            draws = [draw for row in drawn if (draw := row[number]) is not None]
            transform = self._drawing.chain.transforms[number]
            if len(chosen) == len(images):
                images, masks = step(images, masks, draws, transform)
            elif chosen:
                index = warp.bring(torch.tensor(chosen), images.device)
                changed = step(images[index], masks[index], draws, transform)
                images = images.index_copy(0, index, changed[0])
                masks = masks.index_copy(0, index, changed[1])
        return images.clamp(0.0, 1.0), masks

    def draw(self, shape: tuple[int, ...], seed: int) -> list[Draw | None]:
        """Return what a slice of shape (H, W, C) draws for each transform; None if not applied."""
        chain = self._drawing.seeded(seed)
        chain.py_random.random()  # the chain's own, whether to do anything
        # Of an image the transforms read shape and type; one reads its mean, see `_brightness`.
        data = {"image": np.broadcast_to(np.float32(1), shape)}
        drawn: list[Draw | None] = []
        for transform in chain.transforms:
            if not transform.should_apply():
                drawn.append(None)
                continue
            name = type(transform).__name__
            if name in _OWN_DRAWS:
                drawn.append(_OWN_DRAWS[name](transform))
                continue
            draw = transform.update_transform_params(transform.get_params(), data)
            drawn.append({**draw, **transform.get_params_dependent_on_data(draw, data)})
        return drawn


# Draws whose images would be computed on the CPU by the library


def _noise_draw(transform: Any) -> Draw:
    sigma = transform.py_random.uniform(*transform.std_range)
    mean = transform.py_random.uniform(*transform.mean_range)
    seed = int(transform.random_generator.integers(0, 2**16))
    return {"sigma": sigma, "mean": mean, "seed": seed}


def _elastic_draw(transform: Any) -> Draw:
    return {"seed": int(transform.random_generator.integers(0, 2**31))}


def _optical_draw(transform: Any) -> Draw:
    return {"k": transform.py_random.uniform(*transform.distort_limit)}


_OWN_DRAWS: dict[str, Callable[[Any], Draw]] = {
    "ElasticTransform": _elastic_draw,
    "GaussNoise": _noise_draw,
    "OpticalDistortion": _optical_draw,
}


# Steps


def _numbers(draws: list[Draw], key: str, like: Tensor) -> Tensor:
    """Return a number of each draw as (B, 1, 1, 1)."""
    values = torch.tensor([float(draw[key]) for draw in draws], dtype=torch.float32)
    return warp.bring(values, like.device)[:, None, None, None]


def _fill(value: Any, channels: int, everywhere: bool, like: Tensor) -> Tensor:
    """Return the fill of each channel; of a single number OpenCV takes it for the first alone."""
    if isinstance(value, (int, float)):
        value = [value] * channels if everywhere else [value] + [0] * (channels - 1)
    return warp.bring(torch.tensor([float(v) for v in value][:channels]), like.device)


def _remapped(
    images: Tensor, masks: Tensor, x: Tensor, y: Tensor, transform: Any, everywhere: bool = False
) -> tuple[Tensor, Tensor]:
    shape = (len(images), *images.shape[2:])
    x, y = x.expand(shape), y.expand(shape)
    fill = _fill(transform.fill, images.shape[1], everywhere, images)
    mode, border = warp.MODES[transform.interpolation], transform.border_mode
    return (
        warp.remap(images, x, y, mode, border, fill),
        warp.remap_labels(masks, x, y, border),
    )


def _affine(
    images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
) -> tuple[Tensor, Tensor]:
    # Inverted in float64: the positions are then right to a thousandth of a pixel.
    inverse = np.linalg.inv(np.stack([draw["matrix"] for draw in draws]))[:, :2]
    grid = warp.bring(torch.from_numpy(inverse.astype(np.float32)), images.device)
    x, y = warp.affine_grid(grid, *images.shape[2:])
    return _remapped(images, masks, x, y, transform, isinstance(transform.fill, float))


def _grid(
    images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
) -> tuple[Tensor, Tensor]:
    # Its columns are the same in every row, and its rows in every column.
    lines = (
        np.stack([draw["map_x"][0] for draw in draws]),
        np.stack([draw["map_y"][:, 0] for draw in draws]),
    )
    x, y = (warp.bring(torch.from_numpy(v.astype(np.float32)), images.device) for v in lines)
    return _remapped(images, masks, x[:, None], y[..., None], transform)


def _optical(
    images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
) -> tuple[Tensor, Tensor]:
    height, width = images.shape[2:]
    k = _numbers(draws, "k", images)[..., 0]
    camera = transform.mode == "camera"
    # The camera of the distorted slice looks at its middle, half a pixel from that of the result.
    shift = 0.5 if camera else 0.0
    x, y = warp.pixel_grid(height, width, images.device)
    x, y = x - (width / 2 - shift), y - (height / 2 - shift)
    if camera:  # in units of the focal lengths, which are the sides of the slice
        square = (x / width) ** 2 + (y / height) ** 2
        factor = 1 + k * square + k * square**2
    else:
        factor = 1 + k * (x * x + y * y) / ((height / 2) ** 2 + (width / 2) ** 2)
    return _remapped(images, masks, x * factor + width / 2, y * factor + height / 2, transform)


def _elastic(
    images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
) -> tuple[Tensor, Tensor]:
    height, width = images.shape[2:]
    x, y = warp.pixel_grid(height, width, images.device)
    fields = displacements(draws, height, width, transform, images.device)
    return _remapped(images, masks, x + fields[:, 0], y + fields[:, -1], transform)


def displacements(
    draws: list[Draw], height: int, width: int, transform: Any, device: torch.device
) -> Tensor:
    """Return the displacements of ElasticTransform: (B, 2, H, W), or (B, 1, H, W) for both axes."""
    count = 1 if transform.same_dxdy else 2
    noise = torch.empty(len(draws), count, height, width, device=device)
    for field, draw in zip(noise, draws, strict=True):
        generator = torch.Generator(device).manual_seed(draw["seed"])
        if transform.noise_distribution == "gaussian":
            field.normal_(generator=generator)
        else:
            field.uniform_(-1, 1, generator=generator)
    if transform.noise_distribution == "gaussian":
        noise /= noise.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
    # OpenCV takes a kernel of 4 deviations to either side of a float image. The library smooths
    # both fields as one image, one above the other.
    size = 17 if transform.approximate else round(transform.sigma * 8 + 1) | 1
    kernel = torch.from_numpy(cv2.getGaussianKernel(size, transform.sigma, cv2.CV_32F).T)
    stacked = noise.view(len(draws), 1, count * height, width)
    smooth: Tensor = warp.filter_separably(stacked, warp.bring(kernel, device), warp.REPLICATE)
    alpha: float = transform.alpha
    return smooth.view_as(noise) * alpha


def _symmetry(key: str, turned: Callable[[Any, Tensor], Tensor]) -> Step:
    """Return a step that turns or mirrors slices, those alike together."""

    def step(
        images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
    ) -> tuple[Tensor, Tensor]:
        kinds = [draw.get(key) for draw in draws]
        if len(set(kinds)) == 1:
            return turned(kinds[0], images), turned(kinds[0], masks)
        images, masks = images.clone(), masks.clone()
        for kind in dict.fromkeys(kinds):
            index = torch.tensor([i for i, k in enumerate(kinds) if k == kind])
            index = warp.bring(index, images.device)
            images[index], masks[index] = turned(kind, images[index]), turned(kind, masks[index])
        return images, masks

    return step


def _quarters(factor: Any, x: Tensor) -> Tensor:
    return torch.rot90(x, int(factor), (-2, -1))


_GROUP: dict[str, Callable[[Tensor], Tensor]] = {
    "e": lambda x: x,
    "r90": lambda x: torch.rot90(x, 1, (-2, -1)),
    "r180": lambda x: torch.rot90(x, 2, (-2, -1)),
    "r270": lambda x: torch.rot90(x, 3, (-2, -1)),
    "v": lambda x: x.flip(-2),
    "hvt": lambda x: torch.rot90(x, 2, (-2, -1)).mT,
    "h": lambda x: x.flip(-1),
    "t": lambda x: x.mT,
}


def _brightness(
    images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
) -> tuple[Tensor, Tensor]:
    alpha, beta = (_numbers(draws, key, images) for key in ("alpha", "beta"))
    if not transform.brightness_by_max:
        beta = beta * images.mean((1, 2, 3), keepdim=True)
    return (images * alpha + beta).clamp(0.0, 1.0), masks


def _gamma(
    images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
) -> tuple[Tensor, Tensor]:
    return images.clamp(min=0.0) ** _numbers(draws, "gamma", images), masks


def _noise(
    images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
) -> tuple[Tensor, Tensor]:
    channels = images.shape[1] if transform.per_channel else 1
    noise = torch.empty(len(draws), channels, *images.shape[2:], device=images.device)
    for field, draw in zip(noise, draws, strict=True):
        field.normal_(generator=torch.Generator(images.device).manual_seed(draw["seed"]))
    noise = noise * _numbers(draws, "sigma", images) + _numbers(draws, "mean", images)
    return (images + noise).clamp(0.0, 1.0), masks


def _blur(
    images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
) -> tuple[Tensor, Tensor]:
    longest = max(len(draw["kernel"]) for draw in draws)
    kernels = np.zeros((len(draws), longest), np.float32)
    for row, draw in zip(kernels, draws, strict=True):
        before = (longest - len(draw["kernel"])) // 2
        row[before : before + len(draw["kernel"])] = draw["kernel"]
    kernel = warp.bring(torch.from_numpy(kernels), images.device)
    return warp.filter_separably(images, kernel, warp.REFLECT_101).clamp(0.0, 1.0), masks


def _holes(
    images: Tensor, masks: Tensor, draws: list[Draw], transform: Any
) -> tuple[Tensor, Tensor]:
    height, width = images.shape[2:]
    most = max(len(draw["holes"]) for draw in draws)
    holes = np.zeros((len(draws), most, 4), np.float32)
    for row, draw in zip(holes, draws, strict=True):
        row[: len(draw["holes"])] = draw["holes"]
    x0, y0, x1, y1 = warp.bring(torch.from_numpy(holes), images.device).unbind(-1)
    x, y = warp.pixel_grid(height, width, images.device)
    rows = (y >= y0[:, None]) & (y < y1[:, None])  # (B, H, holes)
    columns = (x >= x0[..., None]) & (x < x1[..., None])  # (B, holes, W)
    inside = (rows.float() @ columns.float()) > 0
    fill = _fill(transform.fill, images.shape[1], True, images)
    images = torch.where(inside[:, None], fill[:, None, None], images)
    return images, masks if transform.fill_mask is None else masks.masked_fill(inside, 0)


STEPS: dict[str, Step] = {
    "Affine": _affine,
    "CoarseDropout": _holes,
    "ElasticTransform": _elastic,
    "GaussNoise": _noise,
    "GaussianBlur": _blur,
    "GridDistortion": _grid,
    "HorizontalFlip": _symmetry("", lambda _, x: x.flip(-1)),
    "OpticalDistortion": _optical,
    "RandomBrightnessContrast": _brightness,
    "RandomGamma": _gamma,
    "RandomRotate90": _symmetry("factor", _quarters),
    "Rotate": _affine,
    "SquareSymmetry": _symmetry("group_element", lambda kind, x: _GROUP[str(kind)](x)),
    "Transpose": _symmetry("", lambda _, x: x.mT),
    "VerticalFlip": _symmetry("", lambda _, x: x.flip(-2)),
}
