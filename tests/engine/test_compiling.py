"""A compiled training ends like one that is not, and goes on exactly."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from medseg_reg.config import parse_config
from medseg_reg.engine.compiling import compiled_pass, require_compilable, told_in_a_line
from medseg_reg.engine.fit import fit
from medseg_reg.errors import MedsegError
from medseg_reg.networks.build import build_network
from tests.stores import make_store
from tests.training import same_weights, tiny_config

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler"
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_network(in_channels=1, classes=2, head="softmax", name="unet", channels=[4, 8])


@pytest.fixture
def _traced_alone(monkeypatch):
    """Trace without a compiler: `aot_eager` runs what was traced by torch's own kernels."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: real(f, backend="aot_eager", **more))
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_traced_alone")
def test_the_compiled_pass_gives_the_same_and_keeps_the_names(network):
    names, image = list(network.state_dict()), torch.rand(2, 1, 32, 32)
    expected = network.train()(image)
    assert torch.allclose(compiled_pass(network)(image), expected, atol=1e-5)
    assert list(network.state_dict()) == names


@pytest.mark.usefixtures("_traced_alone")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_with_layers_and_changing_rates_ends_as_one_that_is_not(tmp_path):
    store = make_store(tmp_path / "store", cases=6, slices=2, size=32)
    layers = [
        {"name": "spatial_dropout", "places": "between_convs", "p": 0.2, "schedule": "linear"},
        {"name": "heuristic_dropout", "places": "after_block", "p": 0.3},
    ]
    runs = {}
    for name in ("plain", "compiled", "again"):
        content = tiny_config(
            store.path,
            tmp_path / name,
            training__compile=name != "plain",
            training__precision="32",
            training__epochs=2,
            regularization__architecture=layers,
        )
        torch._dynamo.reset()
        runs[name] = fit(parse_config(content, "test")).path
    assert same_weights(runs["compiled"], runs["again"])
    plain, compiled = (load_file(runs[n] / "weights.safetensors") for n in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    # The layers draw the same maps in both, so only rounding differs.
    for key, value in plain.items():
        assert torch.allclose(value.float(), compiled[key].float(), atol=0.02), key


@pytest.mark.parametrize(
    ("wanted", "accelerator", "mode", "steps"),
    [
        (True, "cuda", None, 0),
        ("reduce-overhead", "cuda", "reduce-overhead", 2),
        ("max-autotune", "cuda", "max-autotune", 2),
        ("max-autotune", "cpu", "max-autotune", 0),
    ],
)
def test_a_mode_reaches_the_compiler_and_steps_of_graphs_are_told(
    monkeypatch, network, wanted, accelerator, mode, steps
):
    asked, began = [], []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: began.append(True))
    run = compiled_pass(network.train(), wanted, accelerator)
    image = torch.rand(2, 1, 32, 32)
    assert run(image).shape == run(image).shape == (2, 2, 32, 32)
    assert asked == [{"dynamic": False, "mode": mode}]
    assert len(began) == steps


def test_cuda_graphs_without_a_gpu_are_refused_before_a_file_is_written(tmp_path):
    store = make_store(tmp_path / "store", cases=6, slices=2, size=32)
    content = tiny_config(store.path, tmp_path / "run", training__compile="reduce-overhead")
    with pytest.raises(MedsegError, match=r"compile 'reduce-overhead'.*which a cpu does not have"):
        fit(parse_config(content, "test"))
    assert not (tmp_path / "run").exists()
    require_compilable("reduce-overhead", "cuda")
    for accelerator in ("cpu", "mps"):
        for fine in (False, True, "max-autotune"):
            require_compilable(fine, accelerator)


def test_other_modes_are_refused_by_the_configuration(tmp_path):
    with pytest.raises(MedsegError, match=r"training\.compile"):
        parse_config(tiny_config(tmp_path, tmp_path / "r", training__compile="fast"), "test")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@pytest.mark.filterwarnings("ignore")
def test_a_run_of_cuda_graphs_ends_as_one_without(tmp_path):
    store = make_store(tmp_path / "store", cases=6, slices=4, size=32)
    weights = []
    for name, wanted in (("plain", False), ("graphs", "reduce-overhead")):
        content = tiny_config(
            store.path,
            tmp_path / name,
            training__compile=wanted,
            training__accelerator="gpu",
            training__precision="32",
        )
        path = fit(parse_config(content, "test")).path
        weights.append(load_file(path / "weights.safetensors"))
    for key, value in weights[0].items():
        assert torch.allclose(value.float(), weights[1][key].float(), atol=0.02), key


def test_a_failure_to_compile_is_told_in_a_line():
    from torch._dynamo.exc import BackendCompilerFailed

    def refuses(graph, inputs):
        raise RuntimeError("no C++ compiler")

    message = r"^training\.compile: .*no C\+\+ compiler"
    with pytest.raises(MedsegError, match=message) as error, told_in_a_line():
        torch.compile(lambda x: x + 1, backend=refuses)(torch.zeros(2))
    assert "\n" not in str(error.value)
    assert BackendCompilerFailed.__module__.startswith("torch._dynamo")


def test_other_errors_stay_what_they_are():
    with pytest.raises(ValueError, match="mine"), told_in_a_line():
        raise ValueError("mine")


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_compiled_by_the_default_backend_trains(tmp_path):
    store = make_store(tmp_path / "store", cases=6, slices=2, size=32)
    runs = []
    for name in ("a", "b"):
        content = tiny_config(store.path, tmp_path / name, training__compile=True)
        runs.append(fit(parse_config(content, "test")).path)
    assert same_weights(*runs)
