"""The tests every network inherits: subclass `NetworkContract`, name it Test..., done."""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import Slot, measure, place, slots


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor that a network returned, the finest logits first."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [one for part in output for one in tensors(part)]


def total(output: Any) -> torch.Tensor:
    """A number that depends on every value of every tensor, each in its own way."""
    noise = torch.Generator().manual_seed(1)
    parts = tensors(output)
    return torch.stack([(x * torch.rand(x.shape, generator=noise)).sum() for x in parts]).sum()


SIZES = [(1, 1), (3, 5), (8, 8), (16, 7), (17, 33), (1, 1, 1), (5, 9, 4)]


class NetworkContract:
    """Class attributes say which network, how small, which places it has, what else it takes.

    Attributes:
        network: the class; called with (spatial_dims, in_channels, out_channels, **arguments).
        arguments: makes a small network of three levels.
        places: the name of every place.
        changes: for every further argument, a value other than its default.
        base: arguments with which the changes are compared, beside `arguments`.
        golden: mean and some values of the logits of a fixed image with a fixed seed.
    """

    network: ClassVar[type[nn.Module]]
    arguments: ClassVar[dict[str, Any]] = {"channels": (4, 6, 8)}
    places: ClassVar[set[str]]
    changes: ClassVar[dict[str, Any]]
    base: ClassVar[dict[str, Any]] = {}
    golden: ClassVar[tuple[float, ...]]

    def make(
        self, dims: int = 2, in_channels: int = 1, out_channels: int = 2, **more: Any
    ) -> nn.Module:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        return self.network(dims, in_channels, out_channels, **{**self.arguments, **more})

    @staticmethod
    def image(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(1))

    def filled(self, dims: int = 2, p: float = 0.5) -> nn.Module:
        network = self.make(dims)
        place(network, "spatial_dropout", ["*"], {"p": p})
        place(network, "heuristic_dropout", ["*"], {"p": p})
        return network

    @pytest.mark.parametrize("shape", [(2, 1, 16, 12), (2, 1, 8, 12, 8)])
    def test_every_parameter_gets_a_gradient(self, shape: tuple[int, ...]) -> None:
        network = self.make(len(shape) - 2)
        output = network(self.image(*shape))
        assert tensors(output)[0].shape == (2, 2, *shape[2:])
        total(output).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name

    @pytest.mark.parametrize("size", SIZES)
    def test_any_size_of_input_gives_logits_of_that_size(self, size: tuple[int, ...]) -> None:
        network = self.make(len(size)).eval()
        logits = network(self.image(1, 1, *size))
        assert logits.shape == (1, 2, *size)
        assert logits.isfinite().all()

    def test_an_odd_size_gives_what_the_padded_image_gives(self) -> None:
        network = self.make().eval()
        x = self.image(1, 1, 13, 10)
        padded = nn.functional.pad(x, (0, 2, 0, 3), mode="replicate")
        assert torch.equal(network(x), network(padded)[..., :13, :10])

    @pytest.mark.parametrize("in_channels", [1, 3, 4])
    @pytest.mark.parametrize("out_channels", [1, 2, 5])
    def test_any_channels_and_classes_work(self, in_channels: int, out_channels: int) -> None:
        network = self.make(2, in_channels, out_channels).eval()
        assert network(self.image(2, in_channels, 9, 8)).shape == (2, out_channels, 9, 8)

    def test_it_has_exactly_the_places_that_it_names(self) -> None:
        assert set(slots(self.make())) == self.places

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

    def test_filling_every_place_leaves_the_keys_of_the_weights(self) -> None:
        plain, filled = self.make(), self.filled()
        assert list(filled.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(filled.state_dict(), strict=True)

    @pytest.mark.parametrize("dims", [2, 3])
    def test_eval_gives_the_same_bits_with_and_without_regularizers(self, dims: int) -> None:
        x = self.image(1, 1, *(8, 12, 8)[:dims])
        plain, filled = self.make(dims).eval(), self.filled(dims).eval()
        state = torch.get_rng_state()
        assert torch.equal(filled(x), plain(x))
        assert torch.equal(filled(x), filled(x))
        assert torch.equal(torch.get_rng_state(), state)

    def test_training_with_every_place_filled_still_reaches_every_parameter(self) -> None:
        network = self.filled(p=0.1)
        total(network(self.image(4, 1, 16, 12))).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_samples_of_a_batch_do_not_see_each_other_in_eval(self) -> None:
        network, x = self.make().eval(), self.image(3, 1, 16, 12)
        assert torch.allclose(network(x)[1:2], network(x[1:2]), atol=1e-5)

    def test_a_copy_is_independent(self) -> None:
        network, x = self.filled().eval(), self.image(1, 1, 8, 8)
        twin = copy.deepcopy(network)
        expected = network(x)
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(network(x), expected)
        assert set(slots(twin)) == self.places
        assert all(len(slot) == 2 for slot in slots(twin).values())

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("training", [False, True])
    def test_it_compiles_without_a_graph_break(self, training: bool) -> None:
        torch._dynamo.reset()
        network = self.make()
        place(network, "spatial_dropout", ["*"], {"p": 0.2})
        network.train(training)
        compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="eager")
        x = self.image(2, 1, 13, 12)
        torch.manual_seed(3)
        expected = network(x)
        torch.manual_seed(3)
        found = compiled(x)
        assert type(found) is type(expected)
        for one, other in zip(tensors(found), tensors(expected), strict=True):
            assert torch.allclose(one, other, atol=1e-5)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_an_exported_network_gives_the_same_logits_without_regularizers(self) -> None:
        network, x = self.filled().eval(), self.image(1, 1, 16, 12)
        program = torch.export.export(network, (x,))
        assert torch.allclose(program.module()(x), network(x), atol=1e-6)
        plain = torch.export.export(self.make().eval(), (x,))
        operators = [[n.target for n in p.graph.nodes] for p in (program, plain)]
        assert len(operators[0]) == len(operators[1])

    def test_channels_last_gives_the_same_logits(self) -> None:
        network, x = self.make(in_channels=3).eval(), self.image(2, 3, 13, 20)
        expected = network(x)
        network = network.to(memory_format=torch.channels_last)
        assert torch.allclose(network(x.to(memory_format=torch.channels_last)), expected, atol=1e-5)

    def test_bfloat16_autocast_gives_finite_logits_and_gradients(self) -> None:
        network = self.filled(p=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(self.image(2, 1, 16, 16))
        total([x.float().square() for x in tensors(output)]).backward()
        assert all(x.isfinite().all() for x in tensors(output))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())

    def test_every_argument_changes_something(self) -> None:
        x = self.image(2, 1, 16, 12)
        plain = self.make(**self.base)
        expected = tensors(plain(x))
        for argument, value in self.changes.items():
            changed = self.make(**{**self.base, argument: value})
            output = tensors(changed(x))
            assert output[0].shape == expected[0].shape, argument
            shapes = [
                {key: tensor.shape for key, tensor in network.state_dict().items()}
                for network in (plain, changed)
            ]
            assert shapes[0] != shapes[1] or not torch.allclose(output[0], expected[0]), argument

    def test_every_argument_is_tested(self) -> None:
        arguments = list(inspect.signature(self.network).parameters)
        assert arguments[:3] == ["spatial_dims", "in_channels", "out_channels"]
        assert set(arguments[3:]) == set(self.changes)

    def test_the_logits_of_a_fixed_seed_are_known(self) -> None:
        # In training mode: with the statistics of a fresh network the signal would die away.
        logits = tensors(self.make()(self.image(2, 1, 16, 12)))[0].detach()
        found = [logits.mean().item(), *logits[0, :, 5, 7:9].flatten().tolist()]
        assert found == pytest.approx(self.golden, abs=1e-4), [round(one, 5) for one in found]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_a_program_exported_once_takes_any_batch_and_size(self) -> None:
        network = self.filled().eval()
        dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        example = self.image(2, 1, 13, 21)
        program = torch.export.export(network, (example,), dynamic_shapes=(dims,)).module()
        for shape in ((1, 1, 16, 12), (3, 1, 9, 30)):
            x = self.image(*shape)
            assert torch.allclose(program(x), network(x), atol=1e-5)

    def test_a_place_that_does_not_exist_is_an_error(self) -> None:
        with pytest.raises(MedsegError, match="no place matches"):
            place(self.make(), "dropout", ["nowhere"], {})

    def test_slots_hold_nothing_until_they_are_filled(self) -> None:
        assert all(
            isinstance(slot, Slot) and len(slot) == 0 for slot in slots(self.make()).values()
        )
