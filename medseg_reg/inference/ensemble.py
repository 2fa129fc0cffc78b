"""One run or several that predict together: labels, and maps of how sure they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from medseg_reg.config import Config
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.files import sha256_of
from medseg_reg.inference.passes import Flip, Passes, window_of
from medseg_reg.inference.predictor import Case, Predictor, require_finite
from medseg_reg.inference.slices import Slices
from medseg_reg.inference.stochastic import describe_fixed, fixed_layers, require_stochastic
from medseg_reg.inference.uncertainty import Average
from medseg_reg.io.dicom_seg import Algorithm

Array = np.ndarray[Any, np.dtype[Any]]

ENTROPY, MUTUAL_INFORMATION = "entropy", "mutual_information"
_MIRRORING: dict[str, set[str]] = {
    "horizontal": {"HorizontalFlip", "SquareSymmetry"},
    "vertical": {"VerticalFlip", "SquareSymmetry"},
}


@dataclass(frozen=True)
class Way:
    """How to predict.

    Attributes:
        window: the numbers of `--window`, see `passes.window_of`; None for whole slices.
        overlap: of windows, see `Passes`.
        flips: see `Passes`.
        draws: passes of MC dropout, 0 for none.
        seed: decides the draws.
        batch_size: slices in a batch; None for that of the run's evaluation.
        device: where to compute; None for a GPU where there is one.
    """

    window: tuple[int, ...] | None = None
    overlap: float = 0.5
    flips: tuple[Flip, ...] = ()
    draws: int = 0
    seed: int = 0
    batch_size: int | None = None
    device: torch.device | None = None

    def passes(self, image: ImageSpec) -> Passes:
        """Return the passes of a network that was trained on slices of `image`."""
        window = None if self.window is None else window_of(self.window, image.size)
        return Passes(window, self.overlap, self.flips)


@dataclass(frozen=True)
class Part:
    """Some slices that are predicted.

    Attributes:
        start: the number of the first.
        labels: (n, H, W) uint8.
        maps: (n, H, W) float32, by names.
    """

    start: int
    labels: Array
    maps: dict[str, Array]


class Ensemble:
    """Networks whose class probabilities are averaged, draw by draw and network by network.

    Args:
        predictors: at least one; of equal classes and channels, and of equal intensities.
        classes: names of the classes.
    """

    def __init__(self, predictors: Sequence[Predictor], classes: Sequence[str]) -> None:
        self.predictors, self.classes = tuple(predictors), tuple(classes)
        self.batch_size = min(one.batch_size for one in self.predictors)

    @property
    def votes(self) -> int:
        """The number of predictions that are averaged."""
        return sum(one.draws or 1 for one in self.predictors)

    def map_names(self, uncertainty: bool, probabilities: bool) -> tuple[str, ...]:
        """Return the names of the maps there are.

        Args:
            uncertainty: the entropy, and the mutual information where several vote.
            probabilities: one map a class without the background, `probability_1_name`.
        """
        names = [ENTROPY] if uncertainty else []
        names += [MUTUAL_INFORMATION] if uncertainty and self.votes > 1 else []
        return (*names, *(self._of_classes() if probabilities else ()))

    def parts(self, images: Slices, name: str, maps: Sequence[str] = ()) -> Iterator[Part]:
        """Predict a case, some slices at a time.

        Args:
            images: (S, H, W) or (S, H, W, C), as in a slice store.
            name: stands in errors.
            maps: names of maps to compute, of those that `map_names` gives.

        Raises:
            MedsegError: see `Predictor.labels`.
        """
        require_finite(images, name)
        for start, votes in self.votes_of(self.cases(images, name), len(images), bool(maps)):
            yield Part(start, votes.labels().cpu().numpy(), self._maps(votes, maps))

    def cases(self, images: Slices, name: str) -> list[Case]:
        """Return a case as each network sees it; arguments and errors are those of `parts`."""
        # The intensities of all are scaled alike; percentiles of a large volume take a while.
        first = self.predictors[0].case(images, name)
        others = [one.case(images, name, first.limits) for one in self.predictors[1:]]
        return [first, *others]

    def votes_of(
        self, cases: Sequence[Case], slices: int, maps: bool
    ) -> Iterator[tuple[int, Average]]:
        """Yield the number of a first slice, and what all networks say of it and the next ones.

        Args:
            cases: what `cases` gives.
            slices: their number.
            maps: see `Average`.
        """
        for start in range(0, slices, self.batch_size):
            votes = Average(maps)
            for case in cases:
                for p in case.members(start, min(start + self.batch_size, slices)):
                    votes.add(p)
            yield start, votes

    def _maps(self, votes: Average, wanted: Sequence[str]) -> dict[str, Array]:
        if not wanted:
            return {}
        found = votes.result()
        every = {ENTROPY: found.entropy, MUTUAL_INFORMATION: found.mutual_information}
        every |= dict(zip(self._of_classes(), found.mean.unbind(dim=1)[1:], strict=True))
        return {name: every[name].cpu().numpy() for name in wanted}

    def _of_classes(self) -> list[str]:
        named = enumerate(self.classes[1:], start=1)
        return [
            f"probability_{number}_{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}"
            for number, name in named
        ]


@dataclass(frozen=True)
class LoadedRuns:
    """Runs that predict together.

    Attributes:
        ensemble: their networks.
        facts: what they know of their data.
        algorithm: their names and weights, for what is written.
        notes: what a person should know.
    """

    ensemble: Ensemble
    facts: DataFacts
    algorithm: Algorithm
    notes: tuple[str, ...]


def load_runs(runs: Sequence[RunDirectory], way: Way) -> LoadedRuns:
    """Load finished runs for prediction.

    Raises:
        MedsegError: a run is not finished, one is named twice, they do not fit together, or MC
            dropout is asked of a network that does not draw.
    """
    _check_distinct(runs)
    known = [Known.of(run) for run in runs]
    predictors, notes = [], []
    for number, one in enumerate(known):
        check_agree(one, known[0])
        network = load_run_network(one.run)
        if way.draws:
            require_stochastic(network, f"{one.run.path} with --mc-dropout")
        passes = way.passes(one.config.data.image)
        _check_window(one.run, network, passes)
        predictors.append(
            Predictor(
                network,
                one.config.data.image,
                one.facts.channels,
                way.batch_size or one.config.evaluation.batch_size,
                way.device,
                passes=passes,
                draws=way.draws,
                seed=way.seed + number,
            )
        )
        notes += [f"{one.run.path}: {note}" for note in _notes(one.config, network, way)]
    facts = known[0].facts
    algorithm = Algorithm(
        name="+".join(dict.fromkeys(one.config.name for one in known)),
        version="+".join(sha256_of(run.weights)[:12] for run in runs),
    )
    return LoadedRuns(Ensemble(predictors, facts.classes), facts, algorithm, tuple(notes))


class Known(NamedTuple):
    """A run, its configuration, and what it knows of its data."""

    run: RunDirectory
    config: Config
    facts: DataFacts

    @classmethod
    def of(cls, run: RunDirectory) -> Known:
        """Read them."""
        return cls(run, run.config(), run.data_facts())


def _check_distinct(runs: Sequence[RunDirectory]) -> None:
    seen: dict[Any, RunDirectory] = {}
    for run in runs:
        other = seen.setdefault(run.path.resolve(), run)
        if other is not run:
            raise MedsegError(f"--run {run.path}: is named twice. Each run votes once.")


def check_agree(one: Known, first: Known) -> None:
    """Refuse runs that do not speak of the same classes and the same pixels.

    Raises:
        MedsegError: names what differs.
    """
    here, there = _what_agrees(one), _what_agrees(first)
    for what, found in here.items():
        if found != there[what]:
            raise MedsegError(
                f"{one.run.path}: its {what} is {found}, that of {first.run.path} is "
                f"{there[what]}. Runs that predict together must be trained on the same classes "
                "and alike images."
            )


def _what_agrees(one: Known) -> dict[str, Any]:
    facts, image = one.facts, one.config.data.image
    return {
        "list of classes": facts.classes,
        "number of image channels": facts.channels,
        "modality": facts.modality,
        "unit": facts.unit,
        "plane": facts.conversion.get("plane"),
        "erosion": facts.conversion.get("erosion"),
        "canny": facts.conversion.get("canny"),
        "data.image.window": image.window,
        "data.image.percentiles": image.percentiles,
    }


def _check_window(run: RunDirectory, network: Any, passes: Passes) -> None:
    if passes.window is not None and getattr(network, "fixed", False):
        size = tuple(network.size)
        if passes.window != size:
            shown = " ".join(map(str, passes.window))
            raise MedsegError(
                f"--window {shown}: the network of {run.path} takes {size[0]} x {size[1]} alone. "
                f"Use --window {size[0]} {size[1]}."
            )


def _notes(config: Config, network: torch.nn.Module, way: Way) -> Iterator[str]:
    """Yield what is allowed, but may surprise."""
    image = config.data.image
    if way.window is not None and image.size is not None and image.fit != "crop":
        yield (
            f"was trained on whole slices scaled to {image.size[0]} x {image.size[1]} (fit "
            f"{image.fit}), but windows are not scaled. Expect good labels only if that changed "
            "little."
        )
    trained = {one.name for one in config.regularization.data}
    for flip in way.flips:
        if not trained & _MIRRORING[flip]:
            yield (
                f"was not trained on slices with a {flip} flip, so mirrored passes may do harm. "
                "Compare with and without."
            )
    if way.draws and (fixed := fixed_layers(network)):
        yield f"these layers do not draw: {describe_fixed(fixed)}"
