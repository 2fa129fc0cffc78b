"""The controller against sums over its whole space, and what it learns."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from medseg_reg.study.samplers import ControllerSpec, make_sampler
from medseg_reg.study.samplers.controller import Controller, ControllerSampler, policy_loss
from tests.reference.controller import log_probability

CHOICES = (2, 3, 2)
SPACE = list(itertools.product(*map(range, CHOICES)))
SETTINGS = ControllerSpec(width=4, layers=2, heads=2)
REWARDS = np.array([0.1 * sum(tokens) - 0.3 * (tokens[0] == tokens[2]) for tokens in SPACE])


@pytest.fixture
def controller():
    """A controller whose policy is far from uniform."""
    torch.manual_seed(0)
    made = Controller(CHOICES, SETTINGS)
    with torch.no_grad():
        for weights in made.parameters():
            weights.add_(0.5 * torch.randn_like(weights))
    return made


def weights_of(controller):
    return {key: value.numpy().copy() for key, value in controller.state_dict().items()}


def by_brute_force(weights):
    """Return log P and the sum of the conditional entropies of every sequence."""
    return np.array([log_probability(tokens, CHOICES, weights, 2, 2) for tokens in SPACE]).T


def test_probabilities_are_those_written_out_and_sum_to_one(controller):
    log_p, entropy = controller(torch.tensor(SPACE))
    expected_log_p, expected_entropy = by_brute_force(weights_of(controller))
    np.testing.assert_allclose(log_p.detach(), expected_log_p, rtol=1e-9)
    np.testing.assert_allclose(entropy.detach(), expected_entropy, rtol=1e-9)
    p = np.exp(expected_log_p)
    assert p.max() > 3 * p.min()  # far from uniform
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    # the mean of the conditional entropies is the entropy of the policy
    assert p @ expected_entropy == pytest.approx(-(p @ expected_log_p), rel=1e-9)


def test_the_mean_gradient_is_that_of_the_expected_reward_whatever_the_baseline(controller):
    weights = weights_of(controller)
    parameters = dict(list(controller.named_parameters())[::2])
    slopes = {}
    for name in parameters:
        place = tuple(size // 2 for size in weights[name].shape)
        means = []
        for step in (1e-5, -1e-5):
            moved = {**weights, name: weights[name].copy()}
            moved[name][place] += step
            means.append(np.exp(by_brute_force(moved)[0]) @ REWARDS)
        slopes[name] = (place, (means[0] - means[1]) / 2e-5)
    log_p, entropy = controller(torch.tensor(SPACE))
    for baseline in (0.0, 0.7):
        advantages = torch.tensor(REWARDS) - baseline
        losses = [
            policy_loss(log_p[i : i + 1], entropy[i : i + 1], advantages[i : i + 1], 0.0)
            for i in range(len(SPACE))
        ]
        mean = (log_p.detach().exp() * torch.stack(losses)).sum()
        gradients = torch.autograd.grad(mean, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            place, slope = slopes[name]
            assert gradient[place].item() == pytest.approx(-slope, rel=1e-4, abs=1e-8), name


def test_the_entropy_term_pushes_towards_the_uniform_policy(controller):
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    before = torch.exp(controller(torch.tensor(SPACE))[0]).max().item()
    for _ in range(40):
        log_p, entropy = controller(controller.sample(16, generator))
        optimizer.zero_grad()
        policy_loss(log_p, entropy, torch.zeros(16), 1.0).backward()
        optimizer.step()
    after = controller(torch.tensor(SPACE))[0].exp().max().item()
    assert after < 1.3 / len(SPACE) < before


def test_it_draws_sequences_as_often_as_it_says(controller):
    count = 20_000
    drawn = controller.sample(count, torch.Generator().manual_seed(1))
    found = np.bincount(np.ravel_multi_index(drawn.T.numpy(), CHOICES), minlength=len(SPACE))
    expected = count * np.exp(by_brute_force(weights_of(controller))[0])
    assert (((found - expected) ** 2) / expected).sum() < 31.3  # chi square, 11 degrees, 0.001


def test_untrained_it_is_uniform():
    log_p, _ = Controller(CHOICES, SETTINGS)(torch.tensor(SPACE))
    assert log_p.exp().tolist() == pytest.approx([1 / len(SPACE)] * len(SPACE))


BEST = (3, 0, 2, 1, 2)
SIZES = (4, 3, 4, 3, 4)


def reward_of(tokens, noise):
    """Like DICE: 0.8 at the best, a hundredth of noise, and two tokens that matter together."""
    wrong = [a != b for a, b in zip(tokens, BEST, strict=True)]
    return 0.8 - 0.03 * sum(wrong) - 0.1 * (wrong[0] != wrong[1]) + 0.01 * noise.normal()


def rewards_of(sampler, rounds, together):
    noise, found = np.random.default_rng(9), []
    for _ in range(rounds):
        asked = sampler.ask(together)
        found.append([reward_of(tokens, noise) for tokens in asked])
        sampler.tell(asked, found[-1])
    return np.array(found)


def test_its_mean_reward_rises_and_beats_random_search_within_200_trials():
    ends = []
    for seed in range(2):
        found = rewards_of(make_sampler("controller", SIZES, seed), rounds=25, together=8)
        drawn = rewards_of(make_sampler("random", SIZES, seed), rounds=25, together=8)
        first, last = found[:6].mean(), found[-6:].mean()
        assert last > first + 0.05
        assert last > drawn.mean() + 0.07
        ends.append(found[-6:].mean())
    assert np.mean(ends) > 0.74  # about one token from the best


@pytest.mark.parametrize("scale", [True, False])
def test_the_baseline_is_the_moving_mean_of_the_rewards_before(scale):
    sampler = ControllerSampler([3], 0, ControllerSpec(baseline_decay=0.5, scale_rewards=scale))
    sampler.tell(sampler.ask(2), [0.4, 0.8])
    assert sampler.baseline == pytest.approx(0.6)
    advantages = sampler._advantages(torch.tensor([1.0, 0.8], dtype=torch.float64))
    assert sampler.baseline == pytest.approx(0.75)
    # squares: 0.04 in the first round, 0.1 in the second, half and half
    expected = np.array([0.4, 0.2]) / (math.sqrt(0.07) if scale else 1.0)
    np.testing.assert_allclose(advantages, expected)


def test_failures_are_left_out_and_equal_rewards_teach_nothing():
    sampler = ControllerSampler([3, 2], 0, ControllerSpec(entropy=0.0))
    before = weights_of(sampler.controller)
    sampler.tell(sampler.ask(2), [math.nan, math.nan])
    assert sampler.baseline is None
    sampler.tell(sampler.ask(2), [0.5, 0.5])
    for name, value in weights_of(sampler.controller).items():
        np.testing.assert_allclose(value, before[name], atol=1e-12)
    sampler.tell(sampler.ask(3), [math.nan, 0.7, 0.2])
    assert all(np.isfinite(value).all() for value in weights_of(sampler.controller).values())


def test_it_leaves_the_global_generator_alone_and_repeats_itself():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = rewards_of(ControllerSampler(SIZES, 4), rounds=5, together=4)
    assert torch.equal(torch.rand(2), expected)
    np.testing.assert_array_equal(first, rewards_of(ControllerSampler(SIZES, 4), 5, 4))
    assert (first != rewards_of(ControllerSampler(SIZES, 5), 5, 4)).any()
