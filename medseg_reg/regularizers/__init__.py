"""Every regularizer of the toolkit; imports torch alone.

| name | class | what it drops |
|---|---|---|
| ``heuristic_dropout`` | `HeuristicDropout` | channels of high entropy and low variance |
| ``corrdrop_spatial`` | `CorrDropSpatial` | blocks of pixels that correlate little with the rest |
| ``corrdrop_channel`` | `CorrDropChannel` | channels that correlate little with the rest |
| ``input_dropout`` | `InputDropout` | pixels of the input image |
| ``dropout`` | `Dropout` | single elements |
| ``spatial_dropout`` | `SpatialDropout` | channels at random |
| ``auto_dropout`` | `AutoDropout` | a pattern of tiled rectangles |
| ``cutout`` | `Cutout` | a box of the input image |
| ``drop_block`` | `DropBlock` | square blocks of pixels |
| ``drop_path`` | `DropPath` | the residual branch of single samples |
| ``stochastic_depth`` | `StochasticDepth` | the residual branch of a whole batch |
| ``drop_key`` | `DropKey` | keys of an attention, for each query its own |
| ``drop_head`` | `DropHead` | whole heads of an attention |
| ``guided_key_dropout`` | `GuidedKeyDropout` | tokens for all others, guided by attention |
| ``guided_residual_dropout`` | `GuidedResidualDropout` | tokens in a block, guided by attention |
| ``patch_dropout`` | `PatchDropout` | patches of a transformer, for mask tokens |
| ``token_merging`` | `TokenMerging` | patches, merged into others that are like them |
| ``prob_drop_block`` | `ProbDropBlock` | blocks of pixels, rather around strong activations |
| ``structural_dropout`` | `StructuralDropout` | all channels above a random cutoff |
| ``clustering_dropout`` | `ClusteringDropout` | channels of weak response (a reconstruction) |
| ``channel_drop_block`` | `ChannelDropBlock` | a random channel and those that resemble it most |
| ``focused_dropout`` | `FocusedDropout` | in some batches, all positions outside the focus |
| ``weighted_channel_dropout`` | `WeightedChannelDropout` | channels, rather those of low activity |
| ``adl`` | `ADL` | the most active region |
| ``adcm`` | `ADCM` | channels and positions of low attention (a reconstruction) |
| ``nsdropout`` | `NSDropout` | per class, channels that respond more than in validation |
| ``tree_dropout`` | `TreeDropout` | left subtrees of a hierarchical mixture of experts |
| ``gating_dropout`` | `GatingDropout` | in some steps, the gates to experts of other machines |

Use one directly (``HeuristicDropout(p=0.1)``) or by name (``build("heuristic_dropout", p=0.1)``).
"""

from medseg_reg.regularizers.adcm import (
    ADCM,
    adcm,
    channel_attention,
    position_attention,
    stochastic_pool,
)
from medseg_reg.regularizers.adl import ADL, adl
from medseg_reg.regularizers.autodropout import AutoDropout, auto_dropout, pattern_coverage
from medseg_reg.regularizers.base import (
    Regularizer,
    build,
    register,
    regularizer_class,
    regularizer_names,
)
from medseg_reg.regularizers.channel_dropblock import (
    ChannelDropBlock,
    channel_drop_block,
    channel_similarity,
)
from medseg_reg.regularizers.clustering_dropout import (
    ClusteringDropout,
    cluster_rates,
    clustering_dropout,
)
from medseg_reg.regularizers.corrdrop import (
    CorrDropChannel,
    CorrDropSpatial,
    corrdrop_channel,
    corrdrop_spatial,
    drop_probability,
    row_correlation,
)
from medseg_reg.regularizers.cutout import Cutout, cutout
from medseg_reg.regularizers.dropblock import DropBlock, calibrated_gamma, drop_block
from medseg_reg.regularizers.drophead import DropHead, drop_head
from medseg_reg.regularizers.dropkey import DropKey, drop_key
from medseg_reg.regularizers.dropout import Dropout, SpatialDropout, spatial_dropout
from medseg_reg.regularizers.experts import (
    GatingDropout,
    TreeDropout,
    gating_dropout,
    home_experts,
    leaf_shares,
    tree_dropout,
    tree_mixture,
)
from medseg_reg.regularizers.focused_dropout import FocusedDropout, focused_dropout
from medseg_reg.regularizers.guided_dropout import (
    GuidedKeyDropout,
    GuidedResidualDropout,
    guided_key_dropout,
    guided_rates,
    guided_residual_dropout,
    received_attention,
)
from medseg_reg.regularizers.heuristic import (
    HeuristicDropout,
    HeuristicScores,
    heuristic_dropout,
    heuristic_scores,
)
from medseg_reg.regularizers.input_dropout import InputDropout
from medseg_reg.regularizers.nsdropout import (
    NSDropout,
    class_masks,
    class_sums,
    nsdropout,
)
from medseg_reg.regularizers.patch_dropout import (
    PatchDropout,
    kept_lines,
    kept_patches,
    patch_dropout,
    patches_with_foreground,
)
from medseg_reg.regularizers.prob_dropblock import ProbDropBlock, prob_drop_block
from medseg_reg.regularizers.stochastic_depth import (
    DropPath,
    StochasticDepth,
    drop_path,
    stochastic_depth,
)
from medseg_reg.regularizers.structural_dropout import (
    StructuralDropout,
    kept_channels,
    structural_dropout,
    width_scale,
)
from medseg_reg.regularizers.token_merging import (
    TokenGroups,
    TokenMerging,
    match_tokens,
    merge_tokens,
    token_merging,
    unmerge_tokens,
    weigh_keys,
)
from medseg_reg.regularizers.weighted_channel_dropout import (
    WeightedChannelDropout,
    weighted_channel_dropout,
)

__all__ = [
    "ADCM",
    "ADL",
    "AutoDropout",
    "ChannelDropBlock",
    "ClusteringDropout",
    "CorrDropChannel",
    "CorrDropSpatial",
    "Cutout",
    "DropBlock",
    "DropHead",
    "DropKey",
    "DropPath",
    "Dropout",
    "FocusedDropout",
    "GatingDropout",
    "GuidedKeyDropout",
    "GuidedResidualDropout",
    "HeuristicDropout",
    "HeuristicScores",
    "InputDropout",
    "NSDropout",
    "PatchDropout",
    "ProbDropBlock",
    "Regularizer",
    "SpatialDropout",
    "StochasticDepth",
    "StructuralDropout",
    "TokenGroups",
    "TokenMerging",
    "TreeDropout",
    "WeightedChannelDropout",
    "adcm",
    "adl",
    "auto_dropout",
    "build",
    "calibrated_gamma",
    "channel_attention",
    "channel_drop_block",
    "channel_similarity",
    "class_masks",
    "class_sums",
    "cluster_rates",
    "clustering_dropout",
    "corrdrop_channel",
    "corrdrop_spatial",
    "cutout",
    "drop_block",
    "drop_head",
    "drop_key",
    "drop_path",
    "drop_probability",
    "focused_dropout",
    "gating_dropout",
    "guided_key_dropout",
    "guided_rates",
    "guided_residual_dropout",
    "heuristic_dropout",
    "heuristic_scores",
    "home_experts",
    "kept_channels",
    "kept_lines",
    "kept_patches",
    "leaf_shares",
    "match_tokens",
    "merge_tokens",
    "nsdropout",
    "patch_dropout",
    "patches_with_foreground",
    "pattern_coverage",
    "position_attention",
    "prob_drop_block",
    "received_attention",
    "register",
    "regularizer_class",
    "regularizer_names",
    "row_correlation",
    "spatial_dropout",
    "stochastic_depth",
    "stochastic_pool",
    "structural_dropout",
    "token_merging",
    "tree_dropout",
    "tree_mixture",
    "unmerge_tokens",
    "weigh_keys",
    "weighted_channel_dropout",
    "width_scale",
]
