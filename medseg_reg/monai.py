"""Every regularizer by name in MONAI's networks; importing this module is all it takes.

>>> import medseg_reg.monai
>>> from monai.networks.nets import UNet
>>> network = UNet(
...     spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2),
...     adn_ordering="NAD", dropout=("CORRDROPSPATIAL", {"p": 0.1, "block_size": 3}),
... )
>>> network.model[0].adn.D
CorrDropSpatial(p=0.1, block_size=3, temperature=1.0, faithful=False)

MONAI's networks make their dropout layers by `monai.networks.layers.factories.Dropout`, from a name
and a dictionary of arguments. Each registered name is entered there in upper case, with and without
underscores; MONAI ignores the case of what is asked for. A name that MONAI has itself keeps its
meaning: `DROPOUT` is MONAI's, and this package's is `MEDSEG_DROPOUT`.

The layers take maps of any number of spatial axes, so MONAI's `dropout_dim` is not used.
"""

from __future__ import annotations

from typing import Any

from monai.networks.layers.factories import Dropout

from medseg_reg.regularizers import Regularizer, regularizer_class, regularizer_names

__all__ = ["enter_all", "factory_names"]

_PREFIX = "medseg_"


def factory_names(name: str) -> tuple[str, ...]:
    """Return the names of a registered regularizer in MONAI's factory, the safest first.

    >>> factory_names("corrdrop_spatial"), factory_names("dropout")
    (('CORRDROP_SPATIAL', 'CORRDROPSPATIAL'), ('MEDSEG_DROPOUT', 'MEDSEGDROPOUT'))

    Raises:
        ValueError: unknown name; the message gives the nearest one and lists all.
    """
    regularizer_class(name)
    foreign = {key for key, held in Dropout.components.items() if not _is_ours(held.value)}
    own = (_PREFIX + name if name.upper() in foreign else name).upper()
    short = own.replace("_", "")
    others = {other.upper() for other in regularizer_names() if other != name}
    return (own,) if short == own or short in foreign | others else (own, short)


def enter_all() -> None:
    """Enter every registered regularizer of maps; call it again after `register` for a new one.

    Those of an attention are left out: MONAI asks the factory for what follows a convolution.
    """
    for name in regularizer_names():
        if regularizer_class(name).place_kinds:
            continue
        for key in factory_names(name):
            if key not in Dropout.names:
                text = f"{regularizer_class(name).__name__} of medseg_reg"
                Dropout.add_factory_callable(key, _Maker(name), text)


class _Maker:
    """What the factory holds: gives the class, whatever dimension is asked for."""

    def __init__(self, regularizer: str) -> None:
        self.regularizer = regularizer

    def __call__(self, dim: Any = None) -> type[Regularizer]:
        return regularizer_class(self.regularizer)


def _is_ours(value: object) -> bool:
    return hasattr(value, "regularizer")  # also one of before this module was reloaded


enter_all()
