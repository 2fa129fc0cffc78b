"""The learning rate follows its formula, starts above zero, and never jumps where it should not."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_reg.config import ScheduleSpec
from medseg_reg.engine.schedule import learning_rate_factor

smooth = st.builds(
    ScheduleSpec,
    name=st.sampled_from(["constant", "cosine", "polynomial"]),
    warmup_epochs=st.just(0.0) | st.floats(0.1, 20),
    power=st.floats(0.2, 3),
    final_factor=st.floats(0, 1),
)


@pytest.mark.parametrize(
    ("spec", "epoch", "factor"),
    [
        ({}, 0, 1.0),
        ({}, 7.3, 1.0),
        ({"name": "cosine"}, 0, 1.0),
        ({"name": "cosine"}, 2.5, (1 + math.sqrt(0.5)) / 2),
        ({"name": "cosine"}, 5, 0.5),
        ({"name": "cosine"}, 10, 0.0),
        ({"name": "cosine", "final_factor": 0.2}, 5, 0.6),
        ({"name": "cosine", "final_factor": 0.2}, 10, 0.2),
        ({"name": "cosine", "warmup_epochs": 2}, 6, 0.5),
        ({"name": "polynomial"}, 5, 0.5**0.9),
        ({"name": "polynomial", "power": 2}, 7.5, 0.0625),
        ({"name": "polynomial", "power": 2, "final_factor": 0.1}, 7.5, 0.1 + 0.9 * 0.0625),
        ({"name": "step", "milestones": (3, 6)}, 2.99, 1.0),
        ({"name": "step", "milestones": (3, 6)}, 3, 0.1),
        ({"name": "step", "milestones": (3, 6), "gamma": 0.5}, 9, 0.25),
        ({"name": "step", "milestones": (6, 3), "gamma": 0.5}, 4, 0.5),
        ({"warmup_epochs": 4}, 1, 0.25),
        ({"warmup_epochs": 4}, 4, 1.0),
        ({"name": "step", "milestones": (3,), "warmup_epochs": 4}, 2, 0.5),
        ({"name": "step", "milestones": (3,), "warmup_epochs": 4}, 4, 0.1),
    ],
)
def test_the_factor_is_that_of_the_formula(
    spec: dict[str, Any], epoch: float, factor: float
) -> None:
    assert learning_rate_factor(ScheduleSpec(**spec), epoch, 10) == pytest.approx(factor)


@given(smooth, st.floats(0, 1), st.integers(1, 200))
@settings(deadline=None)
def test_the_factor_lies_between_zero_and_one(spec: ScheduleSpec, t: float, epochs: int) -> None:
    assert 0 <= learning_rate_factor(spec, t * epochs, epochs) <= 1


@given(smooth, st.integers(1, 200))
@settings(deadline=None)
def test_the_first_step_is_never_without_effect(spec: ScheduleSpec, epochs: int) -> None:
    assert learning_rate_factor(spec, 0.0, epochs) >= 0.01


@given(smooth, st.floats(0, 0.99), st.floats(0, 0.99), st.integers(30, 200))
@settings(deadline=None)
def test_the_rate_rises_in_the_warm_up_and_never_after(
    spec: ScheduleSpec, a: float, b: float, epochs: int
) -> None:
    early, late = sorted((a, b))
    warm = spec.warmup_epochs
    assert learning_rate_factor(spec, early * warm, epochs) <= (
        learning_rate_factor(spec, late * warm, epochs) + 1e-9
    )
    left = epochs - warm
    assert learning_rate_factor(spec, warm + early * left, epochs) >= (
        learning_rate_factor(spec, warm + late * left, epochs) - 1e-9
    )


@given(smooth.filter(lambda spec: spec.warmup_epochs > 0), st.integers(30, 200))
@settings(deadline=None)
def test_the_warm_up_ends_without_a_jump(spec: ScheduleSpec, epochs: int) -> None:
    warm = spec.warmup_epochs
    before = learning_rate_factor(spec, warm * (1 - 1e-6), epochs)
    assert before == pytest.approx(learning_rate_factor(spec, warm, epochs), abs=1e-3)
    assert learning_rate_factor(spec, warm, epochs) == pytest.approx(1)


@given(smooth)
@settings(deadline=None)
def test_after_the_last_epoch_the_rate_stays(spec: ScheduleSpec) -> None:
    assert learning_rate_factor(spec, 60, 50) == learning_rate_factor(spec, 50, 50)


def test_a_warm_up_longer_than_the_training_just_rises() -> None:
    spec = ScheduleSpec(name="cosine", warmup_epochs=20)
    assert [learning_rate_factor(spec, e, 10) for e in (5, 10)] == [0.25, 0.5]
