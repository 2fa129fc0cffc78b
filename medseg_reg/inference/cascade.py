"""A cheap network first, and a finer one only where that is not sure (as in DVT)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from medseg_reg.engine.coarse import takes_in
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.confidence import BAND, band_of, confidence
from medseg_reg.inference.ensemble import (
    Ensemble,
    Known,
    LoadedRuns,
    Way,
    check_agree,
    load_runs,
)
from medseg_reg.inference.predictor import Case, Predictor
from medseg_reg.inference.slices import Slices
from medseg_reg.inference.uncertainty import Average
from medseg_reg.io.dicom_seg import Algorithm
from medseg_reg.networks.build import probabilities
from medseg_reg.networks.reuse import Coarse, coarse_of
from medseg_reg.networks.summary import summarize

# Numbers of inputs (C, H, W) that networks computed.
Inputs = Counter[tuple[nn.Module, tuple[int, ...]]]


class Cascade(Ensemble):
    """Predicts by a first ensemble, and by a finer one where the first is not sure.

    A slice keeps the labels of the first where its `confidence` is above the threshold; the others
    go on. Where the finer networks slide a window, each window is decided by itself, so that one
    hard boundary does not send a whole slice on: windows of which the first is sure get its
    probabilities, and overlap with those of the finer network as windows do.

    Args:
        first: the cheap networks.
        fine: the finer networks; of equal classes, channels and intensities.
        threshold: in [0, 1]; at 0 the first alone decides, at 1 the finer ones alone.

    Attributes:
        seen: slices or windows so far, once for each finer network.
        early: those of them that stayed with the first.

    Raises:
        MedsegError: the threshold is out of range.

    Paper:
        The early exit of Y. Wang et al., "Not All Images are Worth 16x16 Words: Dynamic
        Transformers for Efficient Image Recognition", NeurIPS 2021, arXiv 2105.15075. There one
        network of three stages exits for a whole image, and later stages read the tokens and the
        attention of earlier ones. Here the networks are trained one by one, slices or windows exit,
        and what is used again is the answer of the first.

    Example:
        >>> import numpy as np
        >>> from torch import nn
        >>> from medseg_reg.data.preprocessing import ImageSpec
        >>> coarse, fine = (
        ...     Ensemble([Predictor(network, ImageSpec(), 1, device="cpu")], ("background", "box"))
        ...     for network in (nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 3, padding=1))
        ... )
        >>> cascade = Cascade(coarse, fine, threshold=0.0)
        >>> [part.labels.shape for part in cascade.parts(np.zeros((3, 8, 8), np.uint8), "case")]
        [(3, 8, 8)]
        >>> cascade.share_early, round(cascade.relative_cost, 4)  # 1 tap in place of 9
        (1.0, 0.1111)
    """

    def __init__(self, first: Ensemble, fine: Ensemble, threshold: float) -> None:
        super().__init__(fine.predictors, fine.classes)
        if not 0 <= threshold <= 1:
            raise MedsegError(
                f"--confidence {threshold:g}: expected a number from 0 (the first network alone) "
                "to 1 (the finer one alone)."
            )
        self.first, self.threshold = first, threshold
        self.batch_size = min(self.batch_size, first.batch_size)
        self.seen = self.early = 0
        self._band = BAND
        # Inputs by network and shape: those that were computed, and those without a first network.
        self._computed: Inputs = Counter()
        self._without: Inputs = Counter()

    @property
    def share_early(self) -> float:
        """The share of slices or windows that stayed with the first network."""
        return self.early / self.seen if self.seen else 0.0

    @property
    def relative_cost(self) -> float:
        """Multiply-adds of what was computed, over those of the finer networks everywhere.

        Above 1 where the first network is asked for little.
        """
        return _multiply_adds(self._computed) / max(1, _multiply_adds(self._without))

    def cases(self, images: Slices, name: str) -> list[Case]:
        """Return a case as each network sees it, those of the first ensemble first."""
        cases = self.first.cases(images, name)
        return [*cases, *(one.case(images, name, cases[0].limits) for one in self.predictors)]

    def votes_of(
        self, cases: Sequence[Case], slices: int, maps: bool
    ) -> Iterator[tuple[int, Average]]:
        """Yield what the finer networks say, or the first one where it is sure."""
        ahead, after = cases[: len(self.first.predictors)], cases[len(self.first.predictors) :]
        self._band = max(band_of(case.fit) for case in ahead)
        for start in range(0, slices, self.batch_size):
            stop = min(start + self.batch_size, slices)
            first, votes = Average(maps=False), Average(maps)
            with torch.inference_mode():
                for case in ahead:
                    first.add(self._predict(case, case.batch(start, stop)))
                known = first.mean()
                for case in after:
                    slide = case.predictor.passes.window is not None
                    votes.add((self._windows if slide else self._slices)(case, known, start, stop))
            yield start, votes

    def _slices(self, case: Case, known: Tensor, start: int, stop: int) -> Tensor:
        batch = case.batch(start, stop)
        go_on = self._decide(known)
        mirrored = len(case.predictor.passes.mirrored)
        self._without[case.predictor.network, tuple(batch.shape[1:])] += len(batch) * mirrored
        if not go_on.any():
            return known
        found = known.clone()
        found[go_on] = self._predict(case, batch[go_on])
        return found

    def _windows(self, case: Case, known: Tensor, start: int, stop: int) -> Tensor:
        one, batch = case.predictor, case.batch(start, stop)
        channels = batch.shape[1]
        network = self._counting(one)

        def decide(windows: Tensor) -> Tensor:
            images, before = windows[:, :channels], windows[:, channels:]
            self._without[one.network, tuple(images.shape[1:])] += len(images)
            go_on = self._decide(before)
            if not go_on.any():
                return before
            found = before.clone()
            found[go_on] = probabilities(network(images[go_on]))
            return found

        # As channels, so that they are cut, padded and mirrored as the images are.
        both = torch.cat([batch, known.to(batch.dtype)], dim=1)
        return one.passes.probabilities(decide, both, one.batch_size, activation=lambda p: p)

    def _predict(self, case: Case, batch: Tensor) -> Tensor:
        one = case.predictor
        found = one.passes.probabilities(self._counting(one), batch, one.batch_size)
        return case.fit.undo(found)

    def _counting(self, one: Predictor) -> Callable[[Tensor], Tensor]:
        """Return the network, which counts its inputs."""

        def network(images: Tensor) -> Tensor:
            self._computed[one.network, tuple(images.shape[1:])] += len(images)
            logits: Tensor = one.network(images)
            return logits

        return network

    def _decide(self, known: Tensor) -> Tensor:
        """Return which slices or windows go on (B,), by probabilities (B, K, H, W)."""
        # Above, not equal: probabilities round to 1, and at the threshold 1 none exits.
        go_on = confidence(known, self._band) <= self.threshold
        self.seen += len(go_on)
        self.early += len(go_on) - int(go_on.sum())
        return go_on.to(known.device)

    def summary(self) -> str:
        """Return how much was left to the first network, and what it saved, for a person."""
        sliding = any(one.passes.window is not None for one in self.predictors)
        return (
            f"the first network was sure of {self.share_early:.1%} of the "
            f"{'windows' if sliding else 'slices'}; both together took {self.relative_cost:.1%} of "
            "the multiply-adds of the finer one alone"
        )


class EarlyExit(Cascade):
    """A cascade whose finer networks take in what the first one says: both are one network.

    The first network sees what is prepared for the finer one, as in the training, once. Where it is
    not sure, its answer is handed on, so that threshold 1 gives exactly what the finer network
    gives alone, at its cost. A window is decided by itself, and so is each mirrored pass.

    Args:
        fine: networks with a `Coarse` of one coarse run.
        threshold: as of `Cascade`.
    """

    def __init__(self, fine: Ensemble, threshold: float) -> None:
        coarse = [coarse_predictor(one) for one in fine.predictors]
        super().__init__(Ensemble(coarse, fine.classes), fine, threshold)

    def cases(self, images: Slices, name: str) -> list[Case]:
        """Return a case as each finer network sees it."""
        return Ensemble.cases(self, images, name)

    def votes_of(
        self, cases: Sequence[Case], slices: int, maps: bool
    ) -> Iterator[tuple[int, Average]]:
        """Yield what the networks say, at their ends or where they exit."""
        for start in range(0, slices, self.batch_size):
            stop, votes = min(start + self.batch_size, slices), Average(maps)
            for case in cases:
                with torch.inference_mode():
                    votes.add(self._both(case, case.batch(start, stop)))
            yield start, votes

    def _both(self, case: Case, batch: Tensor) -> Tensor:
        one, coarse = case.predictor, _coarse_in(case.predictor)
        slides = one.passes.window is not None
        self._band = BAND if slides else band_of(case.fit)

        def decide(images: Tensor) -> Tensor:
            shape = tuple(images.shape[1:])
            self._without[one.network, shape] += len(images)
            self._computed[coarse, shape] += len(images)
            told = coarse(images)
            known = probabilities(told)
            go_on = self._decide(known if slides else case.fit.undo(known))
            if not go_on.any():
                return known
            found = known.clone()
            found[go_on] = probabilities(one.network(coarse.widened(images, told)[go_on]))
            # A whole pass, less that of the coarse part, which is known.
            self._computed[one.network, shape] += int(go_on.sum())
            self._computed[coarse, shape] -= int(go_on.sum())
            return found

        return case.fit.undo(
            one.passes.probabilities(decide, batch, one.batch_size, activation=lambda p: p)
        )


def coarse_predictor(fine: Predictor) -> Predictor:
    """Return what predicts by the coarse network inside a finer one, on the same images."""
    return Predictor(
        _coarse_in(fine),
        fine.image,
        fine.channels,
        fine.batch_size,
        fine.device,
        passes=fine.passes,
    )


def _coarse_in(fine: Predictor) -> Coarse:
    found = coarse_of(fine.network)
    if found is None:
        raise ValueError("the network takes in no coarse one")
    return found


def _multiply_adds(inputs: Inputs) -> int:
    return sum(number * multiply_adds(*key) for key, number in inputs.items())


def multiply_adds(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of a network for one input (C, H, W)."""
    return int(summarize(network, (1, *shape)).numbers()["multiply_adds"])


def load_cascade(
    first: RunDirectory, runs: Sequence[RunDirectory], way: Way, threshold: float
) -> LoadedRuns:
    """Load a cheap run and finer ones, of which several vote, as a cascade.

    Args:
        first: the cheap run. It takes no mirrored passes, and slices as it was trained on them:
            where the others slide a window, it does so only if it was trained on crops. If all the
            others take in its answer (`network.reuse`), it is a part of them: see `EarlyExit`.
        runs: the finer runs.
        way: how the finer ones predict.
        threshold: see `Cascade`.

    Raises:
        MedsegError: a run is not finished, they do not fit together, the first is one of the
            others, MC dropout is asked for, or the threshold is out of range.
    """
    if way.draws:
        raise MedsegError(
            "--first: cannot go with --mc-dropout, whose maps would be of two networks. Leave one."
        )
    if first.path.resolve() in {run.path.resolve() for run in runs}:
        raise MedsegError(f"--first {first.path}: is one of --run too. Give a cheaper one.")
    cheap = Known.of(first)
    check_agree(cheap, Known.of(runs[0]))
    image = cheap.config.data.image
    slides = way.window is not None and image.size is not None and image.fit == "crop"
    ahead = load_runs([first], replace(way, flips=(), window=() if slides else None))
    fine = load_runs(runs, way)
    if all(takes_in(run, first) for run in runs):
        cascade: Cascade = EarlyExit(fine.ensemble, threshold)
    else:
        cascade = Cascade(ahead.ensemble, fine.ensemble, threshold)
    return LoadedRuns(
        cascade,
        fine.facts,
        Algorithm(
            name="+".join(dict.fromkeys((ahead.algorithm.name, fine.algorithm.name))),
            version=f"{ahead.algorithm.version}+{fine.algorithm.version}",
        ),
        (*ahead.notes, *fine.notes),
    )
