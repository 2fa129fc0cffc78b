"""Write docs/configuration.md: every key of a configuration, from the models that check it.

    python docs/make_configuration.py            # writes the page
    python docs/make_configuration.py --check    # only says whether it is up to date

Names, values and defaults come from `medseg_reg.config`; what a key means is written below.
"""

from __future__ import annotations

import sys
from pathlib import Path

from configuration_keys import default_of, keys, values_of

from medseg_reg.config_classification import PresenceSpec
from medseg_reg.config_network import FOREIGN_NAMES, OWN_NAMES
from medseg_reg.config_pretraining import MaskingSpec
from medseg_reg.data.augment import TRANSFORMS
from medseg_reg.regularizers import regularizer_names

PAGE = Path(__file__).with_name("configuration.md")

MEANINGS = {
    "name": "Name of the run.",
    "run": "The run directory. `{name}` and `{seed}` stand for the values of those keys.",
    "seed": "Seed of weights, order, augmentation and layers. It does not draw the split.",
    "data.store": "The slice store to train on; see [data](data.md).",
    "data.phantom": "If set, a phantom is generated where the store is missing.",
    "data.phantom.cases": "Patients.",
    "data.phantom.size": "Rows and columns of a slice.",
    "data.phantom.slices": "Slices of a patient.",
    "data.phantom.seed": "Decides the anatomy.",
    "data.image.window": "The two values that become 0 and 1, in the unit of the store (HU for "
    "CT); what lies beyond is clipped. 8-bit images need none.",
    "data.image.percentiles": "The same by percentiles of each case, for MR and other free units.",
    "data.image.size": "Rows and columns of the network's input; null keeps those of the store.",
    "data.image.fit": "How a slice gets that size: `resize` stretches it, `letterbox` scales it "
    "evenly and pads, `crop` keeps its resolution and cuts or pads around the middle.",
    "data.split.kind": "`fractions` of the patients, `counts` of patients (the rest stays "
    "unused), `kfold` cross-validation, or a `file`.",
    "data.split.train": "Fraction or number of patients; a fraction left out is what the others "
    "leave.",
    "data.split.val": "Fraction or number of patients; a fraction left out is 0.15, or what the "
    "other two leave. With `kfold`, the fraction that validates outside the test fold; by default "
    "the next fold validates.",
    "data.split.test": "Fraction or number of patients; a fraction left out is 0.15, or what the "
    "other two leave. Leave it out for data with an official test part: that is the test part.",
    "data.split.folds": "Number of folds; 5 if left out.",
    "data.split.fold": "The fold that is tested, from 0. With an official test part it validates.",
    "data.split.file": "A JSON file with the lists `train`, `val`, `test` and, if wanted, "
    "`unused`.",
    "data.split.train_frames": "Train on so many slices, drawn at random from the training part.",
    "data.split.seed": "Decides the draw. Runs with different `seed` share one split.",
    "data.sampling.policy": "`all` slices; those with `foreground`; or `balanced`. Validation and "
    "test always see all slices.",
    "data.sampling.foreground_share": "Share of samples with foreground under `balanced`.",
    "data.sampling.per_epoch": "Samples in an epoch; null means as many as there are slices, with "
    "`foreground` as many as show it.",
    "data.ignore_label": "A label of the masks besides the classes, as 255, whose pixels count in "
    "no loss and no score; the one that the data were converted with. See "
    "[training](training.md#pixels-without-a-label).",
    "data.batch_size": "Slices in a batch of one process. The Dice loss is pooled over a batch: "
    "compare runs at equal batch size.",
    "data.workers": "Processes that load data; 0 loads in the training process.",
    "data.resident": "Whether all slices stay in the memory of the device that trains, and are "
    "augmented there; then no process loads. `auto`: on a CUDA GPU where they take at most a "
    "quarter of its free memory; see [training](training.md#slices-that-stay-on-the-gpu).",
    "network.name": "The network; see [networks](networks.md). A name with a point is of another "
    "package, and its own arguments stand beside it.",
    "network.channels": "Feature maps of each level; the last is the bottleneck. At least three "
    "levels for `attention_unet`.",
    "network.norm": "Normalization after each convolution.",
    "network.activation": "Activation.",
    "network.upsample": "`deconv` is a transposed convolution, in `unet3plus` of each map by "
    "itself; `nontrainable` is linear interpolation, and a 1x1 convolution before it where the "
    "numbers of maps differ. The default of `unet3plus` is `nontrainable`.",
    "network.head": "`softmax` has one output for each class; `sigmoid` has one output, for two "
    "classes. Of every network.",
    "network.tree_depth": "If above 0, the last convolution becomes a hierarchical mixture of "
    "2^depth experts; see [networks](networks.md#a-mixture-of-experts-as-head). Of every network.",
    "network.experts": "For transformers of other packages: if set, feed-forward blocks become "
    "mixtures of experts; see [networks](networks.md#experts-in-transformers).",
    "network.experts.count": "Experts in a block.",
    "network.experts.every": "1 for each feed-forward block, 2 for every second one, and so on.",
    "network.experts.top": "Experts that a token meets, 1 or 2.",
    "network.experts.capacity": "In training, the room of an expert as a multiple of its equal "
    "share of the tokens; what finds no room skips the block. Evaluation has no limit.",
    "network.experts.balance": "Weight of the loss that keeps the experts in balance.",
    "network.experts.jitter": "In training, the router sees features times a factor drawn from "
    "1 - jitter to 1 + jitter.",
    "network.experts.exchange": "Over several processes: whether tokens travel to the one process "
    "that computes their expert. The network and its gradients are the same.",
    "network.token_selection": "For transformers of other packages: if set, later blocks work on "
    "tokens that predictors choose; see [networks](networks.md#chosen-tokens-in-transformers).",
    "network.token_selection.keep": "Share of the patches that blocks of the first stage work on; "
    "its square in the second, and so on.",
    "network.token_selection.stages": "Equal parts into which these blocks are divided.",
    "network.token_selection.first": "Blocks at the beginning that run on all tokens; null means "
    "a quarter of them.",
    "network.token_selection.mode": "`block`: tokens that are not chosen skip a whole block; "
    "`feed_forward`: they take one linear layer in place of its MLP.",
    "network.token_selection.weight": "Weight of the loss that holds the shares.",
    "network.token_selection.temperature": "Of the relaxation through which predictors learn.",
    "network.token_labels": "For transformers of other packages: if set, tokens learn what their "
    "patches show; see [networks](networks.md#tokens-that-learn-what-their-patches-show).",
    "network.token_labels.weight": "Weight of that loss.",
    "network.token_labels.taps": "Behind how many blocks: 1 for the last, 3 for the ends of three "
    "equal parts.",
    "network.token_labels.foreground": "How much more a patch full of foreground counts than one "
    "of background.",
    "network.reuse": "If set, the network takes in what a finished coarse run says of each image, "
    "as further channels; see [networks](networks.md#what-a-coarse-network-found). Of every "
    "network.",
    "network.reuse.run": "The directory of that run.",
    "network.reuse.what": "`probabilities` of all classes, or the `logits` as they are.",
    "network.pretrained": "A local file of weights, for the whole network or for its encoder; see "
    "[networks](networks.md#pretrained-weights). Of every network.",
    "network.pretrained_strict": "Whether file and network must have the same tensors; if not, "
    "what fits is loaded. Of every network.",
    "network.pretrained_unseen": "Whether weights are refused that have seen images of test cases, "
    "or of which that is not known; if not, it is told. See "
    "[pre-training](pretraining.md#what-it-has-seen). Of every network.",
    "network.gate_full_resolution": "For `attention_unet`: whether the first skip connection has "
    "a gate too.",
    "network.cat_channels": "For `unet3plus`: width of each map that a decoder node joins.",
    "network.deep_supervision": "For `unet3plus`: whether the outputs of all levels are trained.",
    "network.classification_guided": "For `unet3plus`: whether it is trained to say which classes "
    "a slice shows, and then takes the others out.",
    "regularization.data": "Group 1, data: albumentations transforms in their order. See "
    "[below](#augmentation).",
    "regularization.data[].name": "The transform. Its own arguments stand beside it.",
    "regularization.mix_token": "If set, boxes of patches travel between the images of a batch; "
    "see [training](training.md#mixed-tokens).",
    "regularization.mix_token.p": "Share of the batches that are mixed.",
    "regularization.mix_token.alpha": "Of the Beta distribution of the area that stays.",
    "regularization.mix_token.patch": "Side of a patch in pixels; null means that of the first "
    "tokens of the transformer.",
    "regularization.architecture": "Group 2, architecture: layers in their places. See "
    "[regularizers](regularizers.md).",
    "regularization.architecture[].name": "The layer. Its own parameters stand beside it.",
    "regularization.architecture[].places": "One place or a list; names as in "
    "[regularizers](regularizers.md#places). By default those of the layer's class.",
    "regularization.architecture[].schedule.name": "The rate over the training; see "
    "[training](training.md#rates). `schedule: linear` is short for `schedule: {name: linear}`.",
    "regularization.architecture[].schedule.start": "First factor on `p`, for `linear` and "
    "`cosine`.",
    "regularization.architecture[].schedule.duration": "Share of the training over which the "
    "factor rises to 1, for `linear` and `cosine`.",
    "regularization.architecture[].schedule.turn": "Share of the training after which the rate is "
    "0, for `v_shape`. Published: the end of the learning rate's warm-up.",
    "regularization.architecture[].depth_ramp": "If set, the rate changes evenly from place to "
    "place, in the order in which a slice comes by. `true` is a ramp from 0 to `p`.",
    "regularization.architecture[].depth_ramp.first": "Factor on `p` at the first place.",
    "regularization.architecture[].depth_ramp.last": "Factor on `p` at the last place.",
    "regularization.error.ce": "Group 3, error function: weight of the cross-entropy.",
    "regularization.error.dice": "Weight of the Dice loss (pooled over the batch, without the "
    "background).",
    "regularization.error.ssim": "Weight of the SSIM loss on probability maps.",
    "regularization.error.focal": "Weight of the focal loss; see [training](training.md#losses).",
    "regularization.error.iou": "Weight of the soft IoU loss (as `dice`).",
    "regularization.error.tversky": "Weight of the Tversky loss (as `dice`).",
    "regularization.error.ms_ssim": "Weight of the multi-scale SSIM loss.",
    "regularization.error.boundary": "Weight of the boundary loss, constant over the training; on "
    "a GPU each step waits for the CPU's distance transform.",
    "regularization.error.class_weights": "Weight of each class in `ce` and `focal`, the "
    "background first.",
    "regularization.error.region_weights": "Weight of each class in the mean of the other terms, "
    "the background first; its weight is not used.",
    "regularization.error.focal_gamma": "How strongly `focal` leaves out what is already right; 0 "
    "is the cross-entropy.",
    "regularization.error.tversky_alpha": "Weight of false positives in `tversky`.",
    "regularization.error.tversky_beta": "Weight of false negatives in `tversky`.",
    "regularization.error.tversky_gamma": "The Tversky loss is raised to 1 / this; published: 4/3.",
    "regularization.error.supervision": "Weights of the outputs of a network with "
    "`deep_supervision`, the finest first: 1, 1, 1, ..., or 1, 1/2, 1/4, ..., or a list; they are "
    "divided by their sum.",
    "regularization.error.label_smoothing": "Label smoothing s of the cross-entropy: of K "
    "classes the true one has the target 1 - s + s / K, the others s / K.",
    "regularization.error.distillation": "If set, the network also learns from a finished run; see "
    "[training](training.md#a-teacher).",
    "regularization.error.distillation.teacher": "The directory of that run.",
    "regularization.error.distillation.kind": "`soft`: the divergence of the classes; `hard`: the "
    "loss for the teacher's labels.",
    "regularization.error.distillation.temperature": "Of `soft`.",
    "regularization.error.distillation.weight": "Share of the teacher; the labels have the rest.",
    "regularization.penalty.weight_decay": "Group 4, penalty: with `adam` and `sgd` an L2 "
    "penalty, with `adamw` decoupled weight decay; see [training](training.md#penalties). Biases, "
    "normalization layers, and the tables of positions of transformers are exempt.",
    "regularization.penalty.l1": "Weight of the sum of absolute weights in the loss, with the same "
    "exemptions.",
    "regularization.optimization.early_stopping": "Group 5, optimization: if set, stop when a "
    "score has not improved for some epochs.",
    "regularization.optimization.early_stopping.monitor": "The score.",
    "regularization.optimization.early_stopping.patience": "After so many validations in a row "
    "without improvement the training ends.",
    "regularization.optimization.early_stopping.min_delta": "An improvement is larger than this.",
    "regularization.optimization.gradient_clip": "Largest norm of the gradient.",
    "regularization.optimization.select": "Which weights are kept: those of the epoch with the "
    "best validation DICE, or the last ones.",
    "optimizer.name": "The optimizer.",
    "optimizer.lr": "Learning rate.",
    "optimizer.betas": "For `adam` and `adamw`.",
    "optimizer.eps": "For `adam` and `adamw`.",
    "optimizer.momentum": "For `sgd`.",
    "optimizer.nesterov": "For `sgd`.",
    "schedule.name": "The learning rate over the training. It changes with each batch.",
    "schedule.warmup_epochs": "Linear rise at the start.",
    "schedule.power": "For `polynomial`.",
    "schedule.final_factor": "Factor at the end, for `cosine` and `polynomial`.",
    "schedule.milestones": "Epochs, for `step`.",
    "schedule.gamma": "Factor at each milestone, for `step`.",
    "training.epochs": "Epochs.",
    "training.precision": "`auto` takes bfloat16 where the processor is fast at it; see "
    "[training](training.md#precision).",
    "training.accumulate": "Batches whose gradients make one step.",
    "training.memory_format": "Memory order of the maps; `auto` takes what was measured to be "
    "faster for the network's normalization and the device; see "
    "[performance](performance.md#memory-format).",
    "training.compile": "Compile the network by torch.compile before the first step, or by one of "
    "its modes: `reduce-overhead` (CUDA graphs; refused without a CUDA GPU) or `max-autotune`; see "
    "[performance](performance.md#compiling) for what that costs.",
    "training.keep_memory": "On a CPU under Linux, keep freed memory for the next step: faster, "
    "with more memory resident; see [performance](performance.md#memory-of-a-cpu).",
    "training.deterministic": "Refuse operations that may differ between two runs on a GPU.",
    "training.accelerator": "What to compute on.",
    "training.devices": "GPUs (or CPU processes) of one machine.",
    "training.num_nodes": "Machines.",
    "training.validate_every": "Epochs between two validations.",
    "training.checkpoint_minutes": "Also save inside an epoch when the last save is older; null "
    "saves after epochs alone.",
    "training.progress": "Show progress bars.",
    "masking.ratio": "Share of the patches that are hidden.",
    "masking.normalize": "Whether the target of each patch is brought to mean 0 and variance 1.",
    "masking.width": "Features of a token in the decoder, which is thrown away.",
    "masking.blocks": "Transformer blocks of the decoder.",
    "masking.heads": "Heads of their attention.",
    "presence.pixels": "The fewest pixels of a class by which a slice shows it.",
    "presence.balance": "Whether slices with a class weigh as much, together, as those without it.",
    "presence.sensitivity": "The threshold is the highest that finds this share of the validation "
    "slices with a class.",
    "evaluation.empty": "Score of a class that is empty in truth and prediction; see "
    "[evaluation](evaluation.md#empty-slices).",
    "evaluation.metrics": "Scores besides those from counts: `surface` (HD95, ASSD, surface DICE) "
    "and `calibration`; see [evaluation](evaluation.md#surfaces). `[]` for none.",
    "evaluation.missing": "Distance where truth or prediction alone is empty: the diagonal of the "
    "volume, or `nan`, which leaves it out of means.",
    "evaluation.tolerance": "Of the surface DICE, in millimetres; in pixels where a case of the "
    "data has no spacing.",
    "evaluation.bins": "Bins of the calibration error.",
    "evaluation.confidence": "Coverage of the intervals.",
    "evaluation.resamples": "Bootstrap resamples.",
    "evaluation.batch_size": "Slices that are predicted at a time.",
}

INTRODUCTION = """\
# Configuration

A configuration is one YAML file. Unknown keys are errors; the message names the line and the
nearest right key. Reading a configuration never imports or runs code. Aliases (`*name`) are
refused.

```bash
python -m medseg_reg.config configs/demo.yaml seed=1   # check, and print with every default
python -m medseg_reg.config --schema > schema.json     # JSON Schema, for editors
```

Any key can be given on the command line: `training.epochs=3`, or for an entry of a list
`regularization.architecture.0.p=0.2`. To train without layers: `regularization.architecture=[]`.

Keys without a default must be given. This page is written by `docs/make_configuration.py`.
"""

SECTIONS = {
    "": ("The run", ""),
    "data": ("data", "Which data, and how they reach the network."),
    "network": ("network", "The network."),
    "regularization": (
        "regularization",
        "Five groups, after J. Kukacka, V. Golkov, D. Cremers, *Regularization for Deep Learning: "
        "A Taxonomy*, arXiv:1710.10686, 2017.",
    ),
    "optimizer": ("optimizer", "The defaults are those of the published protocol."),
    "schedule": ("schedule", "The learning rate, as a factor on `optimizer.lr`."),
    "training": ("training", "How long, on what, and how exactly."),
    "evaluation": ("evaluation", "How a trained network is judged."),
    "masking": (
        "masking",
        "Of a [pre-training](pretraining.md) alone, which has no `evaluation`, and of "
        "`regularization` `data`, `penalty` and `optimization.gradient_clip`.",
    ),
    "presence": (
        "presence",
        "Of a [classifier of slices](classification.md) alone. Its `network` is a vision "
        "transformer of timm; of `regularization` it has `data`, `error.distillation`, `penalty`, "
        "`optimization.gradient_clip` and `select`, and of `evaluation` `confidence`, `resamples` "
        "and `batch_size`.",
    ),
}


def page() -> str:
    """Return the whole page.

    Raises:
        SystemExit: a key has no meaning here, or a meaning no key; names them.
    """
    found = dict(keys())
    for prefix, group in {"masking.": MaskingSpec, "presence.": PresenceSpec}.items():
        found |= dict(keys(group, prefix))
    if found.keys() != MEANINGS.keys():
        odd = ", ".join(sorted(found.keys() ^ MEANINGS.keys()))
        raise SystemExit(f"docs/make_configuration.py: MEANINGS differs from the models: {odd}")
    lines = [INTRODUCTION]
    for section, (title, text) in SECTIONS.items():
        lines += [f"## {title}", ""]
        lines += [text, ""] if text else []
        lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        for key, field in found.items():
            if (key.split(".")[0] if "." in key else "") == section:
                values = values_of(field.annotation, field.metadata)
                if key == "network.name":
                    values = ", ".join(f"`{name}`" for name in (*OWN_NAMES, *FOREIGN_NAMES))
                lines.append(f"| `{key}` | {values} | {default_of(field)} | {MEANINGS[key]} |")
        lines.append("")
    return "\n".join([*lines, _choices()])


def _choices() -> str:
    transforms = ", ".join(f"`{name}`" for name in TRANSFORMS)
    layers = ", ".join(f"`{name}`" for name in regularizer_names())
    return (
        "## Augmentation\n\n"
        f"Transforms: {transforms}.\n\nThey are those of albumentations 2.0.8, with its arguments "
        "and defaults. Others are refused: they do not keep a mask a mask, or do not take images "
        "of the range 0 to 1. A wrong argument is an error, not a warning.\n\n"
        "## Layers\n\n"
        f"Layers: {layers}.\n"
    )


def main() -> None:
    """Write the page, or check it."""
    wanted = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != wanted:
            raise SystemExit(f"{PAGE}: is out of date; run python docs/make_configuration.py")
        return
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
