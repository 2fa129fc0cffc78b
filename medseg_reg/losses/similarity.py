"""SSIM and multi-scale SSIM between probability maps and masks.

Each takes probabilities and masks (B, C, *spatial) and returns one loss for each class. With
ignored pixels, only windows that hold none of them count, at every scale: an image with an
ignored border has the loss of the image cut to its inside, and no ignored pixel is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.metrics.regression import compute_ssim_and_cs
from torch import Tensor
from torch.nn import functional as F

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5

# Exponents of the scales, from the finest; of the paper's observers.
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

# A power of a similarity of 0 or below has no slope, and would leave none to the other scales.
# So below this one its logarithm is continued by the tangent.
LEAST = 0.01


def ssim_window(spatial: Sequence[int]) -> tuple[int, ...]:
    """Return the SSIM window: 11 per axis, or the largest odd size that fits a shorter axis.

    Args:
        spatial: image size in pixels, one number per axis.

    Example:
        >>> ssim_window((512, 10)), ssim_window((1, 2, 3))
        ((11, 9), (1, 1, 3))
    """
    return tuple(min(SSIM_WINDOW, size - 1 + size % 2) for size in spatial)


def ms_ssim_scales(spatial: Sequence[int]) -> tuple[float, ...]:
    """Return the exponents of the scales at which a whole window fits into an image.

    Each scale halves the image. There are at most five, and at least one; their exponents are
    the first of the paper's, divided by their sum.

    Args:
        spatial: image size in pixels, one number per axis.

    Example:
        >>> len(ms_ssim_scales((176, 512))), len(ms_ssim_scales((96, 96))), ms_ssim_scales((21, 9))
        (5, 4, (1.0,))
    """
    count = 1
    while count < len(SCALES) and min(spatial) >> count >= SSIM_WINDOW:
        count += 1
    return tuple(weight / sum(SCALES[:count]) for weight in SCALES[:count])


def ms_ssim_note(spatial: Sequence[int]) -> str:
    """Return what is lost of MS-SSIM where images are too small for all scales, else nothing.

    Args:
        spatial: image size in pixels, one number per axis.

    Example:
        >>> ms_ssim_note((128, 160))
        'ms_ssim takes 4 of 5 scales at 128 x 160: a scale needs 11 pixels, all need 176 per axis'
        >>> ms_ssim_note((64, 16))
        'ms_ssim is plain ssim at 64 x 16: two scales need 22 pixels per axis, all five 176'
        >>> ms_ssim_note((176, 512))
        ''
    """
    count, size = len(ms_ssim_scales(spatial)), " x ".join(map(str, spatial))
    needed = SSIM_WINDOW << (len(SCALES) - 1)
    if count == len(SCALES):
        return ""
    if count == 1:
        return (
            f"ms_ssim is plain ssim at {size}: two scales need {2 * SSIM_WINDOW} pixels per axis, "
            f"all five {needed}"
        )
    return (
        f"ms_ssim takes {count} of {len(SCALES)} scales at {size}: a scale needs {SSIM_WINDOW} "
        f"pixels, all need {needed} per axis"
    )


def ssim_loss(maps: Tensor, masks: Tensor, counted: Tensor | None = None) -> Tensor:
    r"""Return 1 - SSIM of each class (MONAI), the mean over all windows of the batch.

    .. math::
        L_c = 1 - \operatorname{mean} \frac{(2 \mu_p \mu_t + c_1)(2 \sigma_{pt} + c_2)}
        {(\mu_p^2 + \mu_t^2 + c_1)(\sigma_p^2 + \sigma_t^2 + c_2)}

    Gaussian window, 11 pixels per axis, sigma 1.5, c1 = 0.01^2, c2 = 0.03^2 (data range 1),
    windows that lie fully inside the image. An axis under 11 pixels gets the largest odd window
    that fits; at 1 x 1 only the luminance ratio (2pt + c1) / (p^2 + t^2 + c1) is left. SSIM
    hardly pulls where mask and map are both flat: mix it with cross-entropy or Dice. If no
    window is without an ignored pixel, the loss is 0.

    Paper: Z. Wang et al., "Image quality assessment: from error visibility to structural
    similarity", IEEE TIP 2004, doi:10.1109/TIP.2003.819861 (same window and constants).

    Args:
        maps: probabilities, (B, C, *spatial), float32.
        masks: 0 or 1, of the same shape.
        counted: bool, (B, 1, *spatial), where pixels count; None for everywhere.

    Example:
        >>> ssim_loss(torch.zeros(1, 2, 12, 12), torch.zeros(1, 2, 12, 12))
        tensor([0., 0.])
    """
    maps, masks = _without(maps, counted), _without(masks, counted)
    whole, _ = _similarities(maps, masks)
    score, windows = _mean_over_windows(whole, counted, dims=(0, 2))
    return torch.where(windows > 0, 1 - score, 0 * score)


def ms_ssim_loss(maps: Tensor, masks: Tensor, counted: Tensor | None = None) -> Tensor:
    r"""Return 1 - MS-SSIM of each class, the mean over the images of the batch.

    .. math::
        L_c = 1 - l_M^{w_M} \prod_{j=1}^{M} s_j^{w_j}

    with :math:`l_M` and :math:`s_M` taken together in one mean at the coarsest scale, as in the
    paper's own code, the constants and windows of `ssim_loss`, and the scales and exponents of
    `ms_ssim_scales`. A scale halves each axis by the mean over blocks of 2 pixels; an odd last
    pixel is left out. With one scale it is SSIM. Where map and mask contradict each other so much
    that a similarity s is below 0.01, log s is continued by its tangent, for a gradient's sake. A
    scale at which each window holds an ignored pixel leaves the product, an image without a window
    at the finest scale the mean.

    MONAI's `MultiScaleSSIMMetric` has the same value where it can be taken, but it needs 176
    pixels per axis, averages classes before the product, and gives no gradient at all as soon as
    one scale has a similarity of 0 or below.

    Paper: Z. Wang, E. P. Simoncelli, A. C. Bovik, "Multiscale structural similarity for image
    quality assessment", Asilomar 2003, doi:10.1109/ACSSC.2003.1292216.

    Args:
        maps: as of `ssim_loss`.
        masks: as of `ssim_loss`.
        counted: as of `ssim_loss`.
    """
    maps, masks = _without(maps, counted), _without(masks, counted)
    exponents = ms_ssim_scales(maps.shape[2:])
    product = maps.new_ones(maps.shape[:2])
    seen = torch.ones_like(product, dtype=torch.bool)
    for scale, exponent in enumerate(exponents):
        if scale:
            maps, masks = _halved(maps).mean(dim=2), _halved(masks).mean(dim=2)
            counted = None if counted is None else _halved(counted).all(dim=2)
        whole, structure = _similarities(maps, masks)
        similarity = whole if scale == len(exponents) - 1 else structure
        score, windows = _mean_over_windows(similarity, counted, dims=(2,))
        if scale == 0:
            seen = windows > 0
        score = torch.where(windows > 0, score, torch.ones_like(score))
        product = product * (score if exponent == 1 else _power(score, exponent))
    return ((1 - product) * seen).sum(dim=0) / seen.sum(dim=0).clamp_min(1)


def _power(similarity: Tensor, exponent: float) -> Tensor:
    """Return the power of a similarity, continued below `LEAST`, always above 0."""
    logarithm = similarity.clamp_min(LEAST).log() + similarity.clamp_max(LEAST) / LEAST - 1
    return (exponent * logarithm).exp()


def _without(maps: Tensor, counted: Tensor | None) -> Tensor:
    """Set ignored pixels to 0, so that not even a fast convolution spreads a gradient to them."""
    return maps if counted is None else torch.where(counted, maps, torch.zeros_like(maps))


def _similarities(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return SSIM, and its factor without luminance, of each window, (B, C, *windows)."""
    batch, classes, *spatial = maps.shape
    # SSIM treats channels alike, so samples may pose as channels. That keeps the convolutions
    # depthwise, which CUDA runs in true float32, and is faster on the CPU. A lone channel or a
    # channels_last map would go to cuDNN and its default TF32, whose rounding of the second
    # moments is of the size of c2.
    maps, masks = (x.contiguous().reshape(1, -1, *spatial) for x in (maps, masks))
    if maps.shape[1] == 1 and maps.is_cuda:
        maps, masks = (torch.cat([x, x], dim=1) for x in (maps, masks))
    # MONAI builds its window on the default device: a copy, and a sync, at each step otherwise.
    with maps.device:
        found = compute_ssim_and_cs(
            maps,
            masks,
            spatial_dims=len(spatial),
            kernel_size=ssim_window(spatial),
            kernel_sigma=[SSIM_SIGMA] * len(spatial),
        )
    whole, structure = (
        x[:, : batch * classes].reshape(batch, classes, *x.shape[2:]) for x in found
    )
    return whole, structure


def _mean_over_windows(
    values: Tensor, counted: Tensor | None, dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the mean over windows without ignored pixels, and the number of those windows.

    Args:
        values: (B, C, *windows).
        counted: (B, 1, *spatial).
        dims: what the mean is taken over: 0 for the batch, 2 for the windows.
    """
    flat = values.flatten(2)
    if counted is None:
        inside = torch.ones_like(flat[:, :1])
    else:
        pool: Callable[..., Tensor] = F.max_pool2d if counted.ndim == 4 else F.max_pool3d
        inside = 1 - pool((~counted).float(), ssim_window(counted.shape[2:]), 1).flatten(2)
        flat = flat * inside
    windows = inside.sum(dim=tuple(dims))
    return flat.sum(dim=tuple(dims)) / windows.clamp_min(1), windows


def _halved(maps: Tensor) -> Tensor:
    """Return the blocks of 2 pixels per axis, (B, C, pixels of a block, *spatial / 2)."""
    for axis in range(2, maps.ndim):
        maps = maps.narrow(axis, 0, maps.shape[axis] // 2 * 2)
    corners = maps.unsqueeze(2)
    for axis in range(3, corners.ndim):
        before, after = corners.shape[:axis], corners.shape[axis + 1 :]
        even, odd = corners.reshape(*before, -1, 2, *after).unbind(axis + 1)
        corners = torch.cat([even, odd], dim=2)
    return corners
