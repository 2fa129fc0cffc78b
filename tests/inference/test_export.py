"""What is exported gives what PyTorch gives, at every size, or is not exported."""

from __future__ import annotations

import copy
import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.export import main
from medseg_reg.files import sha256_of
from medseg_reg.inference.export import export_run, onnx_file
from medseg_reg.inference.export import run as run_module
from medseg_reg.inference.export.plan import Plan, plans_of
from medseg_reg.inference.export.program import program_of
from medseg_reg.inference.export.script import (
    open_script,
    script_of,
    whole_slices,
    without_warnings,
)
from medseg_reg.networks import UNet
from medseg_reg.networks.build import probabilities
from tests.inference.export_runs import OWN, copy_run, exportable_run
from tests.inference.made_runs import NOISY
from tests.networks.small_foreign import SIZES, SMALL
from tests.stores import make_store

# Batches and sizes that no export is compared on when it is made, and small ones.
SHAPES = ((1, 1, 9, 30), (5, 1, 47, 31), (3, 1, 16, 16))
SMALLEST = ((2, 1, 1, 1), (1, 1, 3, 2), (1, 1, 4, 30), (2, 1, 9, 1))
# Arguments that cost an export nothing but time. With MONAI's windows of 7, torch writes the sizes
# behind the padding of each level as sums that grow for minutes; of 4, the last level alone is
# padded. Wide decoders compute long, and have the operations of narrow ones.
CHEAPER: dict[str, dict[str, Any]] = {
    "monai.SwinUNETR": {"window_size": 4},
    "smp.Unet": {"decoder_channels": [32, 16, 16, 8, 8]},
    "smp.UnetPlusPlus": {"decoder_channels": [32, 16, 16, 8, 8]},
    "smp.FPN": {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 64},
    "smp.DeepLabV3Plus": {"decoder_channels": 32},
    "smp.Segformer": {"decoder_segmentation_channels": 64},
}
Function = Callable[[Tensor], Tensor]
slow = pytest.mark.slow


def reopen(path: Path) -> tuple[Function, dict[str, Any]]:
    """Open a file as its user would, without this package's help; return its metadata as well."""
    if path.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map["medseg_reg"]
        return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0]), json.loads(
            text
        )
    found = {"metadata.json": ""}
    if path.suffix == ".pt2":
        program = torch.export.load(path, extra_files=found).module()
    else:
        with without_warnings():
            program = torch.jit.load(path, _extra_files=found)
    return program, json.loads(found["metadata.json"])


def export(run: Path, form: str, *more: str) -> Path:
    main(["--run", str(run), "--format", form, *more])
    (found,) = [one for one in (run / "export").iterdir() if not one.name.startswith(".")]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("runs")
    store = make_store(folder / "store", cases=5, slices=1, size=(32, 40))
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            arguments = {**SMALL.get(name, {}), **CHEAPER.get(name, {})}
            changes = OWN.get(name) or {"network": {"name": name, **arguments}}
            if name in SMALL:
                changes["data__image"] = {"size": list(SIZES.get(name, (64, 96)))}
            layers = NOISY if name in OWN else {"regularization__architecture": []}
            made[name] = exportable_run(folder / name.replace(" ", "_"), store, **changes, **layers)
        return made[name]

    return run


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "torchscript") for name in OWN),
        *((name, "pt2") for name in OWN),
        ("unet", "onnx"),
        *(pytest.param(name, "onnx", marks=slow) for name in OWN if name != "unet"),
    ],
)
def test_every_network_gives_the_same_at_any_size(
    runs: Callable[[str], Path], tmp_path: Path, name: str, form: str
) -> None:
    run = copy_run(runs(name), tmp_path / "run")
    if form == "onnx":
        pytest.importorskip("onnxscript")
    exported, about = reopen(export(run, form))
    network = load_run_network(RunDirectory(run))
    anything = form != "pt2"
    for number, shape in enumerate(SHAPES + SMALLEST * anything):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(100 + number))
        with torch.inference_mode():
            want, got = network(x), exported(x)
        assert got.shape == (shape[0], want.shape[1], *shape[2:])
        assert (want - got).abs().max() < 1e-4 * max(1, want.abs().max())
        assert (probabilities(want) - probabilities(got)).abs().max() < 1e-4
        if shape in SHAPES:
            assert 0.02 < probabilities(want)[:, 1].mean() < 0.98
    least = network.factor + 1
    assert about["input"]["size"] == ("any" if anything else f"any, from {least} rows and columns")
    if form == "pt2":
        with pytest.raises(AssertionError, match=rf"Guard failed: x\.size\(\)\[2\] >= {least}"):
            exported(torch.rand(1, 1, least - 1, least))
        with pytest.raises(AssertionError, match=rf"Guard failed: x\.size\(\)\[3\] >= {least}"):
            exported(torch.rand(1, 1, least, least - 1))


@pytest.mark.parametrize("form", ["torchscript", "pt2"])
def test_a_file_says_what_it_needs_and_where_it_comes_from(
    runs: Callable[[str], Path], tmp_path: Path, form: str
) -> None:
    run = copy_run(runs("unet"), tmp_path / "run")
    _, about = reopen(export(run, form))
    assert about["classes"] == ["background", "class_1"]
    assert about["network"]["name"] == "unet"
    assert about["network"]["channels"] == [4, 6, 8]
    assert "pretrained" not in about["network"]
    assert about["preprocessing"]["scaling"] == "x / 255"
    assert about["preprocessing"]["channels"] == 1
    assert about["preprocessing"]["fit"] == "none"
    assert about["splits_hash"] == json.loads((run / "splits.json").read_text())["hash"]
    assert about["weights_sha256"] == sha256_of(run / "weights.safetensors")
    assert about["exported_with"]["torch"] == torch.__version__.split("+")[0]
    assert about["output"]["probabilities"] == "softmax over classes"
    assert about["check"]["tolerance"] <= 1e-4
    assert {shape[0] for shape in about["check"]["shapes"]} >= {1, 3}


def test_regularizers_leave_no_trace(runs: Callable[[str], Path], tmp_path: Path) -> None:
    network = load_run_network(RunDirectory(runs("unet")))
    plain = UNet(2, 1, 2, channels=(4, 6, 8)).eval()
    plan = next(plans_of(network, 1, (32, 40)))
    assert len(list(network.modules())) > len(list(plain.modules()))
    programs = [program_of(one, plan) for one in (network, plain)]
    operations = [[str(node.target) for node in one.graph.nodes] for one in programs]
    assert operations[0] == operations[1]


def test_onnx_is_a_valid_file_of_its_own_with_named_axes(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    run = copy_run(runs("unet"), tmp_path / "run")
    path = export(run, "onnx")
    assert list(path.parent.iterdir()) == [path]
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 18)]
    assert not any(node.metadata_props for node in model.graph.node)
    assert str(Path(torch.__file__).parents[2]).encode() not in path.read_bytes()
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert axes["image"] == ["batch", 1, "rows", "columns"]
    assert axes["logits"] == ["batch", 2, "rows", "columns"]
    kinds = {node.op_type for node in model.graph.node}
    assert not [kind for kind in kinds if "Random" in kind or "Dropout" in kind]


# Sizes of a network that takes one alone


def test_a_network_for_one_size_is_exported_for_it_and_refuses_others(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("einops")
    run = copy_run(runs("monai.UNETR"), tmp_path / "run")
    exported, about = reopen(export(run, "torchscript"))
    assert about["input"]["size"] == [40, 45]
    assert "size: 40x45" in capsys.readouterr().out
    assert exported(torch.rand(4, 1, 40, 45)).shape == (4, 2, 40, 45)
    with pytest.raises(Exception, match="images are 48x48, expected 40x45"):
        exported(torch.rand(1, 1, 48, 48))


@pytest.mark.parametrize("form", ["pt2", "torchscript"])
def test_what_cannot_be_exported_for_any_size_is_fixed_and_said(
    runs: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    maker = "program_of" if form == "pt2" else "script_of"
    honest = getattr(run_module, maker)

    def only_fixed(network: nn.Module, plan: Plan) -> Any:
        if plan.dynamic:
            raise RuntimeError("Guard failed")
        return honest(network, plan)

    monkeypatch.setattr(run_module, maker, only_fixed)
    run = copy_run(runs("unet"), tmp_path / "run")
    exported, about = reopen(export(run, form))
    said = capsys.readouterr().out
    assert "note: this network cannot be exported as" in said
    assert "(Guard failed); it takes 8x8 alone" in said
    assert about["input"]["size"] == [8, 8]
    exported(torch.rand(5, 1, 8, 8))
    says = r"size\(\)\[2\] == 8" if form == "pt2" else "images are 12x8, expected 8x8"
    with pytest.raises(Exception, match=says):
        exported(torch.rand(1, 1, 12, 8))


FOREIGN = ("monai.BasicUNet", "monai.DynUNet", "smp.Unet", "smp.FPN", "smp.Segformer")


@slow
@pytest.mark.timeout(3600)  # on a busy machine; most take seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(SMALL, ["torchscript", "onnx"]),
        # ONNX begins with the same program, so that others would take time and show nothing new.
        *itertools.product(FOREIGN, ["pt2"]),
    ],
)
def test_foreign_networks_are_exported(
    runs: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    form: str,
) -> None:
    for package in ("einops", "onnxscript"):
        pytest.importorskip(package)
    run = copy_run(runs(name), tmp_path / "run")
    exported, about = reopen(export(run, form))
    network = load_run_network(RunDirectory(run))
    size = about["input"]["size"]
    rows, columns = about["preprocessing"]["size"]
    rows += 7 * isinstance(size, str)
    if name in FOREIGN:
        assert isinstance(size, str), capsys.readouterr().out
    x = torch.rand(2, 1, rows, columns)
    with torch.inference_mode():
        want, got = probabilities(network(x)), probabilities(exported(x))
    assert (want - got).abs().max() < 1e-4


# Nothing is left of what is wrong


def tampered(network: nn.Module, plan: Plan) -> Any:
    """Export a network with one weight changed a little."""
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.get_parameter("classify.bias")[0] += 0.01
    return program_of(twin, plan)


def test_an_export_that_differs_fails_and_leaves_no_file(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "program_of", tampered)
    run = copy_run(runs("unet"), tmp_path / "run")
    with pytest.raises(MedsegError, match=r"differs from PyTorch by 0\.0.*Nothing was written"):
        main(["--run", str(run), "--format", "pt2"])
    assert list((run / "export").iterdir()) == []


def test_what_exists_is_left_as_it_is(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = copy_run(runs("unet"), tmp_path / "run")
    out = tmp_path / "network.pt2"
    out.write_text("precious")
    with pytest.raises(MedsegError, match=r"network\.pt2: exists and is left as it is"):
        main(["--run", str(run), "--format", "pt2", "--out", str(out)])
    assert out.read_text() == "precious"
    folder = tmp_path / "bundle"
    folder.mkdir()
    with pytest.raises(MedsegError, match="bundle: exists"):
        main(["--run", str(run), "--format", "monai-bundle", "--out", str(folder)])


def test_a_name_must_say_what_the_file_is(runs: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"--out .*x\.pt: expected a name that ends in \.pt2"):
        main(["--run", str(runs("unet")), "--format", "pt2", "--out", str(tmp_path / "x.pt")])


def test_a_run_that_is_not_finished_is_refused(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = copy_run(runs("unet"), tmp_path / "run")
    (run / "weights.safetensors").unlink()
    with pytest.raises(MedsegError, match="the training is not finished"):
        main(["--run", str(run), "--format", "pt2"])
    assert not (run / "export").exists()


def test_a_run_without_its_split_is_refused(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = copy_run(runs("unet"), tmp_path / "run")
    (run / "splits.json").unlink()
    with pytest.raises(MedsegError, match=r"splits\.json"):
        main(["--run", str(run), "--format", "pt2"])


def test_missing_packages_are_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        if name != "onnx":
            raise ImportError(name)

    monkeypatch.setattr(onnx_file.importlib, "import_module", absent)
    with pytest.raises(MedsegError) as error:
        main(["--run", str(tmp_path / "none"), "--format", "onnx"])
    assert str(error.value) == (
        "--format onnx: needs onnxscript, onnxruntime, not installed. "
        "pip install 'medseg-reg[export]'"
    )


def test_weights_that_one_onnx_file_cannot_hold_are_refused(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setattr(run_module, "require_packages", lambda: None)
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    run = copy_run(runs("unet"), tmp_path / "run")
    with pytest.raises(MedsegError, match="one file holds 2. Use --format pt2"):
        main(["--run", str(run), "--format", "onnx"])
    assert list((run / "export").iterdir()) == []


def test_a_network_that_reads_the_truth_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", cases=5, slices=1, size=16)
    layer = {"name": "nsdropout", "places": "after_block", "classes": 2, "eval_mode": "true_label"}
    run = exportable_run(tmp_path / "run", store, regularization__architecture=[])
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("architecture: []", f"architecture: [{json.dumps(layer)}]")
    )
    with pytest.raises(MedsegError, match="reads the true labels at test time"):
        export_run(RunDirectory(run), "pt2")


# What is in a TorchScript


def test_torchscript_holds_the_network_and_no_pickled_objects(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run = copy_run(runs("unet"), tmp_path / "run")
    path = export(run, "torchscript")
    with zipfile.ZipFile(path) as archive:
        data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        modules = archive.read(data)
    assert b"medseg_reg" in modules  # as a name of TorchScript: nothing is imported
    assert open_script(path)(torch.rand(1, 1, 20, 20)).shape == (1, 2, 20, 20)


def test_torchscript_is_not_bound_to_the_processor(runs: Callable[[str], Path]) -> None:
    network = load_run_network(RunDirectory(runs("unet3plus")))
    script = whole_slices(script_of(network, next(plans_of(network, 1, (32, 40)))), ImageSpec())
    assert "prim::Constant" in str(script.inlined_graph)
    assert "Device = prim::Constant" not in str(script.inlined_graph)
