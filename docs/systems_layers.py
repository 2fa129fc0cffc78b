"""The layers among `systems`: how each was verified."""

from __future__ import annotations

from systems import CLASSES, FORMULA, LIBRARY, PIXELS, PUBLISHED, TOY, WORKED, System


def _layer(name: str, **tests: str) -> dict[str, str]:
    """Return tests in the file of a layer."""
    kinds = {"formula": FORMULA, "worked": WORKED, "published": PUBLISHED, "library": LIBRARY}
    kinds["toy"] = TOY
    return {kinds[kind]: f"regularizers/{name}::{test}" for kind, test in tests.items()}


METHODS: dict[str, System] = {
    "adcm": System(
        CLASSES,
        _layer("test_adcm.py", formula="test_the_attentions_equal_the_reference"),
        "the paper's rule was not found: a reconstruction",
    ),
    "adl": System(
        "weakly supervised localization",
        _layer("test_adl.py", formula="test_each_sample_is_masked_or_weighted_as_in_the_reference"),
    ),
    "auto_dropout": System(
        CLASSES,
        {
            **_layer("test_autodropout.py", formula="test_a_pattern_is_that_of_the_reference"),
            TOY: "study/samplers/test_controller.py"
            "::test_its_mean_reward_rises_and_beats_random_search_within_200_trials",
        },
        "the numbers of the published controller; a search with as many trials as published",
    ),
    "channel_drop_block": System(
        CLASSES,
        _layer(
            "test_channel_dropblock.py",
            formula="test_the_similarities_equal_the_reference",
            worked="test_the_cosine_is_the_golden_value",
            published="test_the_faithful_rule_realises_the_rates_measured_on_the_published_rule",
        ),
    ),
    "clustering_dropout": System(
        CLASSES,
        _layer(
            "test_clustering_dropout.py",
            formula="test_the_rates_have_mean_p_stay_under_the_cap_and_equal_the_reference",
            worked="test_three_clusters_get_the_rates_worked_out_by_hand",
        ),
        "the paper's formula was not found: a reconstruction",
    ),
    "corrdrop_channel": System(
        CLASSES,
        _layer(
            "test_corrdrop.py",
            formula="test_the_rates_have_mean_p_exactly_and_equal_the_reference",
            worked="test_the_correlation_is_the_golden_value",
        ),
        "the published file cannot run in its own network",
    ),
    "corrdrop_spatial": System(
        CLASSES,
        _layer(
            "test_corrdrop.py",
            formula="test_the_rates_have_mean_p_exactly_and_equal_the_reference",
            worked="test_the_correlation_is_the_golden_value",
            published="test_the_faithful_rule_realises_the_rates_measured_on_the_published_code",
        ),
    ),
    "cutout": System(
        CLASSES,
        _layer(
            "test_cutout.py",
            formula="test_every_hole_is_one_of_the_reference_and_each_as_likely",
            published="test_the_faithful_rule_cuts_the_published_squares",
        ),
    ),
    "drop_block": System(
        CLASSES,
        _layer(
            "test_dropblock.py",
            formula="test_the_faithful_rule_equals_the_reference",
            worked="test_the_golden_gammas_of_the_published_rule",
            library="test_the_faithful_rule_realises_the_rates_measured_elsewhere",
        ),
    ),
    "drop_head": System(
        "translation, text classification",
        {
            **_layer(
                "test_drophead.py",
                formula="test_heads_are_dropped_whole_and_the_others_scaled_by_their_number",
            ),
            WORKED: "regularizers/test_drophead.py::test_the_v_schedule_has_the_published_values",
        },
        "no official code was found",
    ),
    "drop_key": System(
        CLASSES,
        _layer(
            "test_dropkey.py",
            formula="test_weights_behind_the_softmax_are_those_of_logits_masked_before_it",
        ),
        "there is no official code",
    ),
    "drop_path": System(
        CLASSES,
        {
            **_layer("test_stochastic_depth.py", formula="test_drop_path_equals_the_reference"),
            LIBRARY: "networks/test_backbones.py"
            "::test_drop_path_of_this_package_draws_what_timm_draws",
        },
    ),
    "dropout": System(
        CLASSES,
        _layer(
            "test_dropout.py",
            library="test_the_element_wise_layers_follow_the_rule_of_torchs_dropout",
        ),
    ),
    "focused_dropout": System(
        CLASSES,
        _layer(
            "test_focused_dropout.py",
            formula="test_the_map_equals_the_reference",
            worked="test_the_masks_are_the_golden_ones",
        ),
    ),
    "gating_dropout": System(
        "translation",
        _layer(
            "experts/test_gating_dropout.py",
            formula="test_the_gates_that_close_are_those_of_the_reference",
        ),
        "measured on two processes of one machine alone",
        "tokens of an image",
    ),
    "guided_key_dropout": System(
        "no paper",
        _layer(
            "test_guided_dropout.py",
            formula="test_hiding_keys_from_all_is_leaving_them_out_of_the_sequence",
            worked="test_the_attention_dropped_at_equal_rates_differs_thirtyfold",
        ),
        "a gain on data: one study, of a small UNETR, shows none",
    ),
    "guided_residual_dropout": System(
        "no paper",
        _layer(
            "test_guided_dropout.py",
            formula="test_residuals_are_dropped_and_weighted_as_in_the_formula",
        ),
        "windows and reduced keys; a result on data",
    ),
    "heuristic_dropout": System(
        PIXELS,
        _layer(
            "test_heuristic.py",
            formula="test_the_faithful_rule_equals_the_reference",
            worked="test_the_scores_are_the_golden_values",
        ),
        "the published table, see [results](results.md)",
    ),
    "input_dropout": System(
        PIXELS,
        _layer(
            "test_dropout.py",
            library="test_the_element_wise_layers_follow_the_rule_of_torchs_dropout",
        ),
        "no code was published",
    ),
    "nsdropout": System(
        CLASSES,
        _layer(
            "test_nsdropout.py",
            formula="test_a_step_equals_the_published_algorithm",
            toy="test_on_digits_random_masks_do_as_well_as_the_method_and_both_by_the_leak",
        ),
        "an inference without the leak, as no such is published",
        "masks for each pixel's class",
    ),
    "patch_dropout": System(
        CLASSES,
        {
            FORMULA: "insertion/test_patch_dropout.py"
            "::test_each_tap_is_the_run_on_the_kept_tokens_put_in_their_places"
        },
        "in windows (Swin), a pattern for each sample; Swin V2",
        "a mask token for each patch that is left out; in SwinUNETR and timm's Swin too",
    ),
    "prob_drop_block": System(
        CLASSES,
        _layer(
            "test_prob_dropblock.py",
            formula="test_the_faithful_rule_equals_the_reference",
            worked="test_gamma_is_the_golden_value",
        ),
    ),
    "spatial_dropout": System(
        "localization of joints",
        _layer(
            "test_dropout.py",
            library="test_spatial_dropout_equals_torchs_own_of_that_dimension",
        ),
    ),
    "stochastic_depth": System(
        CLASSES,
        _layer("test_stochastic_depth.py", formula="test_a_residual_block_equals_the_reference"),
    ),
    "structural_dropout": System(
        CLASSES,
        _layer(
            "test_structural_dropout.py",
            formula="test_eval_at_a_width_is_the_reference_cut",
            published="test_the_faithful_rule_cuts_as_often_as_the_published_code",
        ),
    ),
    "token_merging": System(
        CLASSES,
        _layer("test_token_merging.py", formula="test_the_groups_are_those_of_the_reference"),
        "windows (Swin) and reduced keys (MiT)",
        "merged for each block and taken apart again, so that the map has every token",
    ),
    "tree_dropout": System(
        "regression, classification",
        _layer(
            "experts/test_tree_dropout.py",
            formula="test_expected_gates_are_the_mean_over_every_tree_that_training_draws",
            toy="test_dropout_keeps_a_deep_tree_from_overfitting_and_a_shallow_one_from_fitting",
        ),
        "there is no published code",
        "a tree for each pixel",
    ),
    "weighted_channel_dropout": System(
        CLASSES,
        _layer(
            "test_weighted_channel_dropout.py",
            formula="test_every_set_is_selected_as_often_as_the_reference_says",
            worked="test_inclusion_and_mean_factor_are_the_golden_values",
        ),
        "no code was published",
    ),
}
