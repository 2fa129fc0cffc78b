"""Slimming of a finished classifier: which patches it needs, what that saves, what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medseg_reg.data.dataset import SliceDataset
from medseg_reg.engine.checkpoint import load_weights, save_weights
from medseg_reg.engine.classification import ClassificationDirectory, load_run_classifier
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, sha256_of, write_json
from medseg_reg.inference.classification import judge, score_parts
from medseg_reg.networks.patch_search import find_patches
from medseg_reg.networks.slimming import slim_classifier

FILE, WEIGHTS = "slimming.json", "slimmed.safetensors"


def slim_run(
    run: ClassificationDirectory,
    tolerance: float = 0.01,
    step: int = 10,
    images: int = 64,
    epochs: int = 0,
    store_path: Path | None = None,
) -> dict[str, Any]:
    """Search the patches that a classifier needs, score it with them alone, write slimming.json.

    The search sees training slices alone, drawn with the seed 0. Scores are those of
    `evaluate_classifier`, with thresholds of the slimmed network.

    Args:
        run: a finished run.
        tolerance: of the error of each block, see `find_patches`.
        step: patches that are added at a time.
        images: training slices that the search sees.
        epochs: of the fine-tuning of a block on these; its weights then are not those of the run,
            and stand in slimmed.safetensors.
        store_path: the slice store, where it has moved since the training.

    Raises:
        MedsegError: the run is not finished, its data have changed, or it cannot be slimmed.
    """
    config: Any = run.config()
    network = load_run_classifier(run)
    store, splits = run.data(store_path or config.data.store)
    train = SliceDataset(store, splits.train, config.data.image, chosen=splits.train_slices)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    seen = torch.stack([train[int(n)]["image"] for n in order[:images]])
    found = find_patches(network, seen, tolerance, step, epochs)
    if epochs:
        save_weights(network, run.path / WEIGHTS)
    before, after = slim_classifier(network, found.keep)
    content = {
        "weights_sha256": sha256_of(run.weights),
        **{"tolerance": tolerance, "step": step, "images": len(seen), "epochs": epochs},
        **{"operations": before, "operations_slimmed": after, "errors": list(found.errors)},
        "keep": [row.nonzero()[:, 0].tolist() for row in found.keep],
        "patches": found.keep.shape[1],
        **judge(score_parts(network, store, splits, config), config),
    }
    write_json(run.path / FILE, content)
    return content


def load_slimmed(run: ClassificationDirectory) -> Any:
    """Return the classifier of a run, slimmed as `slim_run` found it, in evaluation mode.

    Raises:
        MedsegError: the run is not finished, or was not slimmed with these weights.
    """
    network = load_run_classifier(run)
    path = run.path / FILE
    content = read_json(path) if path.exists() else {}
    if content.get("weights_sha256") != sha256_of(run.weights):
        raise MedsegError(
            f"{path}: is missing, or of other weights. Run `python -m medseg_reg.slim --run "
            f"{run.path}`."
        )
    if content["epochs"]:
        load_weights(network, run.path / WEIGHTS)
    keep = torch.zeros(len(content["keep"]), content["patches"], dtype=torch.bool)
    for row, places in zip(keep, content["keep"], strict=True):
        row[places] = True
    slim_classifier(network, keep)
    return network.eval()


def slimming_lines(run: ClassificationDirectory, content: dict[str, Any]) -> str:
    """Return the lines that end the command."""
    counts, share = [len(row) for row in content["keep"]], content["operations_slimmed"]
    share /= content["operations"]
    path = run.path / "summary.json"
    whole = read_json(path)["classes"] if path.exists() else {}
    lines = [
        f"patches behind each block, of {content['patches']}: {', '.join(map(str, counts))}",
        f"multiply-adds of the blocks: {share:.0%} of {content['operations']:,}",
    ]
    for name, one in content["classes"].items():
        scores = [one["all_slices"], whole[name]["all_slices"] if name in whole else {}]
        shown = ["unknown" if (v := s.get("auroc")) is None else f"{v:.4f}" for s in scores]
        lines.append(f"{content['part']}: {name}: AUROC {shown[0]}, of the whole one {shown[1]}")
    return "\n".join([*lines, f"wrote {run.path / FILE}"])
