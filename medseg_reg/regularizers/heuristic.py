"""Heuristic Dropout: filter the channels that carry little or only noise.

`heuristic_scores` gives the statistics, `heuristic_dropout` the rule, `HeuristicDropout` the
module. The published algorithm compares the map with every histogram level at once, an 11-fold
tensor; here each level is one comparison with a threshold (`kernels/histogram.py`), and channels
whose variance alone rules them out are not compared at all.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_choice,
    check_count,
    check_map,
    check_number,
    check_rate,
    register,
)
from medseg_reg.regularizers.kernels import loops
from medseg_reg.regularizers.kernels.blocks import BLOCK, worth_splitting
from medseg_reg.regularizers.kernels.histogram import (
    EPSILON,
    deviation_sums,
    level_sums,
    level_thresholds,
    scores_of,
)
from medseg_reg.regularizers.kernels.planes import filter_channels

__all__ = ["HeuristicDropout", "HeuristicScores", "heuristic_dropout", "heuristic_scores"]

_MAX_BINS = 1000  # beyond it the outermost levels hold less than one float32 step of tanh
_MASKS = ("laplace", "zero")
_SELECTIONS = ("top", "sampled")


class HeuristicScores(NamedTuple):
    """Entropy (nats), unbiased variance, and their sum ``entropy + k / (variance + 1e-7)``.

    Each of shape (B, C), float32.
    """

    entropy: Tensor
    variance: Tensor
    score: Tensor


def heuristic_scores(
    x: Tensor, k: float = 2.0, bins: int = 10, *, signed: bool = False
) -> HeuristicScores:
    """Scores every channel of every sample: high for noise, low variance and dead channels.

    score = H + k / (V + 1e-7), where V is the unbiased variance of the channel and
    H = -sum_l p_l ln p_l the entropy of its levels l = round(bins * tanh(x)). Levels 0..bins are
    counted; negative ones only if ``signed`` (then -bins..bins), since the method expects
    rectified maps. Rounding is to the nearest even, as in the published code.

    Args:
        x: feature map.
        k: weight of the inverse variance, at least 0.
        bins: number of levels above zero.
        signed: count the negative levels too, for maps that were not rectified.

    Shapes:
        x (B, C, *spatial) with one to three spatial axes; each result (B, C).

    Raises:
        ValueError: a bad parameter, or an input of another shape or kind.

    Differs from the published code in degenerate cases alone: a channel without any counted value
    has entropy 0 (there: an exception), a one-pixel channel has variance 0 (there: NaN).

    Example:
        >>> import torch
        >>> x = torch.arange(16.0).reshape(1, 1, 4, 4) / 10
        >>> [round(t.item(), 4) for t in heuristic_scores(x)]
        [2.1873, 0.2267, 11.0108]
    """
    check_map(x, "heuristic_scores")
    k = check_number(k, "k", "heuristic_scores", 0.0)
    bins = check_count(bins, "bins", "heuristic_scores", _MAX_BINS)
    with torch.no_grad():
        return _scores(x.detach(), k, level_thresholds(bins, signed), signed)


def heuristic_dropout(
    x: Tensor,
    p: float = 0.1,
    k: float = 2.0,
    bins: int = 10,
    mask: Literal["laplace", "zero"] = "laplace",
    training: bool = True,
    *,
    selection: Literal["top", "sampled"] = "top",
    signed: bool = False,
    faithful: bool = False,
) -> Tensor:
    """Filters the p*C channels of highest score; see `HeuristicDropout` for everything.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 2, 4, 4)
        >>> x[0, 0, 1:3, 1:3] = 2
        >>> x[0, 1] = torch.arange(16.0).reshape(4, 4)
        >>> heuristic_dropout(x, p=0.5)[0, 0]
        tensor([[-2., -4., -4., -2.],
                [-4., 10., 10., -4.],
                [-4., 10., 10., -4.],
                [-2., -4., -4., -2.]])
    """
    p = check_rate(p, "heuristic_dropout")
    _check_modes(mask, selection, signed, faithful)
    if not training or p == 0.0:
        return x
    check_map(x, "heuristic_dropout")
    k = check_number(k, "k", "heuristic_dropout", 0.0)
    thresholds = level_thresholds(check_count(bins, "bins", "heuristic_dropout", _MAX_BINS), signed)
    wanted = _wanted(x.shape[1], p, faithful, keep_one=mask == "zero")
    most = _ceil(wanted, x.shape[1])
    if most == 0 or x.shape[0] == 0:
        return x
    with torch.no_grad():
        if selection == "sampled":
            score = _perturb(_scores(x.detach(), k, thresholds, signed).score)
        else:
            score = _top_scores(x.detach(), k, thresholds, signed, most)
        index, chosen = _pick(score, wanted, most)
    return filter_channels(x, index, chosen, zero=mask == "zero")


@register("heuristic_dropout")
class HeuristicDropout(Regularizer):
    """Replaces the channels of highest entropy and lowest variance by their Laplacian.

    For every sample, the p*C channels with the highest score
    m = H + k / (V + 1e-7) (see `heuristic_scores`) become a[c] * K, a depth-wise convolution with
    the 3^n Laplacian K (3^n - 1 in the centre, -1 around, zero padding). The other channels stay
    as they are; nothing is rescaled. Place it after an activation, before the next convolution.

    "Drop" is the paper's word: the Laplacian sharpens. It turns a constant channel into its
    border, and multiplies white noise by sqrt(72) in two dimensions. ``mask="zero"`` drops in
    the usual sense. Dead channels score highest, and filtering them changes nothing, so
    `measured_rate` may lie below p in a trained network: a finding, not an error.

    The choice does not depend on chance, so that MC-dropout sees one and the same network
    (``stochastic`` is False); ``selection="sampled"`` draws the channels instead, without
    replacement, with weights exp(z), z the logarithm of the score standardised over the channels
    of the sample (Gumbel top-k). The logarithm keeps one dead channel, whose score is 2e7, from
    flattening all others.

    Args:
        p: share of channels to filter, in [0, 1).
        k: weight of the inverse variance. The paper studies 0.1 to 10 and its table used 2.
        bins: histogram levels above zero.
        mask: "laplace" (published) or "zero". The latter never takes a sample's last channel, so
            its rate is below p where p*C > C - 1, in particular 0 for a single channel.
        selection: "top" (published) or "sampled".
        signed: count negative levels too; for maps that were not rectified.
        faithful: filter exactly Python's round(p*C) channels in every sample, as published: none
            at all for C <= 5 at p = 0.1. By default p*C is rounded up or down at random for each
            sample, with mean p*C, so that the rate is p for any number of channels.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: a bad parameter, ``faithful`` together with what was not published
            (``selection="sampled"``, ``signed``), or an input of another shape or kind.

    Paper:
        D. Shi, R. Liu, L. Tao, C. Yuan, "Heuristic Dropout: An Efficient Regularization Method
        for Medical Image Segmentation Models", ICASSP 2022, pp. 1101-1105, IEEE 9747409.
        The published code raises an exception on a channel without values above -0.05 and on
        NaN; here neither fails, and channels with NaN or infinity are filtered last, so that a
        loss scaler still sees them. One and three spatial axes are an extension.

    Example:
        >>> import torch
        >>> layer = HeuristicDropout(p=0.25)
        >>> x = torch.rand(2, 8, 16, 16)
        >>> layer.measured_rate(x, layer(x))
        0.25
    """

    stochastic = False
    unit = "channel"
    paper = "Shi et al., ICASSP 2022"

    def __init__(
        self,
        p: float = 0.1,
        k: float = 2.0,
        bins: int = 10,
        mask: Literal["laplace", "zero"] = "laplace",
        selection: Literal["top", "sampled"] = "top",
        signed: bool = False,
        faithful: bool = False,
    ) -> None:
        super().__init__(p)
        _check_modes(mask, selection, signed, faithful)
        self.k = check_number(k, "k", type(self).__name__, 0.0)
        self.bins = check_count(bins, "bins", type(self).__name__, _MAX_BINS)
        self.mask = mask
        self.selection = selection
        self.signed = bool(signed)
        self.faithful = bool(faithful)
        self.stochastic = selection == "sampled"
        level_thresholds(self.bins, self.signed)  # fills the table, so that compiling need not

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `heuristic_dropout`."""
        return heuristic_dropout(
            x,
            self.p,
            self.k,
            self.bins,
            self.mask,
            selection=self.selection,
            signed=self.signed,
            faithful=self.faithful,
        )

    def measured_rate(self, x: Tensor, y: Tensor) -> float:
        """The share of channels that one training pass ``x -> y`` altered."""
        same = (x == y) | (x.isnan() & y.isnan())
        return (~same).flatten(2).any(-1).float().mean().item()


def _check_modes(mask: str, selection: str, signed: bool, faithful: bool) -> None:
    check_choice(mask, "mask of heuristic_dropout", _MASKS)
    check_choice(selection, "selection of heuristic_dropout", _SELECTIONS)
    if faithful and (selection != "top" or signed):
        raise ValueError(
            "heuristic_dropout: faithful=True is the published rule, which takes the top channels "
            f"of unsigned levels; got selection={selection!r}, signed={signed}. "
            "Use faithful=False, or selection='top' and signed=False."
        )


def _scores(x: Tensor, k: float, thresholds: tuple[float, ...], signed: bool) -> HeuristicScores:
    """Scores a detached map."""
    sums = level_sums(x, thresholds)
    return HeuristicScores(*scores_of(sums, math.prod(x.shape[2:]), k, signed))


def _top_scores(
    x: Tensor, k: float, thresholds: tuple[float, ...], signed: bool, most: int
) -> Tensor:
    """The scores of a detached map, exact for each channel that may be among the ``most`` highest.

    The others are -inf. A score lies between k / V and k / V plus the logarithm of the number of
    levels. On CPU the variances are taken first, and a channel whose upper bound is below
    ``most`` lower ones is not compared with the levels.
    """
    compiled = loops.top_scores(x, thresholds, k, signed, most)
    if compiled is not None:
        return compiled
    if not (worth_splitting(x) and x.is_contiguous()):
        return _finite(_scores(x, k, thresholds, signed).score)
    pixels = math.prod(x.shape[2:])
    least = k / (deviation_sums(x) / max(pixels - 1, 1) + EPSILON)
    least = torch.where(least.isfinite(), least, -math.inf)
    bar = least.topk(most, dim=1).values[:, -1:]
    # more than any entropy, and than the rounding of the variances
    possible = least * 1.0001 + math.log(len(thresholds) + 1) + 1e-3 >= bar
    number = possible.flatten().nonzero()[:, 0]
    if 2 * len(number) > possible.numel():
        return _finite(_scores(x, k, thresholds, signed).score)
    score, planes = torch.full_like(least, -math.inf), x.flatten(0, 1)
    for part in torch.split(number, max(1, BLOCK // pixels)):
        few = _scores(planes.index_select(0, part)[None], k, thresholds, signed).score[0]
        score.view(-1)[part] = few
    return _finite(score)


def _wanted(channels: int, p: float, faithful: bool, keep_one: bool) -> float:
    """The mean number of channels to filter in a sample."""
    wanted = p * channels
    if faithful or abs(wanted - round(wanted)) < 1e-9:  # .1 * 30 is 3.0000000000000004
        wanted = float(round(wanted))
    return min(wanted, float(channels - 1 if keep_one else channels))


def _pick(score: Tensor, wanted: float, most: int) -> tuple[Tensor, Tensor]:
    """Channel indices (B, most) and which of them count (B, most).

    All samples get the same static number; where fewer are wanted the last one does not count.
    """
    index = score.topk(most, dim=1).indices
    chosen = torch.ones_like(index, dtype=torch.bool)
    if wanted < most:
        share = wanted - (most - 1)
        chosen[:, -1] = torch.rand(len(score), device=score.device) < share
    return index, chosen


def _finite(score: Tensor) -> Tensor:
    """Channels with NaN or infinity last."""
    return torch.where(score.isfinite(), score, -math.inf)


def _ceil(value: float, limit: int) -> int:
    """Rounds up, to a plain int: a symbolic one, from a scheduled p, would stop the compiler."""
    if torch.compiler.is_compiling():
        return next(n for n in range(limit + 1) if n >= value)
    return math.ceil(value)


def _perturb(score: Tensor) -> Tensor:
    """Standardised log-scores plus Gumbel noise; -inf (not finite before) stays -inf."""
    valid = score.isfinite()
    log = score.clamp(min=EPSILON).log()
    n = valid.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(valid, log, 0.0)
    centred = torch.where(valid, log - centred.sum(1, keepdim=True) / n, 0.0)
    spread = (centred.square().sum(1, keepdim=True) / n).sqrt()
    # the smallest positive float32 keeps log(0) away from both logarithms
    uniform = torch.rand_like(score).clamp(min=1e-30)
    gumbel = -(-uniform.log()).clamp(min=1e-30).log()
    return torch.where(valid, centred / (spread + EPSILON) + gumbel, -math.inf)
