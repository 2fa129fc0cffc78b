"""The entropy and the mutual information of several predictions, and MC dropout."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import medseg_reg.inference
from medseg_reg.inference.uncertainty import Average, average, entropy, mc_dropout
from medseg_reg.regularizers import HeuristicDropout, SpatialDropout


def draw(seed: int, members: int = 5, classes: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return list(rng.dirichlet([0.3] * classes, (members, 2, 4, 5)).transpose(0, 1, 4, 2, 3))


def reference(members: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By the formulas, in float64."""
    mean = sum(members) / len(members)

    def h(p: np.ndarray) -> np.ndarray:
        return -sum(
            np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0) for q in np.moveaxis(p, 1, 0)
        )

    return mean, h(mean), h(mean) - sum(map(h, members)) / len(members)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_maps_are_those_of_the_formulas(classes):
    members = draw(classes, classes=classes)
    found = average(torch.from_numpy(p).float() for p in members)
    for got, expected in zip(found, reference(members), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)


def test_the_limits_of_the_entropy():
    certain = torch.tensor([[1.0, 0, 0]])
    even = torch.full((1, 3), 1 / 3)
    assert entropy(certain).item() == 0
    assert entropy(even).item() == pytest.approx(np.log(3), abs=1e-6)


def test_members_that_agree_have_no_mutual_information():
    p = torch.from_numpy(draw(0)[0]).float()
    found = average([p, p, p])
    assert found.mutual_information.max() < 1e-6
    assert found.mutual_information.min() >= 0
    torch.testing.assert_close(found.entropy, entropy(p))


def test_members_that_are_sure_of_different_classes_disagree_in_all():
    sure = torch.eye(2)[:, :, None]
    found = average([sure, sure.flip(1)])
    torch.testing.assert_close(found.entropy, torch.full((2, 1), float(np.log(2))))
    torch.testing.assert_close(found.mutual_information, found.entropy)


def test_a_member_that_did_not_see_a_pixel_does_not_vote():
    p, q = (torch.from_numpy(one).float() for one in draw(1, members=2))
    q[..., 2] = 0
    found = average([p, q])
    torch.testing.assert_close(found.mean[..., 2], p[..., 2])
    torch.testing.assert_close(found.entropy[..., 2], entropy(p)[..., 2])
    assert found.mutual_information[..., 2].max() < 1e-6
    torch.testing.assert_close(found.mean[..., :2], ((p + q) / 2)[..., :2])


def test_what_no_member_saw_is_background_and_not_a_number():
    votes = Average()
    votes.add(torch.zeros(1, 3, 2, 2))
    assert votes.labels().tolist() == [[[0, 0], [0, 0]]]
    assert all(torch.isnan(one).all() for one in votes.result())


def test_an_average_without_members_or_entropies_is_refused():
    with pytest.raises(ValueError, match="no probabilities"):
        Average().labels()
    votes = Average(maps=False)
    votes.add(torch.ones(1, 1))
    with pytest.raises(ValueError, match="keeps no entropies"):
        votes.result()


def network(layer: nn.Module, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), layer, nn.Conv2d(16, outputs, 1)
    ).eval()


IMAGES = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [SpatialDropout(0.5), nn.Dropout(0.5), nn.Dropout2d(0.5)])
def test_mc_dropout_is_the_average_of_passes_with_the_dropouts_on(layer):
    model = network(layer)
    found = mc_dropout(model, IMAGES, draws=6, seed=3)
    torch.manual_seed(3)
    layer.train()
    with torch.no_grad():
        members = [model(IMAGES).double().softmax(1).numpy() for _ in range(6)]
    for got, expected in zip(found, reference(members), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)
    assert found.mutual_information.max() > 0.01


def test_equal_seeds_give_equal_maps_and_others_do_not():
    model = network(SpatialDropout(0.5))
    one, same, other = (mc_dropout(model, IMAGES, 4, seed=seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one.entropy, other.entropy)


def test_without_a_seed_torchs_generator_draws():
    model = network(SpatialDropout(0.5))
    torch.manual_seed(9)
    free = mc_dropout(model, IMAGES, 4, seed=None)
    assert not torch.equal(mc_dropout(model, IMAGES, 4, seed=None).mean, free.mean)
    assert torch.equal(mc_dropout(model, IMAGES, 4, seed=9).mean, free.mean)


def test_network_and_random_state_are_left_as_they_were():
    model = network(SpatialDropout(0.5)).train()
    state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    mc_dropout(model, IMAGES, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_one_channel_of_logits_means_sigmoid():
    found = mc_dropout(network(SpatialDropout(0.5), outputs=1), IMAGES, 3)
    assert found.mean.shape == (2, 2, 5, 7)
    torch.testing.assert_close(found.mean.sum(1), torch.ones(2, 5, 7))


def test_volumes_and_other_outputs_work_too():
    model = nn.Sequential(nn.Conv3d(1, 4, 1), nn.Dropout3d(0.5), nn.Conv3d(4, 2, 1))
    found = mc_dropout(
        model, torch.rand(1, 1, 3, 4, 5), 3, activation=lambda logits: logits.sigmoid() / 2
    )
    assert found.entropy.shape == (1, 3, 4, 5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Identity(), "no layer that draws"),
        (HeuristicDropout(0.5), "no layer that draws"),
        (nn.Sequential(nn.Dropout(0.5), nn.Identity()).requires_grad_(False), None),
    ],
    ids=["none", "fixed", "fine"],
)
def test_a_network_that_does_not_draw_is_warned_of(layer, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = mc_dropout(network(layer), IMAGES, 2)
    assert [message in str(one.message) for one in caught] == ([True] if message else [])
    if message:
        assert found.mutual_information.max() < 1e-6
        assert caught[0].filename == __file__


def test_layers_that_draw_without_effect_are_warned_of():
    model = network(SpatialDropout(0.5))
    nn.init.zeros_(model[4].weight)
    with pytest.warns(UserWarning, match="change nothing for these images"):
        mc_dropout(model, IMAGES, 4)


@pytest.mark.parametrize("draws", [1, 0, -3, 2.5, True])
def test_fewer_than_two_draws_are_refused(draws):
    with pytest.raises(ValueError, match=r"draws must be a whole number, 2 or more"):
        mc_dropout(network(SpatialDropout(0.5)), IMAGES, draws)


def test_it_is_a_name_of_the_package():
    assert medseg_reg.inference.mc_dropout is mc_dropout
