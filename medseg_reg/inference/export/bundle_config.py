"""The configurations of a MONAI bundle: how it reads, scales, predicts and writes.

Expressions are of the kinds that MONAI's own inference bundles have, and no others: `glob`, a
device, joined paths, loading the network, a colour mode of Pillow, `run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.engine.run_directory import DataFacts, RunDirectory

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
# Directions in which slices, rows and columns run, see `medseg_reg.io.geometry`.
AXES = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
MODEL = "models/model.ts"


def is_volume(facts: DataFacts) -> bool:
    """Whether the training data were slices of volumes, and not pictures or frames."""
    return facts.conversion.get("plane") is not None or facts.unit == "HU"


def inference_config(image: ImageSpec, facts: DataFacts, batch_size: int) -> dict[str, Any]:
    """Return configs/inference.json.

    Args:
        image: window and percentiles of the run; size and fit are in the network.
        facts: of the run's data.
        batch_size: slices at once.
    """
    volume = is_volume(facts)
    inferer: dict[str, Any] = {"_target_": "SimpleInferer"}
    if volume:
        inferer = {
            "_target_": "SliceInferer",
            "roi_size": [-1, -1],  # whole slices
            "spatial_dim": 0,
            "sw_batch_size": batch_size,
        }
    pattern = "/*.nii*" if volume else "/*.png"
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": f"$list(sorted(glob.glob(@dataset_dir + '{pattern}')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": f"$torch.jit.load(@bundle_root + '/{MODEL}', map_location=@device)",
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [*_reading(image, facts), _scaling(image)],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": inferer,
        "postprocessing": {"_target_": "Compose", "transforms": _writing(volume)},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }


def _reading(image: ImageSpec, facts: DataFacts) -> list[dict[str, Any]]:
    """Read into the order of the training: channels, then slices, rows and columns."""
    first: dict[str, Any] = {"_target_": "LoadImaged", "keys": "image"}
    if is_volume(facts):
        axes = AXES[facts.conversion.get("plane") or "axial"]
        turn: dict[str, Any] = {
            "_target_": "Orientationd",
            "keys": "image",
            "axcodes": axes,
            "labels": [["L", "R"], ["P", "A"], ["I", "S"]],  # those of NIfTI
        }
    else:
        first["reader"] = "PILReader"
        if image.window is None and image.percentiles is None:
            mode = "RGB" if facts.channels == 3 else "L"
            first["converter"] = f"$lambda image: image.convert('{mode}')"
        # This reader gives columns first.
        turn = {"_target_": "Transposed", "keys": "image", "indices": [0, 2, 1]}
    return [first, {"_target_": "EnsureChannelFirstd", "keys": "image"}, turn]


def _scaling(image: ImageSpec) -> dict[str, Any]:
    unit = {"b_min": 0.0, "b_max": 1.0, "clip": True}
    if image.percentiles is not None:
        lower, upper = image.percentiles
        return {
            "_target_": "ScaleIntensityRangePercentilesd",
            "keys": "image",
            "lower": lower,
            "upper": upper,
            **unit,
        }
    low, high = image.window or (0.0, 255.0)
    return {
        "_target_": "ScaleIntensityRanged",
        "keys": "image",
        "a_min": low,
        "a_max": high,
        **unit,
    }


def _writing(volume: bool) -> list[dict[str, Any]]:
    """Write labels on the grid of the source, with the axes of the source."""
    return [
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": True,
            "to_tensor": True,
        },
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_ext": ".nii.gz" if volume else ".png",
            "output_postfix": "labels",
            "output_dtype": "$numpy.uint8",
            "separate_folder": False,
            "resample": False,
        },
    ]


def metadata(
    run: RunDirectory, facts: dict[str, Any], shape: list[Any], versions: dict[str, str]
) -> dict[str, Any]:
    """Return configs/metadata.json.

    Args:
        run: the run.
        facts: what the export knows of it; stands below `medseg_reg`.
        shape: rows and columns of a slice, as MONAI writes them.
        versions: of packages, by their names.
    """
    data = run.data_facts()
    names = {str(number): name for number, name in enumerate(data.classes)}
    text = ", ".join(f"{number}: {name}" for number, name in names.items())
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"],
        "numpy_version": versions["numpy"],
        "required_packages_version": {
            name: versions[name] for name in ("nibabel", "pillow", "pytorch-ignite", "fire")
        },
        "name": run.config().name,
        "task": f"Segmentation of {', '.join(data.classes[1:])}",
        "description": f"A 2-D network ({facts['network']['name']}) that was trained on slices of "
        f"{data.name}. It takes slices of their own size and gives class probabilities.",
        "authors": "not stated",
        "copyright": "not stated; see LICENSE",
        "data_source": data.citation,
        "data_type": "nibabel" if is_volume(data) else "png",
        "image_classes": f"{data.channels} channel(s), {data.unit}, scaled to 0..1",
        "label_classes": text,
        "pred_classes": f"one channel a class: {text}",
        "eval_metrics": facts["scores"],
        "intended_use": "Research. This is not a medical device.",
        "network_data_format": _data_format(data, names, shape),
        "medseg_reg": facts,
    }


def _data_format(data: DataFacts, names: dict[str, str], shape: Sequence[Any]) -> dict[str, Any]:
    """Say what the network takes and gives."""
    same = {
        "spatial_shape": shape,
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": False,
    }
    colours = ("red", "green", "blue") if data.channels == 3 else ()
    image = {
        "type": "image",
        "format": "hounsfield" if data.unit == "HU" else "magnitude",
        "modality": data.modality,
        "num_channels": data.channels,
        **same,
        "channel_def": {str(c): colours[c] if colours else "image" for c in range(data.channels)},
    }
    probabilities = {
        "type": "probabilities",
        "format": "segmentation",
        "num_channels": len(names),
        **same,
        "channel_def": names,
    }
    return {"inputs": {"image": image}, "outputs": {"pred": probabilities}}
