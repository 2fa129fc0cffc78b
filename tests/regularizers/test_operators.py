"""Custom operators of Heuristic Dropout: one graph, a derivative, and plain rules where need be."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from medseg_reg.regularizers import HeuristicDropout, heuristic_dropout
from medseg_reg.regularizers.kernels import histogram, operators, planes

SHAPES = [(2, 6, 40, 50), (1, 70, 256, 300), (3, 5, 700, 513), (2, 3, 1, 1)]
ROOT = Path(__file__).parents[2]
LEVELS = histogram.level_thresholds(10, False)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: Triton's kernels, compiled"
)


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(2, 6, 8, 10) * torch.rand(6, 1, 1)).relu().to(dtype)


def chosen_planes() -> tuple[Tensor, Tensor]:
    return torch.tensor([[5, 0], [1, 2]]), torch.tensor([[True, False], [True, True]])


@needs_triton
@pytest.mark.slow
def test_the_kernels_agree_with_the_plain_rules_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, "tests/regularizers/interpreted.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_triton
def test_there_may_be_more_planes_than_a_second_axis_of_a_grid_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from medseg_reg.regularizers.kernels import triton_kernels

    grids: list[tuple[int, ...]] = []

    class Noted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(triton_kernels, "_planes_kernel", Noted())
    index = torch.arange(512).expand(130, -1)
    x = torch.zeros(130, 512, 1, 1)
    triton_kernels.filter_planes(x, index, torch.ones_like(index, dtype=torch.bool), True)
    assert math.prod(grids[0]) == 130 * 512
    assert all(n <= 65535 for n in grids[0][1:])


@pytest.mark.filterwarnings("ignore")
def test_the_operators_keep_the_contract_of_torch() -> None:
    x = example().requires_grad_()
    torch.library.opcheck(operators.sum_levels, (x.detach(), list(LEVELS)))
    torch.library.opcheck(operators.filter_planes, (x, *chosen_planes(), False))
    last = example().to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(operators.filter_planes, (last, *chosen_planes(), True))


@pytest.mark.parametrize("zero", [False, True])
def test_the_derivative_is_that_of_the_plain_rule_also_twice(zero: bool) -> None:
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    index, chosen = torch.tensor([[1], [0]]), torch.tensor([[True], [True]])
    torch.autograd.gradcheck(lambda x: operators.filter_planes(x, index, chosen, zero), x)
    torch.autograd.gradgradcheck(lambda x: operators.filter_planes(x, index, chosen, zero), x)


def test_elsewhere_than_on_a_gpu_the_operators_are_the_plain_rules() -> None:
    x = example()
    assert torch.equal(operators.sum_levels(x, list(LEVELS)), histogram.plain_sums(x, LEVELS))
    expected = planes.plain_filter(x, *chosen_planes(), False)
    assert torch.equal(operators.filter_planes(x, *chosen_planes(), False), expected)


@needs_triton
def test_maps_on_a_gpu_of_a_fitting_type_and_size_are_for_the_kernels() -> None:
    def on_gpu(**changes: Any) -> Any:
        facts = {"is_cuda": True, "dtype": torch.bfloat16, "size": 10, **changes}
        size = facts.pop("size")
        return SimpleNamespace(**facts, numel=lambda: size)

    assert operators.fits(on_gpu(), levels=11)
    assert not operators.fits(on_gpu(), levels=operators.MOST_LEVELS + 1)
    for changes in ({"dtype": torch.float64}, {"size": 0}, {"size": 2**31}, {"is_cuda": False}):
        assert not operators.fits(on_gpu(**changes))


def test_a_kernel_that_fails_its_trial_is_told_of_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no\nptxas")

    broken = SimpleNamespace(sum_levels=lambda x, t: x.new_zeros(2, 5, 4), filter_planes=fails)
    monkeypatch.setattr(operators, "_kernels", lambda: broken)
    monkeypatch.setattr(operators, "fits", lambda x, levels=0: True)
    operators._sound.cache_clear()
    x = example()
    with pytest.warns(UserWarning, match="kernel sum_levels is not used on cpu: AssertionError"):
        sums = operators.sum_levels(x, list(LEVELS))
    with pytest.warns(UserWarning, match="filter_planes is not used on cpu: RuntimeError: no ptx"):
        filtered = operators.filter_planes(x, *chosen_planes(), False)
    assert torch.equal(sums, histogram.plain_sums(x, LEVELS))
    assert torch.equal(filtered, planes.plain_filter(x, *chosen_planes(), False))
    # Told once: a second warning would be an error here.
    assert torch.equal(operators.sum_levels(x, list(LEVELS)), sums)
    operators._sound.cache_clear()


@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_these_operators_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "fits", lambda x, levels=0: True)
    monkeypatch.setattr(operators, "_sound", lambda name, device: False)
    nodes: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nodes.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    layer = HeuristicDropout(0.5)
    x = example().requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    y.sum().backward()
    torch._dynamo.reset()
    (only,) = nodes
    assert sum("sum_levels" in name for name in only) == 1
    assert sum("filter_planes" in name for name in only) == 1
    monkeypatch.setattr(operators, "fits", lambda x, levels=0: False)
    leaf = example().requires_grad_()
    expected = layer(leaf)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, leaf.grad)


COMPILED = """
import warnings
warnings.simplefilter("ignore")
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from medseg_reg.regularizers.kernels import histogram, triton_kernels

class Pretended:
    capability = 80
    def get_current_target(self): return GPUTarget("cuda", self.capability, 32)
    def get_current_device(self): return self.capability
    def get_current_stream(self, device=None): return 0

class CompiledOnly:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        def launch(*arguments, **options):
            made = self.kernel.warmup(*arguments, grid=grid, **options)
            assert len(made.asm["ptx"]) > 1000 and len(made.asm["cubin"]) > 1000
        return launch

gpu = Pretended()
driver.set_active(gpu)
for name in ("_sums_kernel", "_planes_kernel"):
    setattr(triton_kernels, name, CompiledOnly(getattr(triton_kernels, name)))
levels = histogram.level_thresholds(10, False)
index, chosen = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool)
kinds = ((80, torch.float32), (80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16))
for gpu.capability, dtype in kinds:
    for shape in ((2, 40, 64, 64), (2, 5, 1, 8), (2, 1, 17, 1)):
        x = torch.zeros(shape, dtype=dtype)
        for x in (x, x.to(memory_format=torch.channels_last)):
            triton_kernels.sum_levels(x, levels)
            triton_kernels.filter_planes(x, index, chosen, bool(shape[1] == 5))
print("compiled")
"""


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "compiled\n", done.stderr[-2000:]


@needs_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu_the_selection_and_the_result_are_those_of_the_plain_rules(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.rand(shape[1], 1, 1)).relu().to("cuda", dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    for name in ("sum_levels", "filter_planes"):
        assert operators._sound(name, x.device)
    sums, expected = operators.sum_levels(x, LEVELS), histogram.plain_sums(x.float(), LEVELS)
    assert torch.equal(sums[..., 1:], expected[..., 1:])
    torch.testing.assert_close(sums[..., 0], expected[..., 0], rtol=1e-4, atol=1e-6)
    results = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(operators, "fits", lambda x, levels=0: False)
        torch.manual_seed(1)
        leaf = x.detach().clone().requires_grad_()
        y = heuristic_dropout(leaf, 0.3)
        y.float().square().sum().backward()
        results += [(y.detach(), leaf.grad)]
    torch.testing.assert_close(results[0], results[1])


@needs_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_a_gpu_a_compiled_layer_gives_the_same(mode: str | None) -> None:
    layer, x = HeuristicDropout(0.5), example().cuda()
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x).clone(), expected)
