"""A filled network is saved, compiled, exported and trained in parallel like a plain one."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medseg_reg.insertion import insert, inserted, remove
from tests.insertion.zoo import FAST, Case
from tests.insertion.zoo_more import SLOW
from tests.processes import in_two_processes

PLACES = ["between_convs", "after_block", "skip", "input", "head"]
TINY = Case(
    lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ),
    (1, 12, 12),
    {"between_convs": 1, "after_block": 1, "head": 1},
    needs="torch",
)
some_networks = pytest.mark.parametrize(
    "case",
    [
        pytest.param(TINY, id="tiny"),
        *(
            pytest.param({**FAST, **SLOW}[name], id=name, marks=pytest.mark.slow)
            for name in (
                "AttentionUnet",
                "DynUNet-residual",
                "smp-Unet",
                "smp-Unet-convnext",
                "timm-resnet18",
            )
        ),
    ],
)


def filled(case: Case, places: list[str] = PLACES) -> tuple[nn.Module, nn.Module]:
    """A network with layers, and the plain one."""
    network = case.network()
    plain = copy.deepcopy(network)
    known = [place for place in places if place in case.kinds or place == "input"]
    insert(network, "spatial_dropout", known, example=case.example(), p=0.3)
    insert(network, "heuristic_dropout", "between_convs", example=case.example(), p=0.3)
    return network, plain


@some_networks
def test_a_compiled_network_without_a_break_gives_the_same(case: Case) -> None:
    network, plain = filled(case)
    x = case.example(2)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(network.eval(), backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), plain.eval()(x))
    network.train()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    y = compiled(x)
    torch.manual_seed(0)
    assert torch.allclose(y, network(x), atol=1e-5)
    assert not torch.allclose(y, compiled(x))
    y.square().mean().backward()


@some_networks
def test_the_exported_graph_is_that_of_the_plain_network(case: Case) -> None:
    network, plain = filled(case)
    x = (case.example(),)
    exported = torch.export.export(network.eval(), x)
    reference = torch.export.export(plain.eval(), x)
    assert str(exported.graph) == str(reference.graph)
    assert list(exported.state_dict) == list(reference.state_dict)
    with torch.no_grad():
        assert torch.equal(exported.module()(*x), plain(*x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@some_networks
def test_the_onnx_graph_is_that_of_the_plain_network(case: Case, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    x = (case.example(),)
    nodes = []
    for name, network in zip(("filled", "plain"), filled(case), strict=True):
        path = tmp_path / f"{name}.onnx"
        torch.onnx.export(network.eval(), x, path, dynamo=True, verbose=False)
        graph = onnx.load(path).graph
        nodes.append([(node.op_type, *node.input, *node.output) for node in graph.node])
    assert nodes[0] == nodes[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated:FutureWarning")
def test_a_traced_network_gives_the_same() -> None:
    network, plain = filled(TINY)
    x = TINY.example()
    with torch.no_grad():
        traced = torch.jit.trace(network.eval(), x)
        assert torch.equal(traced(x), plain.eval()(x))


LOADER = """
import sys
import torch
from medseg_reg.insertion import inserted, remove
network = torch.load(sys.argv[1], weights_only=False)
# A new hook must not take the number of one that was loaded.
calls = []
for _ in range(200):
    for module in network.modules():
        module.register_forward_pre_hook(lambda m, a: calls.append(m))
x = torch.load(sys.argv[2])
torch.manual_seed(0)
torch.save(network(x), sys.argv[3])
print(len(inserted(network)), len(remove(network)), len(inserted(network)))
"""


def test_a_network_loaded_in_another_process_keeps_its_layers(tmp_path: Path) -> None:
    network, _ = filled(TINY)
    x = TINY.example(2)
    paths = [str(tmp_path / name) for name in ("network.pt", "x.pt", "y.pt")]
    torch.save(network, paths[0])
    torch.save(x, paths[1])
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *paths],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count = str(len(inserted(network)))
    assert done.stdout.split() == [count, count, "0"]
    torch.manual_seed(0)
    # Not to the last bit: the other process may share its work among other threads.
    torch.testing.assert_close(torch.load(paths[2]), network(x))


def test_weights_alone_are_saved_as_of_the_plain_network() -> None:
    network, plain = filled(FAST["DynUNet"])
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    remove(network)
    network.load_state_dict(plain.state_dict())


def train(rank: int) -> dict[str, torch.Tensor]:
    """Take two steps in one of two processes; return the weights."""
    network, _ = filled(FAST["BasicUNet"])
    parallel = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step in range(2):
        torch.manual_seed(10 * rank + step)  # other images and other masks in each process
        optimizer.zero_grad()
        parallel(torch.rand(2, 1, 32, 32)).square().mean().backward()
        optimizer.step()
    return network.state_dict()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_processes_stay_in_step(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    first, second = in_two_processes(train, tmp_path)
    start = FAST["BasicUNet"].network().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], start[key]) for key in first)
