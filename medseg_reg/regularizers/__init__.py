"""Every regularizer of the toolkit; imports torch alone.

| name | class | what it drops |
|---|---|---|
| ``heuristic_dropout`` | `HeuristicDropout` | channels of high entropy and low variance |
| ``corrdrop_spatial`` | `CorrDropSpatial` | blocks of pixels that correlate little with the rest |
| ``corrdrop_channel`` | `CorrDropChannel` | channels that correlate little with the rest |
| ``input_dropout`` | `InputDropout` | pixels of the input image |
| ``dropout`` | `Dropout` | single elements |
| ``spatial_dropout`` | `SpatialDropout` | channels at random |

Use one directly (``HeuristicDropout(p=0.1)``) or by name (``build("heuristic_dropout", p=0.1)``).
"""

from medseg_reg.regularizers.base import (
    Regularizer,
    build,
    register,
    regularizer_class,
    regularizer_names,
)
from medseg_reg.regularizers.corrdrop import (
    CorrDropChannel,
    CorrDropSpatial,
    corrdrop_channel,
    corrdrop_spatial,
    drop_probability,
    row_correlation,
)
from medseg_reg.regularizers.dropout import Dropout, SpatialDropout, spatial_dropout
from medseg_reg.regularizers.heuristic import (
    HeuristicDropout,
    HeuristicScores,
    heuristic_dropout,
    heuristic_scores,
)
from medseg_reg.regularizers.input_dropout import InputDropout

__all__ = [
    "CorrDropChannel",
    "CorrDropSpatial",
    "Dropout",
    "HeuristicDropout",
    "HeuristicScores",
    "InputDropout",
    "Regularizer",
    "SpatialDropout",
    "build",
    "corrdrop_channel",
    "corrdrop_spatial",
    "drop_probability",
    "heuristic_dropout",
    "heuristic_scores",
    "register",
    "regularizer_class",
    "regularizer_names",
    "row_correlation",
    "spatial_dropout",
]
