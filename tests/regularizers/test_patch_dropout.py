"""PatchDropout: an exact count, protected targets, and a mask token beside the weights."""

import copy
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import (
    PatchDropout,
    kept_lines,
    kept_patches,
    patch_dropout,
    patches_with_foreground,
)
from medseg_reg.regularizers.protocols import LabelReader, LabelTaker
from tests.regularizers.contract import RegularizerContract


class TestPatchDropout(RegularizerContract):
    """The count of patches is whole, and one is kept: the rates are tested below."""

    name = "patch_dropout"
    calibrated = False


class TestPatchDropoutOfVaryingRate(RegularizerContract):
    """One rate for the batch; how many patches are kept decides the shapes inside."""

    name = "patch_dropout"
    parameters: ClassVar[dict[str, Any]] = {"vary": True}
    calibrated = False

    def test_it_compiles_without_a_graph_break(self) -> None:
        pytest.skip("the number of patches is drawn while it runs")


@pytest.mark.parametrize("patches", [1, 2, 9, 36, 196])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_the_count_is_that_of_the_paper_and_at_least_one(patches: int, p: float) -> None:
    ids = kept_patches(5, patches, p)
    assert ids.shape == (5, max(1, math.floor((1 - p) * patches + 1e-9)))
    assert (ids.diff(dim=1) > 0).all()  # in their own order, none twice
    assert ids.min() >= 0
    assert ids.max() < patches
    x = torch.ones(5, 3, patches)
    rate = PatchDropout(p).measured_rate(x, patch_dropout(x, p))
    assert rate == pytest.approx(1 - ids.shape[1] / patches)


@pytest.mark.parametrize("window", [2, 4, 7])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.7])
def test_the_share_of_a_window_that_is_dropped_is_p_on_average(window: int, p: float) -> None:
    torch.manual_seed(0)
    kept = torch.zeros(window, window)
    for _ in range(4000):
        rows, columns = kept_lines(window, p)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert abs(len(rows) - window * (1 - p) ** 0.5) < 1
        kept[rows[:, None], columns] += 1 / 4000
    assert float(kept.mean()) == pytest.approx(1 - p, abs=0.01)
    assert (kept - (1 - p)).abs().max() < 0.05


def test_every_patch_is_kept_equally_often_and_each_sample_has_its_own() -> None:
    torch.manual_seed(0)
    ids = kept_patches(20_000, 12, 0.5)
    counts = torch.bincount(ids.flatten(), minlength=12) / 20_000
    torch.testing.assert_close(counts, torch.full((12,), 0.5), atol=0.02, rtol=0)
    assert len(ids.unique(dim=0)) == math.comb(12, 6)


@pytest.mark.parametrize("small", [1, 2, 3])
def test_a_small_target_is_lost_as_often_as_the_formula_says(small: int) -> None:
    torch.manual_seed(0)
    patches, kept = 36, 27
    ids = kept_patches(40_000, patches, 0.25)
    lost = (ids >= small).all(1).float().mean().item()
    wanted = math.comb(patches - small, kept) / math.comb(patches, kept)
    assert lost == pytest.approx(wanted, abs=0.01)
    protected = torch.zeros(500, patches, dtype=torch.bool)
    protected[:, :small] = True
    assert (kept_patches(500, patches, 0.25, protected)[:, :small] < small).all()


def test_of_too_many_protected_patches_a_random_part_is_kept() -> None:
    protected = torch.zeros(400, 10, dtype=torch.bool)
    protected[:, 2:] = True
    ids = kept_patches(400, 10, 0.5, protected)
    assert (ids >= 2).all()
    assert len(ids.unique(dim=0)) > 40


@pytest.mark.parametrize(
    ("size", "grid"),
    [((32, 48), (4, 6)), ((40, 40), (5, 5)), ((64,), (8,)), ((8, 16, 8), (2, 4, 2))],
)
def test_patches_with_foreground_are_those_with_a_labelled_pixel(
    size: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    labels = (torch.rand(3, *size) < 0.01).long() * 2
    found = patches_with_foreground(labels, math.prod(grid)).numpy().reshape(3, *grid)
    side = [n // g for n, g in zip(size, grid, strict=True)]
    for index in np.ndindex(3, *grid):
        box = tuple(slice(i * s, (i + 1) * s) for i, s in zip(index[1:], side, strict=True))
        assert found[index] == bool((labels[(index[0], *box)] > 0).any())
    assert 0 < found.mean() < 1


def test_labels_of_other_proportions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"35 patches form no grid on labels of \(64, 64\)"):
        patches_with_foreground(torch.zeros(1, 64, 64), 35)


def test_protected_foreground_needs_the_labels_of_the_batch() -> None:
    layer, x = PatchDropout(0.5, protect_foreground=True), torch.ones(2, 3, 4, 4)
    assert isinstance(layer, LabelTaker)
    assert not isinstance(layer, LabelReader)
    with pytest.raises(
        ValueError, match="needs the labels of the 2 samples of the batch, got none"
    ):
        layer(x)
    layer.labels = torch.zeros(3, 16, 16)
    with pytest.raises(ValueError, match="got 3"):
        layer(x)
    layer.labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    layer.labels[:, 9, 2] = 1  # patch (2, 0)
    for _ in range(20):
        assert (layer(x)[:, :, 2, 0] == 1).all()
    assert layer.eval()(x) is x


def test_a_varying_rate_is_even_from_zero_to_twice_p_and_one_for_the_batch() -> None:
    torch.manual_seed(0)
    layer, x = PatchDropout(0.25, vary=True), torch.ones(4, 1, 100)
    rates = []
    for _ in range(1500):
        y = layer(x)
        rates.append(layer.measured_rate(x, y))
        assert len({float(row.mean()) for row in y}) == 1
    assert np.mean(rates) == pytest.approx(0.255, abs=0.01)  # the count is rounded down
    assert np.quantile(rates, [0.1, 0.5, 0.9]) == pytest.approx([0.05, 0.25, 0.45], abs=0.03)
    high = PatchDropout(0.8, vary=True)
    assert min(high.measured_rate(x, high(x)) for _ in range(200)) >= 0.6


def test_dropped_positions_hold_the_mask_token_which_is_trained() -> None:
    layer = PatchDropout(0.5, prefix_tokens=1)
    layer.prepare(3)
    x = torch.rand(4, 3, 17).requires_grad_()
    y = layer(x)
    kept = torch.zeros(4, 17, dtype=torch.bool).scatter(1, layer.kept, True)
    assert kept[:, 0].all()
    assert (kept.sum(1) == 9).all()
    for b in range(4):
        assert torch.equal(y[b, :, kept[b]], x[b, :, kept[b]])
        gone = y[b, :, ~kept[b]]
        assert torch.equal(gone, layer.mask_token[:, None].expand_as(gone))
    y.sum().backward()
    assert torch.equal(layer.mask_token.grad, torch.full((3,), 32.0))
    assert torch.equal(x.grad.bool(), kept[:, None].expand_as(x))


def test_the_mask_token_is_beside_the_weights() -> None:
    layer = PatchDropout(0.5)
    layer.prepare(5)
    assert [weight.shape for weight in layer.parameters()] == [(5,)]
    assert not layer.state_dict()
    layer.load_state_dict({}, strict=True)
    twin = PatchDropout(0.5)
    twin.prepare(5)
    assert torch.equal(twin.mask_token, layer.mask_token)
    with torch.no_grad():
        layer.mask_token += 1
    own = twin.mask_token
    twin.load_memory(layer.memory())
    assert twin.mask_token is own  # an optimizer goes on with it
    assert torch.equal(twin.mask_token, layer.mask_token)
    assert torch.equal(copy.deepcopy(layer).mask_token, layer.mask_token)
    with pytest.raises(ValueError, match=r"expected .*\(5,\).*, got .*\(4,\)"):
        twin.load_memory({"mask_token": torch.zeros(4)})


def test_gathered_tokens_come_back_to_their_places() -> None:
    layer = PatchDropout(0.5)
    layer.prepare(6)
    tokens = torch.rand(3, 10, 6)
    y = layer(tokens.transpose(1, 2)).transpose(1, 2)
    assert layer.gathered(tokens).shape == (3, 5, 6)
    assert torch.equal(layer.completed(layer.gathered(tokens)), y)
    layer.eval()(tokens.transpose(1, 2))
    assert layer.gathered(tokens) is tokens
    assert layer.completed(tokens) is tokens
