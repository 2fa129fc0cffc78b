"""What an exported network must say of itself, so that it can be used without its run."""

from __future__ import annotations

from typing import Any

from medseg_reg import __version__
from medseg_reg.config_network import PRETRAINED
from medseg_reg.engine.run_directory import RunDirectory, environment
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, sha256_of
from medseg_reg.inference.export.plan import TOLERANCE, Plan

SCALING = {
    "window": "(x - low) / (high - low), cut to 0..1; window = [low, high]",
    "percentiles": "low and high are these percentiles of the case; then (x - low) / (high - low), "
    "cut to 0..1",
    "8 bits": "x / 255",
}
FIT = {
    "none": "slices keep their size",
    "resize": "stretched to size",
    "letterbox": "scaled evenly, so that it fits into size, then padded with 0 around the middle",
    "crop": "cut, or padded with 0, around the middle",
}
LAYOUT = "batch, channels, rows, columns"
SHRINKING = "mean of areas where it shrinks (OpenCV's INTER_AREA), then linear where it grows"


def facts_of(run: RunDirectory) -> dict[str, Any]:
    """Return what is known of a finished run and its data, in the types of JSON.

    Raises:
        MedsegError: the split of the run is missing.
    """
    config, data = run.config(), run.data_facts()
    split = read_json(run.path / "splits.json").get("hash")
    if split is None:
        raise MedsegError(f"{run.path / 'splits.json'}: has no hash; the run is incomplete.")
    left_out = {key: True for key in PRETRAINED}
    spec = config.network.model_dump(mode="json", exclude={**left_out, "reuse": {"run"}})
    if config.network.reuse is not None:  # by what it is, not by where it lay
        spec["reuse"]["weights_sha256"] = sha256_of(run.coarse.weights)
    trained = run.path / "environment.json"
    return {
        "producer": f"medseg_reg {__version__}",
        "run": config.name,
        "seed": config.seed,
        "network": {key: value for key, value in spec.items() if key != "encoder_weights"},
        "classes": list(data.classes),
        "preprocessing": _preprocessing(run),
        "data": {
            "name": data.name,
            "modality": data.modality,
            "licence": data.licence,
            "citation": data.citation,
            "manifest_sha256": data.manifest_sha256,
            "notes": list(data.notes),
        },
        "splits_hash": split,
        "weights_sha256": sha256_of(run.weights),
        "trained_with": read_json(trained).get("packages", {}) if trained.exists() else {},
        "exported_with": environment()["packages"],
    }


def _preprocessing(run: RunDirectory) -> dict[str, Any]:
    image, data = run.config().data.image, run.data_facts()
    kind = "window" if image.window else "percentiles" if image.percentiles else "8 bits"
    fit = image.fit if image.size else "none"
    return {
        "unit": data.unit,
        "channels": data.channels,
        "plane": data.conversion.get("plane"),
        "erosion": data.conversion.get("erosion"),
        "canny": data.conversion.get("canny"),
        "window": image.window and list(image.window),
        "percentiles": image.percentiles and list(image.percentiles),
        "scaling": SCALING[kind],
        "size": image.size and list(image.size),
        "fit": fit,
        "how": FIT[fit] + (f"; {SHRINKING}" if fit in ("resize", "letterbox") else ""),
    }


def interface(plan: Plan, outputs: int) -> dict[str, Any]:
    """Return what goes in, what comes out, and on which shapes both were compared with PyTorch.

    Args:
        plan: the sizes.
        outputs: channels of the logits.
    """
    takes = plan.takes
    return {
        "input": {
            "name": "image",
            "layout": LAYOUT,
            "type": "float32",
            "values": [0, 1],
            "batch": "any",
            "size": takes if isinstance(takes, str) else list(takes),
        },
        "output": {
            "name": "logits",
            "layout": "batch, classes, rows, columns",
            "probabilities": "softmax over classes" if outputs > 1 else "sigmoid, of the class 1",
        },
        **compared(plan),
    }


def compared(plan: Plan) -> dict[str, Any]:
    """Return how the export was compared with PyTorch; it exists only if it was equal."""
    return {"check": {"tolerance": TOLERANCE, "shapes": [list(shape) for shape in plan.probes]}}
