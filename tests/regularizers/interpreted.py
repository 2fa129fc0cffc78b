"""The Triton kernels in Triton's interpreter, beside the plain rules; run by test_operators.py.

    TRITON_INTERPRET=1 python -m pytest -n 0 tests/regularizers/interpreted.py

In a process of its own, because the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from medseg_reg.regularizers import heuristic_dropout, heuristic_scores
from medseg_reg.regularizers.kernels import histogram, operators, planes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_operators.py", allow_module_level=True)

from medseg_reg.regularizers.kernels import triton_kernels

# Few, because the interpreter takes its time for each.
LEVELS = histogram.level_thresholds(4, False)
SIGNED = histogram.level_thresholds(4, True)
PAIRS = pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float32),
        ("channels_last", torch.bfloat16),
        ("sliced", torch.float16),
    ],
)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout; `sliced` is a view with gaps along each axis."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = x.new_full((x.shape[0], 2 * x.shape[1], *(n + 1 for n in x.shape[2:])), math.nan)
        inner = wide[:, ::2, 1:, :-1]
        return inner.copy_(x)
    return x


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that small maps are many of them, and several programs' work."""
    monkeypatch.setattr(triton_kernels, "_TILE", 64)
    monkeypatch.setattr(triton_kernels, "_SHARE", 128)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let maps on the CPU take the way of those on a GPU; the names of the kernels that ran."""
    ran: list[str] = []
    real = {name: getattr(triton_kernels, name) for name in ("sum_levels", "filter_planes")}
    for name, kernel in real.items():
        monkeypatch.setattr(
            triton_kernels, name, lambda *a, n=name, k=kernel: (ran.append(n), k(*a))[1]
        )
    monkeypatch.setattr(operators, "fits", lambda x, levels=0: True)
    operators._sound.cache_clear()
    yield ran
    operators._sound.cache_clear()


@PAIRS
@pytest.mark.usefixtures("small_tiles")
def test_counts_are_exact_and_deviations_right(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = laid_out((torch.randn(2, 3, 11, 13) + 0.3).to(dtype), layout)
    found, expected = triton_kernels.sum_levels(x, SIGNED), histogram.plain_sums(x.float(), SIGNED)
    assert torch.equal(found[..., 1:], expected[..., 1:])
    assert found.is_contiguous()
    exact = x.double()
    deviations = (exact - exact.mean((2, 3), keepdim=True)).square().sum((2, 3))
    torch.testing.assert_close(found[..., 0].double(), deviations, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 50), (1, 2, 4, 5, 6), (2, 3, 1, 1), (1, 1, 1, 9)])
def test_maps_of_any_dimension_and_of_one_pixel(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    found, expected = triton_kernels.sum_levels(x, LEVELS), histogram.plain_sums(x, LEVELS)
    assert torch.equal(found[..., 1:], expected[..., 1:])
    torch.testing.assert_close(found[..., 0], expected[..., 0])


@pytest.mark.usefixtures("small_tiles")
def test_a_mean_far_from_zero_does_not_cancel() -> None:
    torch.manual_seed(0)
    x = 0.1 * torch.randn(1, 3, 9, 16) + torch.tensor([0.0, 30.0, 3000.0])[:, None, None]
    found = triton_kernels.sum_levels(x, LEVELS)[..., 0].double()
    exact = x.double()
    expected = (exact - exact.mean((2, 3), keepdim=True)).square().sum((2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of infinity
def test_dead_constant_and_broken_channels_score_as_by_the_plain_rule(
    as_on_a_gpu: list[str],
) -> None:
    x = torch.randn(1, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[0, 1], x[0, 2, 3, 3], x[0, 3, 3, 3] = 0, 0.5, math.nan, math.inf
    score = heuristic_scores(x, bins=4).score[0]
    assert "sum_levels" in as_on_a_gpu
    assert score[0] == pytest.approx(2e7, rel=1e-4)
    assert score[1] == pytest.approx(2e7, rel=1e-4)
    assert not score[2:4].isfinite().any()
    assert score[4].isfinite()


@PAIRS
@pytest.mark.parametrize(
    ("zero", "size"), [(False, (7, 9)), (True, (7, 9)), (False, (33, 40)), (True, (33, 40))]
)
def test_chosen_planes_are_filtered_and_no_others(
    layout: str, dtype: torch.dtype, zero: bool, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x = laid_out(torch.randn(2, 5, *size).to(dtype), layout)  # the larger are two programs' work
    index = torch.tensor([[4, 1, 0], [2, 3, 0]])
    chosen = torch.tensor([[True, False, True], [True, True, False]])
    found = triton_kernels.filter_planes(x, index, chosen, zero)
    torch.testing.assert_close(found, planes.plain_filter(x, index, chosen, zero))
    assert found.stride() == torch.empty_like(x).stride()
    for sample, channel in ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 4)):
        assert torch.equal(found[sample, channel], x[sample, channel])


@PAIRS
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_the_selection_output_and_gradient_are_those_of_the_plain_rules(
    layout: str,
    dtype: torch.dtype,
    signed: bool,
    monkeypatch: pytest.MonkeyPatch,
    as_on_a_gpu: list[str],
) -> None:
    torch.manual_seed(0)
    shape = (2, 6, 12, 13)
    x = torch.randn(shape) * torch.rand(shape[1], 1, 1)
    x = laid_out((x if signed else x.relu()).to(dtype), layout)
    weight = torch.randn(shape).to(dtype)
    results = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(operators, "fits", lambda x, levels=0: False)
        torch.manual_seed(1)
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = heuristic_dropout(leaf, 0.3, bins=3, signed=signed)
        (y * weight).sum().backward()
        results.append((y.detach(), leaf.grad))
        if kernels:  # the trials, then the forward and the backward pass
            assert as_on_a_gpu.count("filter_planes") >= 2
            assert as_on_a_gpu[-1] == "filter_planes"
    (y, grad), (expected, expected_grad) = results
    changed = [(value != x).flatten(2).any(-1) for value in (y, expected)]
    assert torch.equal(*changed)
    assert 0 < changed[0].sum() < changed[0].numel()
    assert y.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, expected_grad)
