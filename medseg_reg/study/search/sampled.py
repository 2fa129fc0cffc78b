"""The draws of controller, random search and evolution: rounds that a sampler proposes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from medseg_reg.study.samplers import SAMPLERS, Tokens, make_sampler
from medseg_reg.study.search.draws import Drawn
from medseg_reg.study.search.trials import Trial, make_trial


class Sampled(Drawn):
    """The trials of a search as a sampler proposes them, with those that were drawn before.

    A round of `together` trials is drawn when all before have ended. What a sampler proposes
    depends on its seed and settings, on the size of the rounds and on the scores that it was told,
    so a search that goes on draws the same trials again, and one with others is refused. What was
    drawn stays, also where a trial that had failed now has a score.

    Args:
        search: with one of the methods that draw from lists.

    Raises:
        MedsegError: `drawn.json` is of another search.
    """

    def settings(self) -> dict[str, Any]:
        """Return the settings of what learns from rounds, and their size."""
        method = self.search.method
        if method == "random":
            return {}
        own = getattr(self.search, method).model_dump(mode="json")
        return {"together": self.search.trials_at_a_time, method: own}

    def trials(
        self, has_ended: Callable[[Trial], bool], score: Callable[[Trial], float]
    ) -> Iterator[Trial | None]:
        """Draw the trials in order; None says that a score is not known yet.

        Args:
            has_ended: whether nothing more is to come of a trial.
            score: of a trial that has ended; NaN where it failed.
        """
        search = self.search
        assert search.method in SAMPLERS  # noqa: S101 - for the type checker
        sizes = [len(values) for values in search.lists.values()]
        settings = (search.controller, search.evolution)
        sampler = make_sampler(search.method, sizes, search.sampler_seed, *settings)
        for first in range(0, search.trials, search.trials_at_a_time):
            count = min(search.trials_at_a_time, search.trials - first)
            drawn = [self._next(n, tokens) for n, tokens in enumerate(sampler.ask(count), first)]
            trials = [
                make_trial(search, n, self._values(raw)) for n, raw in enumerate(drawn, first)
            ]
            yield from trials
            for trial in trials:
                while not has_ended(trial):
                    yield None
            asked = [tuple(raw[key] for key in search.lists) for raw in drawn]
            sampler.tell(asked, [score(trial) for trial in trials])

    def _next(self, number: int, tokens: Tokens) -> dict[str, Any]:
        """Return what was drawn for a trial before, or else keep what is proposed now."""
        if number == len(self._known):
            self.keep(dict(zip(self.search.lists, tokens, strict=True)))
        return self._known[number]
