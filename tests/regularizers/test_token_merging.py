"""Token merging: the groups of the paper, exact counts, sizes that weigh, and all tokens back."""

import math

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import (
    TokenGroups,
    TokenMerging,
    match_tokens,
    merge_tokens,
    token_merging,
    unmerge_tokens,
    weigh_keys,
)
from tests.reference import token_merging as reference
from tests.regularizers.contract import RegularizerContract


class TestTokenMerging(RegularizerContract):
    """The count of patches is whole, and one is kept: the rates are tested below."""

    name = "token_merging"
    calibrated = False


def test_in_evaluation_it_merges_if_asked_to_by_the_fixed_split_and_draws_nothing() -> None:
    layer, x = TokenMerging(0.3, in_evaluation=True).eval(), torch.rand(2, 4, 5, 6)
    state = torch.get_rng_state()
    assert torch.equal(layer(x), token_merging(x, 0.3, shuffle=False))
    assert torch.equal(torch.get_rng_state(), state)
    layer.p = 0.0
    assert layer(x) is x
    with pytest.raises(ValueError, match="TokenMerging: expected"):
        TokenMerging(0.3, in_evaluation=True).eval()(torch.rand(3, 4))


def sets(groups: TokenGroups, sample: int) -> set[frozenset[int]]:
    numbers = groups.group[sample]
    return {frozenset((numbers == g).nonzero()[:, 0].tolist()) for g in numbers.unique()}


@pytest.mark.parametrize(("tokens", "prefix"), [(12, 0), (13, 1), (7, 2), (35, 0)])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8, 0.97])
def test_the_groups_are_those_of_the_reference(tokens: int, prefix: int, share: float) -> None:
    torch.manual_seed(tokens)
    x, count = torch.randn(3, tokens, 5, dtype=torch.float64), int(share * (tokens - prefix))
    groups = match_tokens(x, count, prefix)
    means = merge_tokens(x, groups)
    for b in range(3):
        expected = reference.merged(x[b].numpy(), count, prefix)
        assert sets(groups, b) == {frozenset(group) for group in expected}
        assert len(expected) == tokens - count
        for number, size in enumerate(groups.sizes[b]):
            inside = groups.group[b] == number
            assert inside.sum() == size
            torch.testing.assert_close(means[b, number], x[b, inside].mean(0))
    assert torch.equal(groups.group[:, :prefix], torch.arange(prefix).expand(3, -1))


def test_equal_tokens_are_merged_first_and_come_back_as_they_were() -> None:
    x = torch.eye(8)[[0, 0, 1, 2, 3, 1, 4, 5]][None]  # two pairs of equal tokens, one in each set
    groups = match_tokens(x, 2)
    assert sets(groups, 0) >= {frozenset({0, 1}), frozenset({2, 5})}
    assert torch.equal(unmerge_tokens(merge_tokens(x, groups), groups), x)


def test_a_shuffled_split_lets_any_two_tokens_meet() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 3)
    x[0, 2] = 2 * x[0, 4]  # both in set A of the fixed split, and of cosine 1
    met = [frozenset({2, 4}) in sets(match_tokens(x, 1, shuffle=True), 0) for _ in range(400)]
    assert frozenset({2, 4}) not in sets(match_tokens(x, 1), 0)
    assert np.mean(met) == pytest.approx(3 / 5, abs=0.08)  # in different halves of six


@pytest.mark.parametrize("size", [(1,), (2,), (3, 1), (5, 7), (16, 16), (2, 3, 5)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 0.99])
def test_the_count_is_exact_on_grids_of_any_size(size: tuple[int, ...], p: float) -> None:
    layer, x = TokenMerging(p), torch.randn(2, 4, *size)
    y, patches = layer(x), math.prod(size)
    count = math.floor(p * patches + 1e-9)
    assert layer.measured_rate(x, y) == pytest.approx(count / patches)
    assert len(y[0].flatten(1).T.unique(dim=0)) == patches - count
    assert (y is x) == (count == 0)
    torch.testing.assert_close(y.mean((0, *range(2, y.dim()))), x.mean((0, *range(2, x.dim()))))


def test_more_cannot_be_merged_than_there_are() -> None:
    with pytest.raises(ValueError, match="of 4 patches at most one less"):
        match_tokens(torch.rand(1, 5, 3), 4, prefix_tokens=1)


def test_prefix_tokens_stay_alone() -> None:
    x = torch.ones(2, 3, 10)
    layer = TokenMerging(0.9, prefix_tokens=2)
    layer(x)
    assert layer.groups is not None
    assert layer.groups.sizes[:, :2].eq(1).all()
    assert layer.groups.sizes.shape[1] == 2 + 1
    assert layer.measured_rate(x, x) == pytest.approx(7 / 8)


def test_sizes_make_the_attention_that_over_all_tokens() -> None:
    generator = np.random.default_rng(0)
    query, key, value = (generator.normal(size=(4, 3)) for _ in range(3))
    sizes = np.array([1, 3, 2, 1])
    each = np.repeat(np.arange(4), sizes)
    expected = reference.attention(query, key[each], value[each])
    weights = torch.from_numpy(query @ key.T / np.sqrt(3)).softmax(-1)[None, None]
    found = weigh_keys(weights, torch.from_numpy(sizes).float()[None])[0, 0].numpy() @ value
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_token_gets_the_update_of_its_group_beside_its_own_features() -> None:
    torch.manual_seed(0)
    layer, x = TokenMerging(0.5), torch.randn(2, 9, 4)
    inside = layer.enter(x)
    groups = layer.groups
    assert groups is not None
    assert inside.shape == (2, 5, 4)
    y = layer.leave(inside + torch.arange(5.0)[:, None])
    torch.testing.assert_close(y - x, groups.group[..., None].expand_as(x).float())
    alone = groups.sizes.gather(1, groups.group) == 1
    assert torch.equal(y[alone], (x + groups.group[..., None])[alone])  # to the last bit
    assert layer.groups is None


def test_idle_layers_hand_the_same_tensor_through() -> None:
    x = torch.rand(1, 8, 3)
    for layer in (TokenMerging(0.0), TokenMerging(0.5).eval(), TokenMerging(0.1)):
        assert layer.enter(x) is x
        assert layer.leave(x) is x
    assert token_merging(x, 0.5, training=False) is x


def test_a_pass_that_was_broken_off_leaves_nothing_for_the_next() -> None:
    layer = TokenMerging(0.5, shuffle=False)
    layer.enter(torch.rand(5, 8, 3))
    x = torch.rand(2, 6, 3)
    assert layer.enter(x).shape == (2, 3, 3)
    layer.enter(torch.rand(5, 8, 3))
    layer.eval()
    assert layer.enter(x) is x
