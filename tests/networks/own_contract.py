"""The contract of networks, for those of this package."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.inference.export.onnx_file import OPSET
from medseg_reg.insertion import Slot, measure, place, slots
from tests.networks.contract import NetworkContract, program_for_any_size, tensors

VOLUME = (8, 12, 12)
# Batches and sizes that no program was made with.
VOLUMES = ((1, 1, 5, 12, 8), (3, 1, 8, 11, 13))


class OwnContract(NetworkContract):
    """What a network of this package promises beside: slots, and a 3-D form.

    Attributes:
        network: the class; called with (spatial_dims, in_channels, out_channels, **arguments).
        golden_3d: mean and some values of the logits of a fixed volume with a fixed seed.
    """

    network: ClassVar[type[nn.Module]]
    golden_3d: ClassVar[tuple[float, ...]]
    arguments: ClassVar[dict[str, Any]] = {"channels": (4, 6, 8)}
    places: ClassVar[set[str]]

    def build(self, dims: int, in_channels: int, out_channels: int, **arguments: Any) -> nn.Module:
        return self.network(dims, in_channels, out_channels, **arguments)

    def known_arguments(self) -> set[str]:
        arguments = list(inspect.signature(self.network).parameters)
        assert arguments[:3] == ["spatial_dims", "in_channels", "out_channels"]
        return set(arguments[3:])

    def fill(self, network: nn.Module, method: str, p: float) -> None:
        place(network, method, ["*"], {"p": p})

    def found_places(self, network: nn.Module) -> set[str]:
        return set(slots(network))

    def test_every_parameter_of_the_3d_form_gets_a_gradient(self) -> None:
        self.check_gradients(3, VOLUME)

    def test_any_size_of_volume_gives_logits_of_that_size(self) -> None:
        self.check_sizes(3, ((1, 1, 1), (5, 9, 4)))

    def test_maps_that_are_normalized_by_themselves_may_be_of_any_size_too(self) -> None:
        network = self.make(norm="instance")
        for size in ((1, 1), (4, 3), (4, 5), (1, 8)):
            x = self.image(2, 1, *size)
            assert tensors(network.train()(x))[0].shape == (2, 2, *size)
            whole = nn.functional.pad(x, (0, 8 - size[1], 0, 8 - size[0]), mode="replicate")
            found = network.eval()(x)
            assert found.isfinite().all()
            if max(size) <= self.factor:
                # One pixel would be left at the bottom, so such images become two multiples large.
                assert torch.equal(found, network(whole)[..., : size[0], : size[1]])
        volume = self.image(1, 1, 1, 4, 2)
        assert self.make(3, norm="instance").eval()(volume).shape[2:] == (1, 4, 2)

    def test_eval_of_the_3d_form_is_the_same_with_and_without_regularizers(self) -> None:
        self.check_eval(3, VOLUME)

    def test_the_logits_of_the_3d_form_of_a_fixed_seed_are_known(self) -> None:
        self.check_golden(3, VOLUME, self.golden_3d)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
    def test_the_3d_form_compiles_without_a_graph_break(self) -> None:
        self.check_compiled(3, (7, 8, 10), training=True)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_code_of_the_inductor_gives_the_same(self) -> None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("no C++ compiler, which torch's inductor needs on the processor")
        self.check_compiled(2, self.size, training=False, backend="inductor")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_program_and_onnx_of_the_3d_form_take_any_batch_and_size(self, tmp_path: Path) -> None:
        network, path = self.filled(3).eval(), tmp_path / "network.onnx"
        program = program_for_any_size(network, self.image(2, 1, 9, 10, 14))
        for shape in VOLUMES:
            x = self.image(*shape)
            assert torch.allclose(program.module()(x), network(x), atol=1e-4)
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        made = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
        assert made is not None
        made.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for shape in VOLUMES:
            x = self.image(*shape)
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            assert torch.allclose(torch.from_numpy(found), network(x), atol=1e-4)

    def test_every_place_is_reached_and_works(self) -> None:
        x = self.image(2, 1, 16, 12)
        torch.manual_seed(2)
        plain = self.make()(x)
        for name in self.places:
            network = self.make()
            placements = place(network, "spatial_dropout", [name], {"p": 0.9})
            measure(network, x[:1], placements)
            assert placements[0].map_size is not None
            torch.manual_seed(2)
            assert not torch.equal(tensors(network(x))[0], tensors(plain)[0]), name

    def test_the_maps_halve_from_level_to_level(self) -> None:
        network = self.make()
        placements = place(network, "dropout", ["encoder.*", "bottleneck.*"], {"p": 0.5})
        measure(network, self.image(1, 1, 13, 21), placements)
        for placement in placements:
            part, number = placement.place.split(".")[:2]
            level = int(number) if part == "encoder" else 2
            assert placement.map_size is not None
            assert placement.map_size[1:] == (16 >> level, 24 >> level)

    def test_a_copy_has_slots_of_its_own(self) -> None:
        network = self.filled()
        twin = copy.deepcopy(network)
        assert set(slots(twin)) == self.places
        assert all(len(slot) == 2 for slot in slots(twin).values())
        assert not {id(one) for one in slots(twin).values()} & {
            id(one) for one in slots(network).values()
        }

    def test_a_place_that_does_not_exist_is_an_error(self) -> None:
        with pytest.raises(MedsegError, match="no place matches"):
            place(self.make(), "dropout", ["nowhere"], {})

    def test_slots_hold_nothing_until_they_are_filled(self) -> None:
        assert all(
            isinstance(slot, Slot) and len(slot) == 0 for slot in slots(self.make()).values()
        )
