"""When the loops that numba compiles are used; `test_kernels.py` has what they give."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from medseg_reg.regularizers import HeuristicDropout
from medseg_reg.regularizers.kernels import histogram, loops, planes

LEVELS = histogram.level_thresholds(10, False)
INDEX, CHOSEN = torch.tensor([[5, 0], [1, 2]]), torch.tensor([[True, False], [True, True]])


@pytest.fixture
def numba(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(loops, "_HERE", True)


def example(*shape: int) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(shape or (2, 6, 8, 10))
    return (x * torch.rand(x.shape[1]).view(-1, *[1] * (x.dim() - 2))).relu()


def test_dense_maps_of_two_types_are_for_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_HERE", True)
    monkeypatch.setattr(loops, "_sound", lambda name, dtype, rows: True)
    x = example()
    for fitting in (x, x.bfloat16(), x.to(memory_format=torch.channels_last), x[:1, :, :, :1]):
        assert loops._fits(fitting.clone(), "filter_planes")
    for other in (x.double(), x.half(), x[..., 1:], x[:0], x.to("meta"), x[0, 0]):
        assert not loops._fits(other, "filter_planes")


@pytest.mark.skipif(os.environ["MEDSEG_REG_NUMBA"] != "0", reason="asked for numba everywhere")
def test_numba_may_be_left_alone() -> None:
    assert loops.level_sums(example(), LEVELS) is None
    assert loops.top_scores(example(), LEVELS, 2.0, False, 1) is None
    assert loops.filter_planes(example(), INDEX, CHOSEN, False) is None


@pytest.mark.parametrize("shape", [(3, 24, 40, 30), (2, 7, 1, 1), (2, 5, 64), (1, 4, 3, 5, 6)])
@pytest.mark.parametrize("signed", [False, True])
def test_the_layer_selects_and_filters_as_without(
    shape: tuple[int, ...], signed: bool, numba: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (example(*shape) - 0.1 * signed).requires_grad_()
    layer = HeuristicDropout(0.4, signed=signed).train()
    results = []
    for here in (True, False):
        monkeypatch.setattr(loops, "_HERE", here)
        torch.manual_seed(3)
        y = layer(x)
        (grad,) = torch.autograd.grad((y * x.detach().cos()).sum(), x)
        results.append((y, grad))
    torch.testing.assert_close(*(y for y, _ in results), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(grad for _, grad in results), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_gradient_is_right(numba: None) -> None:
    x = example().requires_grad_()
    y = planes.filter_channels(x, INDEX, CHOSEN, False)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    twin = x.detach().double().requires_grad_()  # doubles are not for the loops
    y = planes.filter_channels(twin, INDEX, CHOSEN, False)
    (first,) = torch.autograd.grad(y.pow(3).sum(), twin, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), twin)
    torch.testing.assert_close(second.double(), expected, rtol=1e-3, atol=1e-2)


def test_traced_maps_take_the_plain_rules(numba: None) -> None:
    layer, x = HeuristicDropout(0.5).train(), example()

    def total(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return layer(x).square().sum()

    leaf = x.clone().requires_grad_()
    total(leaf).backward()
    torch.testing.assert_close(torch.func.grad(total)(x), leaf.grad)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()


def test_no_thread_is_started(numba: None) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    if not os.path.isdir("/proc/self/task"):
        pytest.skip("counts threads as Linux does")
    x = example(2, 64, 64, 64).requires_grad_()
    x.clone().sum().backward()  # autograd may have threads of its own
    before = threads()
    HeuristicDropout(0.3).train()(x).sum().backward()
    assert threads() == before


def test_a_loop_that_fails_its_trial_is_told_of_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no\nLLVM")

    def does_nothing(*_: Any) -> None: ...

    broken = SimpleNamespace(
        sums_of_planes=lambda planes, levels, out: out.fill(0),
        top_of_planes=fails,
        filter_planes=does_nothing,
    )
    monkeypatch.setattr(loops, "_loops", lambda: broken)
    monkeypatch.setattr(loops, "_HERE", True)
    loops._sound.cache_clear()
    x = example()
    attempts: dict[str, Callable[[], Tensor | None]] = {
        "level_sums is not used: AssertionError": lambda: loops.level_sums(x, LEVELS),
        "top_scores is not used: RuntimeError: no LLVM": lambda: loops.top_scores(
            x, LEVELS, 2.0, False, 1
        ),
        "filter_planes is not used: AssertionError": lambda: loops.filter_planes(
            x, INDEX, CHOSEN, False
        ),
    }
    for told, attempt in attempts.items():
        with pytest.warns(UserWarning, match=told):
            assert attempt() is None
    for attempt in attempts.values():  # a second warning would be an error here
        assert attempt() is None
    loops._sound.cache_clear()


def test_numba_is_imported_when_a_map_needs_it() -> None:
    pytest.importorskip("numba")
    code = (
        "import sys, torch; from medseg_reg.regularizers import HeuristicDropout;"
        "layer = HeuristicDropout(.5); layer.eval()(torch.rand(1, 4, 8, 8));"
        "print('numba' in sys.modules); layer.train()(torch.rand(1, 4, 8, 8));"
        "print('numba' in sys.modules)"
    )
    environment = {**os.environ, "MEDSEG_REG_NUMBA": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
