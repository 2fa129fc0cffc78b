"""Settings of the samplers, closed like all settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from medseg_reg.config_base import Closed, Fraction, Positive


class ControllerSpec(Closed):
    """The controller and how it learns; AutoDropout's own numbers are not known here.

    Attributes:
        width: of its tokens.
        layers: transformer blocks.
        heads: of each block.
        lr: learning rate of Adam, of one step for each round of proposals.
        baseline_decay: the share that the moving mean of the rewards keeps in each round.
        entropy: weight of the entropy of the policy, in standard deviations of the reward if
            `scale_rewards`.
        scale_rewards: whether rewards, less the baseline, are divided by their running spread;
            DICE differs by hundredths between trials.
    """

    width: Positive = 32
    layers: Positive = 1
    heads: Positive = 2
    lr: Annotated[float, Field(gt=0)] = 0.01
    baseline_decay: Fraction = 0.8
    entropy: Annotated[float, Field(ge=0)] = 0.05
    scale_rewards: bool = True

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> ControllerSpec:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by {self.heads} heads. Take another width"
            )
        return self


class EvolutionSpec(Closed):
    """Regularized evolution.

    Attributes:
        population: how many live at a time; as many are drawn at random at the start.
        sample: how many of them compete to be the parent of the next.
    """

    population: Positive = 8
    sample: Positive = 6

    @model_validator(mode="after")
    def _a_sample_of_the_population(self) -> EvolutionSpec:
        if self.sample > self.population:
            raise ValueError(
                f"a sample of {self.sample} is larger than the population of {self.population}"
            )
        return self
