"""What was drawn, and the draws of Optuna: what is next, by the scores of what was tried before.

Each trial has random numbers of its own, and it is drawn by the scores of all trials but the
`together - 1` before it, however many of those have ended. So the draws do not depend on which of
several trainings ends first. What was drawn stands in `drawn.json`, and stays when a search goes
on, also where a trial that had failed now has a score.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, write_json
from medseg_reg.study.search.spec import ChoiceSpec, RangeSpec, SearchSpec
from medseg_reg.study.search.trials import Trial, make_trial


class Drawn:
    """The trials of a search that were drawn before, in `drawn.json`.

    Args:
        search: of any method that draws.

    Raises:
        MedsegError: `drawn.json` is of another search.
    """

    def __init__(self, search: SearchSpec) -> None:
        self.search, self.file = search, search.directory / "drawn.json"
        self._about = {
            "method": search.method,
            "parameters": search.model_dump(mode="json")["parameters"],
            "sampler_seed": search.sampler_seed,
            **self.settings(),
        }
        self._known = self._read()

    def settings(self) -> dict[str, Any]:
        """Return what else decides what is drawn."""
        return {}

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        found = read_json(self.file)
        try:
            trials = list(found["trials"])
            for key, wanted in self._about.items():  # the method first: others have other settings
                if found[key] != wanted:
                    raise MedsegError(
                        f"{self.file}: its trials were drawn with other {key} ({found[key]}, now "
                        f"{wanted}). Choose another directory with `run=DIR`, or delete this one."
                    )
            whole = all(map(self._is_whole, trials))
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise MedsegError(f"{self.file}: is damaged. Delete it to draw anew.")
        return trials

    def known(self) -> list[Trial]:
        """Return the trials that were drawn before."""
        return [
            make_trial(self.search, number, self._values(raw))
            for number, raw in enumerate(self._known[: self.search.trials])
        ]

    def keep(self, raw: dict[str, Any]) -> None:
        """Note what was drawn next."""
        self._known.append(raw)
        write_json(self.file, {**self._about, "trials": self._known})

    def _is_whole(self, raw: Any) -> bool:
        """Whether this can be what was drawn for a trial."""
        parameters = self.search.parameters
        return (
            isinstance(raw, dict)
            and raw.keys() == parameters.keys()
            and all(
                raw[key] in range(len(one.values))
                if isinstance(one, ChoiceSpec)
                else one.low <= raw[key] <= one.high
                for key, one in parameters.items()
            )
        )

    def _values(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the values of parameters; of a list, its number is kept."""
        pairs = self.search.parameters.items()
        return {k: p.values[raw[k]] if isinstance(p, ChoiceSpec) else raw[k] for k, p in pairs}


class Draws(Drawn):
    """The trials of a search as they are drawn, with those that were drawn before.

    Args:
        search: with `method: optuna`.

    Raises:
        MedsegError: Optuna is not installed, or `drawn.json` is of another search.
    """

    def __init__(self, search: SearchSpec) -> None:
        try:
            import optuna
        except ImportError:
            raise MedsegError(
                "method: optuna is not installed. Install it with `pip install "
                "'medseg-reg[search]'`, or take another method."
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        super().__init__(search)

    def trials(
        self, has_ended: Callable[[Trial], bool], score: Callable[[Trial], float]
    ) -> Iterator[Trial | None]:
        """Draw the trials in order; None says that a score is not known yet.

        Args:
            has_ended: whether nothing more is to come of a trial.
            score: of a trial that has ended; NaN where it failed.
        """
        study = self._optuna.create_study(direction="maximize")
        drawn: list[tuple[Any, Trial]] = []
        told = 0
        for number in range(self.search.trials):
            while told <= number - self.search.trials_at_a_time:
                asked, before = drawn[told]
                if not has_ended(before):
                    yield None
                    continue
                self._tell(study, asked, score(before))
                told += 1
            asked, raw = self._ask(study, number)
            trial = make_trial(self.search, number, self._values(raw))
            if number == len(self._known):
                self.keep(raw)
            drawn.append((asked, trial))
            yield trial

    def _ask(self, study: Any, number: int) -> tuple[Any, dict[str, Any]]:
        """Return a trial of Optuna, and its parameters as Optuna has them."""
        if number < len(self._known):
            study.enqueue_trial(self._known[number])
        else:
            study.sampler = self._sampler(number)
        asked = study.ask()
        return asked, {key: _draw(asked, key, one) for key, one in self.search.parameters.items()}

    def _sampler(self, number: int) -> Any:
        seed = np.random.SeedSequence([self.search.sampler_seed, number]).generate_state(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says of `constant_liar` that it may change
            # Trials that go on count as bad ones, so that the next is not drawn beside them.
            return self._optuna.samplers.TPESampler(seed=int(seed), constant_liar=True)

    def _tell(self, study: Any, asked: Any, score: float) -> None:
        if math.isnan(score):
            study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked, score)


def _draw(trial: Any, key: str, spec: ChoiceSpec | RangeSpec) -> Any:
    if isinstance(spec, ChoiceSpec):
        # By their numbers: Optuna takes no lists and mappings as values.
        return trial.suggest_categorical(key, list(range(len(spec.values))))
    if spec.integer:
        return trial.suggest_int(key, int(spec.low), int(spec.high), log=spec.log)
    return trial.suggest_float(key, spec.low, spec.high, log=spec.log)
