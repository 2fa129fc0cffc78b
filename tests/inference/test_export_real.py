"""Exported networks equal PyTorch on real images: MR and CT volumes, and frames of endoscopy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.bagls import main as convert_bagls
from data_prep.image_folder import main as convert_folder
from data_prep.nifti import main as convert_nifti
from medseg_reg.data.preprocessing import limits_of, scale_intensity
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.export import main as export
from medseg_reg.inference.export.bundle import by_hand
from medseg_reg.inference.export.onnx_file import open_onnx
from medseg_reg.inference.export.script import open_script
from medseg_reg.networks.build import probabilities
from medseg_reg.predict import main as predict
from medseg_reg.train import main as train
from tests.inference.bundles import bundle_of, run_bundle
from tests.inference.export_runs import balance, exportable_run
from tests.training import tiny_config, write_config

# What MONAI says of its own readers, of TorchScript, and of configurations in general.
pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:parsing config_file:UserWarning",
        r"ignore:.*torch\.jit\.\w+` is deprecated:FutureWarning",
        r"ignore:NvImgCodecPydicomReader:UserWarning",
    )
]


def slices_of(run: RunDirectory, store: SliceStore, case: str) -> torch.Tensor:
    """The slices of a case (B, C, H, W), scaled as the run scales them."""
    pixels = store.image(case)
    limits = limits_of(run.config().data.image, pixels, case)
    return torch.from_numpy(scale_intensity(np.asarray(pixels, np.float32), limits))[:, None]


def require_equal_on(run: RunDirectory, x: torch.Tensor) -> None:
    """Compare both exports of a run with PyTorch on slices (B, C, H, W)."""
    network, image = load_run_network(run), run.config().data.image
    bundled = open_script(bundle_of(run.path) / "models/model.ts")
    onnx = open_onnx(run.path / "export/tiny.onnx")
    with torch.inference_mode():
        assert (by_hand(network, image)(x) - bundled(x)).abs().max() < 1e-4
        want, got = network(x), onnx(x)
    assert (probabilities(want) - probabilities(got)).abs().max() < 1e-4
    assert (want - got).abs().max() < 1e-4 * max(1, want.abs().max())


def export_both(run: RunDirectory) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    for form in ("monai-bundle", "onnx"):
        export(["--run", str(run.path), "--format", form])


def require_same_labels(run: RunDirectory, inputs: Path, folder: Path, read: Any) -> set[int]:
    """Predict a folder of files by this package and by the bundle, and compare each pixel.

    Returns:
        The labels that were found.
    """
    ours, theirs = folder / "ours", folder / "theirs"
    predict(["--run", str(run.path), "--input", str(inputs), "--output", str(ours)])
    run_bundle(bundle_of(run.path), inputs, theirs)
    files = sorted(ours.glob("*.nii.gz")) + sorted(ours.glob("*.png"))
    assert len(files) == len(list(inputs.iterdir()))
    found: set[int] = set()
    for path in files:
        name, end = path.name.split(".", 1)
        mine, other = read(path), read(theirs / f"{name}_labels.{end}")
        assert mine.shape == other.shape
        # Rounding may decide where two classes are equally probable.
        assert (mine != other).mean() <= 1e-4
        found |= set(np.unique(mine).tolist())
    return found


def volume(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def hippocampus_store(source: Path, folder: Path) -> SliceStore:
    """Convert eight real volumes."""
    for part in ("imagesTr", "labelsTr"):
        (folder / "source" / part).mkdir(parents=True)
        for path in sorted((source / part).glob("*.nii.gz"))[:8]:
            (folder / "source" / part / path.name).symlink_to(path)
    arguments = ["--source", folder / "source", "--out", folder / "store", "--modality", "MR"]
    names = ["--classes", "anterior", "posterior", "--workers", "1"]
    convert_nifti([*map(str, arguments), *names])
    return SliceStore(folder / "store")


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
def test_bundle_and_onnx_equal_pytorch_on_real_scans(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data("msd_hippocampus")
    store = hippocampus_store(source, tmp_path)
    content = tiny_config(
        store.path,
        tmp_path / "run",
        data__image={"percentiles": [1, 99], "size": [64, 64], "fit": "crop"},
        data__split={"kind": "counts", "train": 4, "val": 1, "test": 3},
        data__batch_size=16,
        network={"channels": [8, 16, 32]},
        schedule={"name": "constant"},
        training__epochs=1,
        training__precision="32",
    )
    train(["--config", str(write_config(tmp_path / "c.yaml", content))])
    run = RunDirectory(tmp_path / "run")
    export_both(run)
    splits = run.splits(store)
    assert splits is not None
    (tmp_path / "scans").mkdir()
    for case in splits.test:
        require_equal_on(run, slices_of(run, store, case))
        name = f"{case}.nii.gz"
        (tmp_path / "scans" / name).symlink_to((source / "imagesTr" / name).resolve())
    assert require_same_labels(run, tmp_path / "scans", tmp_path, volume) - {0}


@pytest.mark.slow
def test_bundle_and_onnx_of_an_attention_unet_equal_pytorch_on_real_ct(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    scans = shared_data("totalsegmentator_ct")
    source = ["--source", str(shared_data("pancreas_ct_hu15")), "--out", str(tmp_path / "store")]
    classes = ["--classes", "background", "pancreas"]
    convert_folder([*source, "--group-size", "5", "--workers", "1", *classes])
    store = SliceStore(tmp_path / "store")
    run = RunDirectory(
        exportable_run(
            tmp_path / "run",
            store,
            data__image={"window": [-100, 240], "size": [96, 80], "fit": "letterbox"},
            network={"name": "attention_unet", "channels": [4, 6, 8]},
        )
    )
    first = store.manifest.cases[0].name
    balance(run, slices_of(run, store, first)[:2, :, ::4, ::4])
    export_both(run)
    for row in store.manifest.cases:
        require_equal_on(run, slices_of(run, store, row.name)[:2])
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/ct.nii.gz").symlink_to((scans / "example_ct_sm.nii.gz").resolve())
    assert require_same_labels(run, tmp_path / "scans", tmp_path, volume) == {0, 1}


@pytest.mark.slow
def test_bundle_and_onnx_of_a_unet3plus_equal_pytorch_on_real_frames(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source, part = shared_data("bagls"), tmp_path / "bagls"
    for folder, count in (("training", 40), ("test", 10)):
        (part / folder).mkdir(parents=True)
        frames = sorted(path.stem for path in (source / folder).glob("*.meta"))[:count]
        for name in (f"{frame}{end}" for frame in frames for end in (".png", ".meta", "_seg.png")):
            (part / folder / name).symlink_to((source / folder / name).resolve())
    convert_bagls(["--source", str(part), "--out", str(tmp_path / "store"), "--workers", "1"])
    store = SliceStore(tmp_path / "store")
    network = {"name": "unet3plus", "channels": [4, 6, 8], "cat_channels": 4}
    run = RunDirectory(exportable_run(tmp_path / "run", store, network=network))
    cases = [row.name for row in store.manifest.cases]
    balance(run, slices_of(run, store, cases[0])[:1])
    export_both(run)
    for case in cases[:4]:
        require_equal_on(run, slices_of(run, store, case)[:2])
    (tmp_path / "frames").mkdir()
    for path in sorted((part / "test").glob("*[0-9].png"))[:5]:
        (tmp_path / "frames" / path.name).symlink_to(path.resolve())
    assert len(require_same_labels(run, tmp_path / "frames", tmp_path, picture)) == 2
