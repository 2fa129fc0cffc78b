"""A MONAI bundle predicts what this package predicts, where this package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from medseg_reg.data.store import SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.export import main as export
from medseg_reg.files import read_json, sha256_of
from medseg_reg.inference.export import bundle
from medseg_reg.inference.export.bundle import by_hand
from medseg_reg.inference.export.script import open_script
from medseg_reg.predict import main as predict
from tests.inference.bundles import SCHEMA, bundle_of, expressions, require_harmless, run_bundle
from tests.inference.export_runs import OWN, exportable_run, hu_store, noisy_volume
from tests.stores import make_store

# What MONAI says of its own readers, of TorchScript, and of configurations in general.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:parsing config_file:UserWarning",
    r"ignore:.*torch\.jit\.\w+` is deprecated:FutureWarning",
    r"ignore:NvImgCodecPydicomReader:UserWarning",
)

FILES = [
    "LICENSE",
    "configs/inference.json",
    "configs/metadata.json",
    "docs/README.md",
    "docs/data_license.txt",
    "models/model.ts",
]
CT = {"window": [-100, 240]}
AXIAL = {"converter": "nifti", "plane": "axial"}
# One run for each way in which slices, values and classes can be treated.
VOLUMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resize": (AXIAL, {"data__image": {**CT, "size": [24, 50]}}),
    "letterbox": (
        {"converter": "nifti", "plane": "coronal"},
        {"data__image": {**CT, "size": [32, 24], "fit": "letterbox"}},
    ),
    "crop": (
        {"converter": "dicom", "plane": "sagittal"},
        {"data__image": {"percentiles": [2, 97], "size": [25, 40], "fit": "crop"}},
    ),
    "as it is": ({}, {"data__image": CT, **OWN["attention_unet"]}),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return hu_store(tmp_path_factory.mktemp("bundle") / "store")


@pytest.fixture(scope="module")
def volume_run(store: SliceStore) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        """Give a run that was exported as a bundle."""
        if name not in made:
            conversion, changes = VOLUMES[name]
            path = store.path.parent / name.replace(" ", "_")
            made[name] = exportable_run(path, store, conversion, **changes)
            export(["--run", str(path), "--format", "monai-bundle"])
        return made[name]

    return run


def affine(orientation: str) -> np.ndarray:
    """A matrix with spacing 1.5 x 1 x 3 mm whose axes point as named, a little oblique."""
    codes = nibabel.orientations.axcodes2ornt(tuple(orientation))
    matrix = np.eye(4)
    matrix[:3, :3] = 0
    for axis, ((world, sign), spacing) in enumerate(zip(codes, (1.5, 1.0, 3.0), strict=True)):
        matrix[int(world), axis] = sign * spacing
    angle = 0.1
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = (-11, 7, 30)
    return turn @ matrix


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of volumes of other sizes and orientations, one with a scaling in its header."""
    folder = tmp_path_factory.mktemp("scans")
    shapes = {"RAS": (37, 28, 5), "PIR": (30, 7, 41), "ILA": (6, 33, 26)}
    for number, (orientation, shape) in enumerate(shapes.items()):
        image = nibabel.Nifti1Image(noisy_volume(shape, number), affine(orientation))
        if number == 1:
            image.header.set_slope_inter(0.5, 3)
        nibabel.save(image, folder / f"{orientation}.nii{'.gz' * (number != 2)}")
    return folder


def require_same_volumes(scans: Path, ours: Path, theirs: Path) -> None:
    """Compare labels voxel for voxel, and that every class is somewhere."""
    for path in sorted(scans.iterdir()):
        name = path.name.split(".")[0]
        mine = nibabel.load(ours / f"{name}.nii.gz")
        other = nibabel.load(theirs / f"{name}_labels.nii.gz")
        np.testing.assert_allclose(other.affine, nibabel.load(path).affine, atol=1e-4)
        want, got = np.asarray(mine.dataobj), np.asarray(other.dataobj)
        assert got.dtype == np.uint8
        assert got.shape == want.shape
        # Rounding may decide where two classes are equally probable.
        assert (got != want).mean() <= 1e-4, f"{name}: {(got != want).mean():.2%}"
        assert np.bincount(want.ravel(), minlength=3).min() > 0.01 * want.size, name


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes_are_predicted_as_by_this_package(
    volume_run: Any, scans: Path, tmp_path: Path, name: str
) -> None:
    run = volume_run(name)
    run_bundle(bundle_of(run), scans, tmp_path / "theirs")
    predict(["--run", str(run), "--input", str(scans), "--output", str(tmp_path / "ours")])
    require_same_volumes(scans, tmp_path / "ours", tmp_path / "theirs")


BLOCKED = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("medseg_reg", "data_prep"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import medseg_reg
    sys.exit("medseg_reg can be imported")
except ModuleNotFoundError:
    pass
sys.argv[0] = "monai.bundle"
runpy.run_module("monai.bundle", run_name="__main__")
"""


def bundle_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m monai.bundle` where this package cannot be imported."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    import ignite

    site = str(Path(ignite.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**environment, "PYTHONPATH": site, "OMP_NUM_THREADS": "1"},
    )


def test_it_runs_from_the_command_line_without_this_package(
    volume_run: Any, scans: Path, tmp_path: Path
) -> None:
    for package in ("ignite", "fire"):
        pytest.importorskip(package)
    run = volume_run("resize")
    done = bundle_command(
        bundle_of(run), "run", "--config_file", "configs/inference.json", "--bundle_root", ".",
        "--dataset_dir", str(scans), "--output_dir", str(tmp_path / "theirs"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "medseg_reg can be imported" not in done.stderr
    predict(["--run", str(run), "--input", str(scans), "--output", str(tmp_path / "ours")])
    require_same_volumes(scans, tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_predicted_as_by_this_package(tmp_path: Path, channels: int) -> None:
    store = make_store(tmp_path / "store", cases=5, slices=1, size=(32, 40), channels=channels)
    image = {"size": [24, 32], "fit": "letterbox"} if channels == 3 else {}
    network = OWN["unet of every other kind"] if channels == 1 else OWN["unet3plus"]
    run = exportable_run(
        tmp_path / "run", store, {"converter": "bagls"}, data__image=image, **network
    )
    export(["--run", str(run), "--format", "monai-bundle"])
    (tmp_path / "in").mkdir()
    # A gray picture where colour was trained on, and the reverse, are as for `predict`.
    for number, shape in enumerate([(31, 45, 3), (40, 22, 3), (26, 33)]):
        pixels = noisy_volume((*shape, 1)[:3], number).reshape(shape)
        pixels = np.clip(pixels + 120, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    for expression in expressions(read_json(bundle_of(run) / "configs/inference.json")):
        require_harmless(expression)
    run_bundle(bundle_of(run), tmp_path / "in", tmp_path / "theirs")
    predict(["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "o")])
    for number in range(3):
        want = np.asarray(Image.open(tmp_path / "o" / f"{number}.png"))
        got = np.asarray(Image.open(tmp_path / "theirs" / f"{number}_labels.png"))
        assert got.shape == want.shape
        assert (got != want).mean() <= 1e-3
        assert 0.02 < want.mean() < 0.98


# What MONAI checks itself


def test_monai_verifies_the_metadata(volume_run: Any, tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    from monai.bundle import verify_metadata

    # The file is there, so MONAI does not download it.
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    path = bundle_of(volume_run("crop")) / "configs/metadata.json"
    known = {"filepath": str(schema), "hash_val": sha256_of(schema), "hash_type": "sha256"}
    verify_metadata(meta_file=str(path), **known)
    content = json.loads(path.read_text())
    del content["network_data_format"]["outputs"]["pred"]["dtype"]
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'dtype' is a required property"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), **known)


@pytest.mark.parametrize("name", VOLUMES)
def test_monai_verifies_what_goes_in_and_out(volume_run: Any, name: str) -> None:
    from monai.bundle import verify_net_in_out

    folder = bundle_of(volume_run(name))
    arguments = {
        "net_id": "network_def",
        "meta_file": str(folder / "configs/metadata.json"),
        "config_file": str(folder / "configs/inference.json"),
        "device": "cpu",
        "bundle_root": str(folder),
    }
    verify_net_in_out(**arguments)
    verify_net_in_out(**arguments, n=3, any=45)
    wrong = {"_meta_#network_data_format#outputs#pred#num_channels": 4}
    with pytest.raises(ValueError, match="output channel number `3` doesn't match: `4`"):
        verify_net_in_out(**arguments, **wrong)


# What is in it


def targets(content: Any) -> Iterator[str]:
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if key == "_target_":
                yield value
            yield from targets(value)


@pytest.mark.parametrize("name", VOLUMES)
def test_its_expressions_run_nothing_but_the_network_and_its_parts_are_monais(
    volume_run: Any, name: str
) -> None:
    import monai

    content = json.loads((bundle_of(volume_run(name)) / "configs/inference.json").read_text())
    found = list(expressions(content))
    assert len(found) > 8
    for expression in found:
        require_harmless(expression)
    modules = (monai.transforms, monai.data, monai.inferers, monai.engines)
    for target in targets(content):
        assert any(hasattr(module, target) for module in modules), target


def test_its_files_are_those_of_a_bundle_and_speak_of_the_run(volume_run: Any) -> None:
    run = volume_run("letterbox")
    folder = bundle_of(run)
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    assert sorted(found) == FILES
    about = json.loads((folder / "configs/metadata.json").read_text())
    shown = about["network_data_format"]
    assert shown["inputs"]["image"]["spatial_shape"] == ["*", "*"]
    assert shown["outputs"]["pred"]["channel_def"] == {
        "0": "background", "1": "class_1", "2": "class_2"
    }  # fmt: skip
    facts = about["medseg_reg"]
    assert facts["preprocessing"]["fit"] == "letterbox"
    assert facts["preprocessing"]["plane"] == "coronal"
    assert facts["splits_hash"] == json.loads((run / "splits.json").read_text())["hash"]
    text = (folder / "docs/README.md").read_text()
    for part in ("coronal slices", "[low, high] = [-100.0, 240.0]", facts["splits_hash"], "blobs"):
        assert part in text
    assert "{" not in text
    assert "Not evaluated" in text


def test_scores_of_the_test_part_are_passed_on(tmp_path: Path, store: SliceStore) -> None:
    run = exportable_run(tmp_path / "run", store, AXIAL, data__image=CT)
    scores = {"dice": {"mean": 0.81, "n": 4}, "iou": {"mean": 0.7, "n": 4}}
    (run / "summary.json").write_text(json.dumps(scores))
    export(["--run", str(run), "--format", "monai-bundle", "--out", str(tmp_path / "b")])
    about = json.loads((tmp_path / "b/configs/metadata.json").read_text())
    assert about["eval_metrics"]["mean volume dice"] == 0.81
    assert "mean volume dice: 0.81" in (tmp_path / "b/docs/README.md").read_text()


@pytest.mark.parametrize("name", VOLUMES)
def test_its_network_gives_the_probabilities_of_prediction(volume_run: Any, name: str) -> None:
    run = RunDirectory(volume_run(name))
    network, image = load_run_network(run), run.config().data.image
    exported = open_script(bundle_of(run.path) / "models/model.ts")
    for number, shape in enumerate([(1, 1, 19, 61), (3, 1, 77, 23)]):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(number))
        with torch.inference_mode():
            want, got = by_hand(network, image)(x), exported(x)
        assert (want - got).abs().max() < 1e-4


# What is refused


@pytest.mark.parametrize(("key", "value"), [("erosion", 3), ("canny", [50.0, 150.0])])
def test_filtered_images_are_refused(
    tmp_path: Path, store: SliceStore, key: str, value: Any
) -> None:
    run = exportable_run(tmp_path / "run", store, {**AXIAL, key: value}, data__image=CT)
    with pytest.raises(MedsegError, match=rf"filtered \({key} .*Use another --format"):
        export(["--run", str(run), "--format", "monai-bundle"])
    assert list((run / "export").iterdir()) == []


def test_a_bundle_that_differs_leaves_nothing(
    tmp_path: Path, store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exportable_run(tmp_path / "run", store, AXIAL, data__image={**CT, "size": [16, 16]})
    honest = bundle.whole_slices
    monkeypatch.setattr(
        bundle,
        "whole_slices",
        lambda network, image: honest(network, image.model_copy(update={"fit": "crop"})),
    )
    with pytest.raises(MedsegError, match="differs from PyTorch by .*Nothing was written"):
        export(["--run", str(run), "--format", "monai-bundle"])
    assert list((run / "export").iterdir()) == []
