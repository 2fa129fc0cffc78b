"""Cutout against every possible hole, the published squares, and its edge cases."""

import importlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import Cutout, cutout
from tests.reference import cutout as reference
from tests.regularizers.contract import RegularizerContract

module = importlib.import_module("medseg_reg.regularizers.cutout")  # a function hides its name


class TestCutout(RegularizerContract):
    name = "cutout"


class TestThreeHoles(RegularizerContract):
    name = "cutout"
    parameters = {"holes": 3}  # noqa: RUF012


class TestFaithful(RegularizerContract):
    """The size is that of ``length``, whatever p; the rates are tested below."""

    name = "cutout"
    parameters = {"faithful": True, "length": 6}  # noqa: RUF012
    calibrated = False


@pytest.mark.parametrize("size", [(1,), (5,), (1, 1), (3, 4), (2, 5), (2, 1, 3)])
@pytest.mark.parametrize("holes", [1, 2])
def test_the_share_of_every_size_is_that_of_all_possible_holes(
    size: tuple[int, ...], holes: int
) -> None:
    last = 2 * max(size) - 1
    shares = [float(module._share(torch.tensor(i), size, holes)) for i in range(last + 1)]
    expected = [reference.share(i, size, holes) for i in range(last + 1)]
    np.testing.assert_allclose(shares, expected, atol=1e-12)
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(1)
    assert (np.diff(shares) > 0).all()


@pytest.mark.parametrize("size", [(1,), (300,), (4, 4), (37, 20), (512, 512), (16, 40, 33)])
@pytest.mark.parametrize("holes", [1, 4, 32])
@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.97])
def test_two_neighbouring_sizes_make_the_expected_share_p(
    size: tuple[int, ...], holes: int, p: float
) -> None:
    level, odds = module._cached_search(size, holes, p)
    below, above = (float(module._share(torch.tensor(i), size, holes)) for i in (level, level + 1))
    assert 0 <= odds < 1
    assert below + odds * (above - below) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("size", [(7,), (6, 9), (5, 4), (3, 5, 4)])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_every_hole_is_one_of_the_reference_and_each_as_likely(
    size: tuple[int, ...], p: float
) -> None:
    torch.manual_seed(0)
    level, odds = module._cached_search(size, 1, p)
    centres = list(itertools.product(*map(range, size)))
    small, large = (
        [reference.box(centre, size, reference.sides(i, size)) for centre in centres]
        for i in (level, level + 1)
    )
    dropped = cutout(torch.ones(4000, 2, *size), p) == 0
    assert torch.equal(dropped[:, 0], dropped[:, 1])  # in all channels
    assert {mask.numpy().tobytes() for mask in dropped[:, 0]} <= {
        mask.tobytes() for mask in small + large
    }
    expected = (1 - odds) * np.mean(small, axis=0) + odds * np.mean(large, axis=0)
    np.testing.assert_allclose(dropped[:, 0].float().mean(0).numpy(), expected, atol=0.04)


def test_the_sides_are_in_proportion_to_those_of_the_image() -> None:
    torch.manual_seed(0)
    for mask in cutout(torch.ones(200, 1, 100, 25), 0.1)[:, 0] == 0:
        height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
        if mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any():
            continue  # cut off at the border
        assert height / width == pytest.approx(4, rel=0.1)


def test_nothing_is_rescaled() -> None:
    torch.manual_seed(0)
    x = torch.rand(50, 3, 20, 20) + 1
    y = cutout(x, 0.3)
    assert torch.equal(y[y != 0], x[y != 0])
    assert (y == 0).any()


def test_several_holes_are_several() -> None:
    torch.manual_seed(0)
    y = cutout(torch.ones(300, 1, 200), 0.2, holes=4)[:, 0] == 0
    starts = y[:, 0].int() + (y[:, 1:] & ~y[:, :-1]).sum(1)
    assert starts.max() == 4
    assert starts.float().mean() > 2


@pytest.mark.parametrize("size", [(9,), (6, 11), (4, 5, 6)])
@pytest.mark.parametrize("length", [1, 2, 5, 6, 30])
def test_the_faithful_rule_cuts_the_published_squares(size: tuple[int, ...], length: int) -> None:
    torch.manual_seed(0)
    allowed = {
        reference.published_hole(centre, size, length).tobytes()
        for centre in itertools.product(*map(range, size))
    }
    y = cutout(torch.ones(3000, 1, *size), 0.3, length=length, faithful=True)[:, 0] == 0
    assert {mask.numpy().tobytes() for mask in y} == allowed


@pytest.mark.parametrize(("length", "share"), [(16, 0.1914), (8, 0.0549), (20, 0.2781)])
def test_the_published_lengths_cut_the_documented_shares(length: int, share: float) -> None:
    expected = np.mean(
        [
            reference.published_hole(centre, (32, 32), length)
            for centre in itertools.product(range(32), repeat=2)
        ]
    )
    assert expected == pytest.approx(share, abs=1e-4)
    torch.manual_seed(0)
    for p in (0.01, 0.9):  # p only switches it on
        layer, x = Cutout(p, length=length, faithful=True), torch.ones(4000, 1, 32, 32)
        assert layer.measured_rate(x, layer(x)) == pytest.approx(share, abs=0.01)


def test_an_odd_length_loses_a_pixel_and_length_one_all() -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 1, 30)
    counts = [
        int((cutout(x, 0.1, length=length, faithful=True) == 0).sum(-1).max())
        for length in (7, 6, 1)
    ]
    assert counts == [6, 6, 0]


def test_the_faithful_length_is_16_unless_given() -> None:
    assert Cutout(faithful=True).length == 16
    assert Cutout().length is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_follows_a_schedule() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    layer, x = Cutout(holes=2).train(), torch.rand(5, 1, 24, 30)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for p in np.linspace(0.005, 0.6, 20):
        layer.p = float(p)
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        assert torch.equal(compiled(x), expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"holes": 0}, "holes must be a whole number, 1 to 32; got 0"),
        ({"holes": 33}, "holes must be a whole number, 1 to 32; got 33"),
        ({"length": 8}, "length=8 is the side of the published hole, which needs faithful=True"),
        ({"length": 0, "faithful": True}, "length must be a whole number, 1 or more; got 0"),
        ({"length": 2.0, "faithful": True}, "length must be a whole number, 1 or more"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cutout(0.1, **parameters)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 2, 3)
    assert cutout(x, 0.5, training=False) is x
    assert cutout(x, 0.0) is x
