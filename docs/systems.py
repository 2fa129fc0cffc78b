"""What docs/systems.md says of each system: how it was verified. `systems_layers` has the layers.

`make_methods.py` writes the page; with --check it sees that every registered method, network and
loss has an entry, and that every test that is named exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# What a system was compared with. The test named beside it does the comparison.
FORMULA = "formula"
WORKED = "worked numbers"
PUBLISHED = "numbers of the published code"
LIBRARY = "another library"
TOY = "toy task"

KINDS = {
    FORMULA: "the equations, written a second time in plain NumPy or PyTorch, mostly in float64 "
    "(`tests/reference/`)",
    WORKED: "numbers that were worked out once, by hand or by another program",
    PUBLISHED: "what the authors' code gives, measured by running it or taken from its listing",
    LIBRARY: "torch, torchvision, MONAI or timm",
    TOY: "what a small training shows",
}


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        purpose: the task that it was published for.
        tests: by kind of comparison, the test that makes it, as "file::function" below tests/.
        missing: what was not verified, or is not there.
        form: how the form here differs in kind from the published one; empty if it does not.
        dense: whether it gives every pixel an output.
    """

    purpose: str
    tests: Mapping[str, str]
    missing: str = ""
    form: str = ""
    dense: bool = True


CLASSES, PIXELS = "classification", "segmentation"

# Name and paper of what is no layer: by its key in a configuration.
NETWORKS: dict[str, tuple[str, str, System]] = {
    "unet": (
        "U-Net",
        "Ronneberger et al., MICCAI 2015",
        System(
            PIXELS,
            {FORMULA: "networks/test_unet.py::test_the_forward_pass_is_the_one_written_out"},
        ),
    ),
    "attention_unet": (
        "Attention U-Net",
        "Oktay et al., MIDL 2018",
        System(
            PIXELS,
            {
                FORMULA: "networks/test_attention_unet.py"
                "::test_the_coefficients_are_those_of_the_formula"
            },
            "what the code has beyond the paper: see [networks](networks.md#attention-u-net)",
        ),
    ),
    "unet3plus": (
        "UNet 3+",
        "Huang et al., ICASSP 2020",
        System(
            PIXELS,
            {
                FORMULA: "networks/test_unet3plus.py::test_the_forward_pass_is_the_one_written_out",
                WORKED: "networks/test_unet3plus.py"
                "::test_the_original_has_the_number_of_weights_that_its_drawing_gives",
            },
        ),
    ),
    "tree_depth": (
        "Hierarchical mixture of experts",
        "Jordan and Jacobs, Neural Computation 1994",
        System(
            "regression",
            {FORMULA: "networks/test_mixture.py::test_the_head_is_a_tree_of_its_convolutions"},
            form="a tree for each pixel",
        ),
    ),
    "experts": (
        "Sparsely gated experts",
        "Shazeer et al., ICLR 2017; Switch Transformer, JMLR 2022",
        System(
            "language, translation",
            {
                FORMULA: "regularizers/experts/test_routing.py"
                "::test_weights_and_room_are_those_of_the_reference",
                TOY: "regularizers/experts/test_routing.py"
                "::test_descending_the_balance_loss_brings_experts_into_balance",
            },
            "a result on data",
            "tokens of an image",
        ),
    ),
    "token_selection": (
        "DynamicViT and SViT",
        "Rao et al., NeurIPS 2021 and T-PAMI 2023; Liu et al., WACV 2024",
        System(
            "classification; detection",
            {
                FORMULA: "networks/test_token_selection.py"
                "::test_the_penalty_is_the_squared_distance_and_there_in_training_alone",
                TOY: "networks/test_token_selection.py"
                "::test_a_training_reaches_the_share_and_keeps_the_tokens_that_matter",
            },
            "the distance of the tokens in distillation; a result on data",
            "tokens that are not chosen stay in the map",
        ),
    ),
    "masking": (
        "Masked autoencoder (pre-training)",
        "He et al., CVPR 2022",
        System(
            "pre-training for classification, detection, segmentation",
            {
                FORMULA: "networks/test_masked_autoencoder.py::test_the_loss_equals_brute_force",
                LIBRARY: "networks/test_masked_autoencoder.py"
                "::test_with_every_patch_visible_it_is_the_transformer_itself",
                TOY: "engine/test_pretraining.py::test_on_frames_of_bagls_it_beats_the_mean_patch",
            },
            "whether it helps a segmentation; transformers of windows",
            "its weights go into UNETR and DPT",
        ),
    ),
    "slim": (
        "Patch Slimming (scores, rows that are not computed)",
        "Tang et al., CVPR 2022",
        System(
            CLASSES,
            {
                FORMULA: "networks/test_patch_impact.py"
                "::test_the_recursion_is_the_mean_over_every_choice_of_heads",
                WORKED: "networks/test_slimming.py"
                "::test_rows_that_are_left_out_are_those_that_are_reused",
            },
            "a search, as nesting would keep every patch; a result on data",
            "impacts on all blocks that the decoder reads; other rows keep what they had",
        ),
    ),
    "token_labels": (
        "LV-ViT: token labelling",
        "Jiang et al., NeurIPS 2021",
        System(
            CLASSES,
            {
                FORMULA: "networks/test_token_labels.py"
                "::test_the_loss_and_its_gradient_are_those_of_the_formula",
                TOY: "networks/test_token_labels.py::test_tokens_learn_what_their_patches_show",
            },
            "the network itself (its stem, scaled residuals, logits of tokens in evaluation); a "
            "result on data",
            "labels of tokens are the fractions of the classes in their patches",
        ),
    ),
    "reuse": (
        "DVT (Dynamic Vision Transformer): feature reuse",
        "Wang et al., NeurIPS 2021",
        System(
            CLASSES,
            {
                FORMULA: "networks/test_reuse.py"
                "::test_the_classes_of_the_coarse_network_are_joined_to_the_image",
            },
            "tokens of the coarse network in the MLPs of the finer one; reuse of attention",
            "the classes of each pixel, as channels of the image; any two networks",
        ),
    ),
}

TRAINING: dict[str, tuple[str, str, System]] = {
    "regularization.mix_token": (
        "LV-ViT: MixToken",
        "Jiang et al., NeurIPS 2021",
        System(
            CLASSES,
            {FORMULA: "data/test_mix_token.py::test_each_image_has_the_box_of_its_partner"},
            "a result on data",
            "images and masks are mixed on the grid of patches",
        ),
    ),
    "regularization.error.distillation": (
        "DeiT: distillation",
        "Touvron et al., ICML 2021",
        System(
            CLASSES,
            {FORMULA: "losses/test_distillation.py::test_it_equals_its_formula"},
            "weights by the teacher's confidence; a result on data",
            "for each pixel",
        ),
    ),
}

# By the command.
SLICES: dict[str, tuple[str, str, System]] = {
    "classify": (
        "DeiT: distillation token",
        "Touvron et al., ICML 2021",
        System(
            CLASSES,
            {
                FORMULA: "engine/test_classification.py"
                "::test_labels_go_to_the_class_token_and_the_teacher_to_the_other",
                LIBRARY: "networks/test_slice_classifier.py"
                "::test_training_returns_both_logits_and_evaluation_their_mean",
                TOY: "engine/test_classification.py"
                "::test_a_teacher_lets_a_classifier_learn_what_labels_do_not_say",
            },
            "mixup, repeated augmentation and averaged weights of the published recipe",
            "the classes that a slice shows, each by a sigmoid; the teacher segments",
            dense=False,
        ),
    ),
    "slim": (
        "Patch Slimming (static)",
        "Tang et al., CVPR 2022",
        System(
            CLASSES,
            {
                FORMULA: "networks/test_slimming.py::test_taking_patches_out_equals_hiding_them",
                WORKED: "networks/test_patch_search.py"
                "::test_a_block_gets_the_fewest_steps_of_best_patches_that_suffice",
            },
            "the fine-tuning of the whole network at the end; the dynamic variant",
            "as published",
            dense=False,
        ),
    ),
}

# By the option of medseg_reg.predict.
PREDICTION: dict[str, tuple[str, str, System]] = {
    "--first": (
        "DVT (Dynamic Vision Transformer): early exit",
        "Wang et al., NeurIPS 2021",
        System(
            CLASSES,
            {
                FORMULA: "inference/test_confidence.py"
                "::test_it_is_the_mean_over_the_boundary_or_the_least_sure_pixel",
            },
            "training of both as one network; thresholds of windows from validation data",
            "slices or windows exit by the confidence at the boundaries; any two networks",
        ),
    ),
}

_TERMS = {FORMULA: "losses/test_terms.py::test_each_term_equals_its_formula"}

LOSSES: dict[str, tuple[str, str, System]] = {
    "ce": ("Cross-entropy", "", System(PIXELS, _TERMS)),
    "dice": ("Dice loss", "Milletari et al., 3DV 2016", System(PIXELS, _TERMS)),
    "iou": ("IoU loss", "Rahman and Wang, ISVC 2016", System(PIXELS, _TERMS)),
    "focal": (
        "Focal loss",
        "Lin et al., ICCV 2017",
        System("detection", _TERMS, form="for each pixel"),
    ),
    "tversky": (
        "Tversky and focal Tversky loss",
        "Salehi et al., MLMI 2017; Abraham and Khan, ISBI 2019",
        System(PIXELS, _TERMS),
    ),
    "ssim": ("SSIM", "Wang et al., TIP 2004", System("image quality", _TERMS)),
    "ms_ssim": (
        "MS-SSIM",
        "Wang et al., Asilomar 2003",
        System(
            "image quality",
            {
                **_TERMS,
                LIBRARY: "losses/test_similarity.py::test_it_equals_monai_on_large_images",
            },
        ),
    ),
    "boundary": (
        "Boundary loss",
        "Kervadec et al., MIDL 2019",
        System(
            PIXELS,
            {**_TERMS, LIBRARY: "losses/test_boundary.py::test_it_equals_monai"},
            "its weight does not rise during the training",
        ),
    ),
}
