"""MONAI's BasicUNet in a plain training loop, with the data, budget and width of a configuration.

    python benchmarks/monai_baseline.py --config configs/bagls_small.yaml --out runs/b seed=0

It shares with a run of the toolkit the split, the slices, the augmentation, the loss, the
optimizer, the learning rates, the number of epochs and batches, and the scoring; the network and
the loop are MONAI's and torch's own. BasicUNet has no regularizer here. It computes on the CPU,
and leaves `evaluation/per_case.csv` and `summary.json` in the output directory. Configurations
that it does not reproduce are refused.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.networks.nets import BasicUNet
from monai.utils import set_determinism
from torch.utils.data import DataLoader

from medseg_reg.config import Config, load_config
from medseg_reg.data.module import SliceDataModule
from medseg_reg.data.sampling import epoch_order
from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.beginning import data_module
from medseg_reg.engine.precision import choose_precision
from medseg_reg.engine.schedule import learning_rate_factor
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.files import write_json
from medseg_reg.inference.evaluation import case_table, count_slices, slice_table, summarise
from medseg_reg.inference.predictor import Predictor
from medseg_reg.losses import MixedLoss
from medseg_reg.metrics import dice


def widths_of(config: Config) -> tuple[int, ...]:
    """Return the feature maps of each level."""
    return tuple(config.network.arguments.get("channels", ()))


def basic_unet(config: Config, channels: int, classes: int) -> BasicUNet:
    """Return a BasicUNet with the feature maps of the configuration's U-Net."""
    widths = widths_of(config)
    if len(widths) == 4:
        # BasicUNet has five levels: its first two share the width of level 0.
        widths = (widths[0], *widths)
    return BasicUNet(2, channels, classes, features=(*widths, widths[0]))


def require_reproduced(config: Config) -> None:
    """Refuse a configuration with settings that the loop below would leave out unnoticed.

    Raises:
        MedsegError: names these settings.
    """
    groups, training = config.regularization, config.training
    left_out = {
        f"optimizer.name {config.optimizer.name}": config.optimizer.name != "adam",
        "penalty.weight_decay": groups.penalty.weight_decay > 0,
        "penalty.l1": groups.penalty.l1 > 0,
        "data.ignore_label": config.data.ignore_label is not None,
        "error.class_weights": groups.error.class_weights is not None,
        "error.label_smoothing": groups.error.label_smoothing > 0,
        "optimization.gradient_clip": groups.optimization.gradient_clip is not None,
        "optimization.early_stopping": groups.optimization.early_stopping is not None,
        "optimization.select last": groups.optimization.select != "best",
        "training.accumulate": training.accumulate > 1,
        "training.validate_every": training.validate_every > 1,
        f"network.name {config.network.name}": config.network.name != "unet",
        "network.channels of other than 4 or 5 levels": len(widths_of(config)) not in (4, 5),
        "network.pretrained": config.network.pretrained is not None,
    }
    found = [name for name, given in left_out.items() if given]
    if found:
        raise MedsegError(
            f"{config.name}: this baseline does not reproduce {', '.join(found)}. Compare with a "
            "configuration without."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, keep the best epoch, score the test part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    require_reproduced(config)
    set_determinism(config.seed)
    store = SliceStore(config.data.store)
    splits = make_splits(store, config.data.split)
    data = data_module(config, store, splits)
    network = basic_unet(config, data.channels, len(store.classes))
    best = train(network, config, data)
    network.load_state_dict(best)
    predictor = Predictor(network, config.data.image, data.channels, device="cpu")
    counts = {
        case: count_slices(
            predictor.labels(store.image(case), case), store.mask(case), len(store.classes)
        )
        for case in splits.test
    }
    per_case = case_table(store, counts, config.evaluation.empty)
    per_slice = slice_table(store, counts, config.evaluation.empty)
    (options.out / "evaluation").mkdir(parents=True, exist_ok=True)
    per_case.to_csv(options.out / "evaluation" / "per_case.csv", index=False)
    summary = {"splits_hash": splits.hash, **summarise(per_case, per_slice, config)}
    write_json(options.out / "summary.json", summary)
    score = summary["dice"]["mean"]
    print("test: no score" if score is None else f"test DICE {score:.4f}")


def train(network: BasicUNet, config: Config, data: SliceDataModule) -> dict[str, torch.Tensor]:
    """Train and return the weights of the epoch with the best validation DICE."""
    error = config.regularization.error
    loss = MixedLoss(error.ce, error.dice, error.ssim)
    spec = config.optimizer
    optimizer = torch.optim.Adam(network.parameters(), spec.lr, spec.betas, spec.eps)
    bfloat = choose_precision(config.training.precision, "cpu").startswith("bf16")
    best_score = -1.0
    best: dict[str, torch.Tensor] = {}
    size = config.data.batch_size
    for epoch in range(config.training.epochs):
        order = epoch_order(data.train.foreground, config.data.sampling, config.seed, epoch)
        batches = [order[i * size : (i + 1) * size] for i in range(max(1, len(order) // size))]
        network.train()
        for index, batch in enumerate(DataLoader(data.train, batch_sampler=batches)):
            done = epoch + index / len(batches)
            factor = learning_rate_factor(config.schedule, done, config.training.epochs)
            optimizer.param_groups[0]["lr"] = spec.lr * factor
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat):
                logits = network(batch["image"])
            optimizer.zero_grad()
            loss(logits, batch["mask"]).backward()
            optimizer.step()
        score = validate(network, config, data)
        print(f"epoch {epoch + 1}/{config.training.epochs} val DICE {score:.4f}", flush=True)
        # Under the policy `nan` there may be no score at all, which any other beats.
        score = -1.0 if math.isnan(score) else score
        if score > best_score or not best:
            best_score = score
            best = {name: value.clone() for name, value in network.state_dict().items()}
    return best


def validate(network: BasicUNet, config: Config, data: SliceDataModule) -> float:
    """Return the mean DICE over the validation cases, NaN where none has a score."""
    network.eval()
    predictor = Predictor(network, config.data.image, data.channels, device="cpu")
    store = data.store
    scores = []
    for case in data.splits.val:
        predicted = predictor.labels(store.image(case), case)
        counts = count_slices(predicted, store.mask(case), len(store.classes)).sum(dim=0)
        scores.append(dice(counts, config.evaluation.empty)[1:])
    return float(torch.stack(scores).nanmean())


if __name__ == "__main__":
    run_main(main)
