"""The contract of networks, for those of MONAI and segmentation-models-pytorch."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from medseg_reg.insertion import find_places, insert, remove
from medseg_reg.networks.build import build_network, check_input_size
from medseg_reg.networks.foreign import FOREIGN, foreign_class
from medseg_reg.networks.foreign_check import check_foreign
from tests.networks.contract import NetworkContract, tensors
from tests.networks.small_foreign import SMALL

ANY = ((1, 1), (8, 8), (17, 33), (40, 45))
# Other places take weights of attention, heads or tokens.
MAPS = {"input", "between_convs", "after_norm", "after_block", "skip", "residual", "gate", "head"}
# Decided by the data and the run, or seen in no output: see `foreign_check`.
GIVEN = {"self", "spatial_dims", "in_channels", "out_channels", "classes", "activation"}
GIVEN |= {"aux_params", "encoder_weights", "use_checkpoint", "use_flash_attention"}


class ForeignContract(NetworkContract):
    """What a network of another package promises once a configuration has named it.

    Attributes:
        name: its name in a configuration.
        places: how many places of each kind it has.
        arguments: those of `SMALL`, if a class has none of its own.
        idle: arguments that count only beside others or change nothing.
    """

    name: ClassVar[str]
    places: ClassVar[dict[str, int]]
    idle: ClassVar[set[str]] = set()

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls) and "arguments" not in vars(cls):
            cls.arguments = SMALL[cls.name]

    def build(self, dims: int, in_channels: int, out_channels: int, **arguments: Any) -> nn.Module:
        assert dims == 2
        if FOREIGN[self.name].needs:
            pytest.importorskip(FOREIGN[self.name].needs)
        network = build_network(
            in_channels=in_channels,
            classes=max(2, out_channels),
            head="sigmoid" if out_channels == 1 else "softmax",
            name=self.name,
            **arguments,
        )
        assert network.factor == self.factor or arguments != self.arguments
        return network

    def known_arguments(self) -> set[str]:
        signature = inspect.signature(foreign_class(self.name).__init__).parameters
        named = {key for key, one in signature.items() if one.kind is not one.VAR_KEYWORD}
        return named - GIVEN - self.idle

    def fill(self, network: nn.Module, method: str, p: float) -> None:
        x = self.image(1, 1, *self.padded)
        kind = next(one for one in ("between_convs", "after_block", "head") if one in self.places)
        insert(network, method, [kind], example=x, p=p)

    def found_places(self, network: nn.Module) -> dict[str, int]:
        return dict(
            Counter(place.kind for place in find_places(network, self.image(1, 1, *self.padded)))
        )

    def test_a_layer_at_places_of_any_kind_changes_the_logits(self) -> None:
        x = self.image(2, 1, *self.padded)
        network = self.make()
        for kind in sorted(MAPS & set(self.places)):
            report = insert(network, "dropout", [kind], example=x[:1], p=0.9)
            assert len(report) == self.places[kind]
            noisy = [tensors(network(x))[0] for _ in range(2)]
            assert not torch.equal(*noisy), kind
            remove(network)

    def test_its_arguments_and_size_pass_the_checks_of_a_configuration(self) -> None:
        network = self.make()  # skips where a package is missing
        check_foreign(self.name, self.arguments)
        check_input_size(network, 1, self.size, 2)  # type: ignore[arg-type]
