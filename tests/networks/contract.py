"""The tests every network inherits.

A network of this package subclasses `OwnContract` of `own_contract.py`: its places are slots, and
it has a 3-D form. A network of another package subclasses `ForeignContract` of
`foreign_contract.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import pytest
import torch
from torch import nn


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


def program_for_any_size(network: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """Export with an example; all axes but that of the channels are free."""
    axes = (0, *range(2, example.ndim))
    free = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    return torch.export.export(network, (example,), dynamic_shapes=(free,))


class NetworkContract:
    """What a network of a run promises. Class attributes say which, how small, what it takes.

    Attributes:
        arguments: makes a small network.
        factor: sizes are padded to multiples of it.
        size: of an image that is no multiple.
        sizes: further sizes that it takes.
        places: its places, as `found_places` gives them.
        changes: for every argument a value other than its default; a dictionary where others must
            change with it.
        base: arguments with which the changes are compared, beside `arguments`.
        unused: patterns of parameters that the network has and does not use.
        dark: patterns of parameters behind a ReLU that lets nothing of this image through.
        broken: what keeps it from being compiled into one graph; empty if nothing does.
        dynamic: whether `torch.export` makes one program of it for all sizes.
        golden: mean and some values of the logits of a fixed image with a fixed seed.
    """

    arguments: ClassVar[dict[str, Any]]
    factor: ClassVar[int] = 4
    size: ClassVar[tuple[int, int]] = (13, 10)
    sizes: ClassVar[Sequence[tuple[int, ...]]] = ((1, 1), (3, 5), (8, 8), (16, 7), (17, 33))
    places: ClassVar[Any]
    changes: ClassVar[dict[str, Any]]
    base: ClassVar[dict[str, Any]] = {}
    unused: ClassVar[Collection[str]] = ()
    dark: ClassVar[Collection[str]] = ()
    broken: ClassVar[str] = ""
    dynamic: ClassVar[bool] = True
    golden: ClassVar[tuple[float, ...]]

    # What a family of networks says.

    def build(self, dims: int, in_channels: int, out_channels: int, **arguments: Any) -> nn.Module:
        """Build the network with new weights."""
        raise NotImplementedError

    def known_arguments(self) -> set[str]:
        """The names of all arguments that a user may give."""
        raise NotImplementedError

    def fill(self, network: nn.Module, method: str, p: float) -> None:
        """Put a layer at places all over the network."""
        raise NotImplementedError

    def found_places(self, network: nn.Module) -> Any:
        """The places that a layer can be put at, to be compared with `places`."""
        raise NotImplementedError

    # The tests.

    def make(
        self, dims: int = 2, in_channels: int = 1, out_channels: int = 2, **more: Any
    ) -> nn.Module:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        return self.build(dims, in_channels, out_channels, **{**self.arguments, **more})

    @staticmethod
    def image(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(1))

    @property
    def padded(self) -> tuple[int, int]:
        rows, columns = (-(-n // self.factor) * self.factor for n in self.size)
        return rows, columns

    def filled(self, dims: int = 2, p: float = 0.5) -> nn.Module:
        network = self.make(dims)
        self.fill(network, "spatial_dropout", p)
        self.fill(network, "heuristic_dropout", p)
        return network

    def used(self, network: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The parameters that must be trained."""
        named = list(network.named_parameters())
        for pattern in self.unused:
            idle = [p for name, p in named if fnmatchcase(name, pattern)]
            assert idle, pattern
            assert all(p.grad is None for p in idle), pattern
        return [
            (name, p)
            for name, p in named
            if not any(fnmatchcase(name, pattern) for pattern in self.unused)
        ]

    def check_gradients(self, dims: int, size: Sequence[int]) -> None:
        network = self.make(dims)
        output = network(self.image(2, 1, *size))
        assert tensors(output)[0].shape == (2, 2, *size)
        total(output).backward()
        for name, parameter in self.used(network):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        zero = [name for name, p in self.used(network) if not p.grad.abs().sum() > 0]
        assert all(any(fnmatchcase(name, one) for one in self.dark) for name in zero), zero

    def test_every_parameter_gets_a_gradient(self) -> None:
        self.check_gradients(2, self.padded)

    def check_sizes(self, dims: int, sizes: Sequence[tuple[int, ...]]) -> None:
        network = self.make(dims).eval()
        for size in sizes:
            logits = network(self.image(1, 1, *size))
            assert logits.shape == (1, 2, *size)
            assert logits.isfinite().all(), size

    def test_any_size_of_input_gives_logits_of_that_size(self) -> None:
        self.check_sizes(2, self.sizes)

    def test_all_levels_of_deep_supervision_have_the_size_of_the_input(self) -> None:
        output = self.make()(self.image(2, 1, *self.size))
        levels = output if isinstance(output, list) else getattr(output, "logits", output)
        for level in tensors(levels):
            assert level.shape == (2, 2, *self.size)

    def test_an_odd_size_gives_what_the_padded_image_gives(self) -> None:
        network, x = self.make().eval(), self.image(1, 1, *self.size)
        (rows, columns), (tall, wide) = self.size, self.padded
        padded = nn.functional.pad(x, (0, wide - columns, 0, tall - rows), mode="replicate")
        assert torch.equal(network(x), network(padded)[..., :rows, :columns])

    def test_any_channels_and_classes_work(self) -> None:
        for in_channels, out_channels in ((1, 1), (1, 5), (3, 2), (4, 1)):
            network = self.make(2, in_channels, out_channels).eval()
            logits = network(self.image(2, in_channels, *self.size))
            assert logits.shape == (2, out_channels, *self.size)

    def test_it_has_exactly_the_places_that_are_named_here(self) -> None:
        assert self.found_places(self.make()) == self.places

    def test_filling_places_leaves_the_keys_of_the_weights(self) -> None:
        plain, filled = self.make(), self.filled()
        assert list(filled.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(filled.state_dict(), strict=True)

    def check_eval(self, dims: int, size: Sequence[int]) -> None:
        x = self.image(1, 1, *size)
        plain, filled = self.make(dims).eval(), self.filled(dims).eval()
        state = torch.get_rng_state()
        assert torch.equal(filled(x), plain(x))
        assert torch.equal(filled(x), filled(x))
        assert torch.equal(torch.get_rng_state(), state)

    def test_eval_gives_the_same_bits_with_and_without_regularizers(self) -> None:
        self.check_eval(2, self.padded)

    def test_training_with_places_filled_changes_logits_and_reaches_every_parameter(self) -> None:
        network, x = self.filled(p=0.1), self.image(4, 1, *self.padded)
        assert not torch.equal(tensors(network(x))[0], tensors(network(x))[0])
        total(network(x)).backward()
        for name, parameter in self.used(network):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_samples_of_a_batch_do_not_see_each_other_in_eval(self) -> None:
        network, x = self.make().eval(), self.image(3, 1, *self.padded)
        assert torch.allclose(network(x)[1:2], network(x[1:2]), atol=1e-5)

    def test_a_copy_is_independent(self) -> None:
        network, x = self.filled().eval(), self.image(1, 1, *self.padded)
        twin = copy.deepcopy(network)
        expected = network(x)
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(network(x), expected)
        torch.manual_seed(4)
        noisy = tensors(self.filled().train()(x.repeat(2, 1, 1, 1)))[0]
        assert not torch.equal(noisy[:1], expected)

    def check_compiled(
        self, dims: int, size: Sequence[int], training: bool, backend: str = "eager"
    ) -> None:
        """Compare with the network as it is; where nothing breaks it, it must be one graph."""
        torch._dynamo.reset()
        network = self.make(dims)
        self.fill(network, "spatial_dropout", 0.2)
        network.train(training)
        x = self.image(2, 1, *size)
        torch.manual_seed(3)
        expected = network(x)
        if self.broken:
            with pytest.raises(torch._dynamo.exc.Unsupported, match=self.broken):
                torch.compile(copy.deepcopy(network), fullgraph=True, backend=backend)(x)
            torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(network), fullgraph=not self.broken, backend=backend)
        torch.manual_seed(3)
        found = compiled(x)
        assert type(found) is type(expected)
        for one, other in zip(tensors(found), tensors(expected), strict=True):
            assert torch.allclose(one, other, atol=1e-5 if backend == "eager" else 1e-4)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
    @pytest.mark.parametrize("training", [False, True])
    def test_it_compiles_without_a_graph_break(self, training: bool) -> None:
        self.check_compiled(2, self.size, training)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_an_exported_network_gives_the_same_logits_without_regularizers(self) -> None:
        network, x = self.filled().eval(), self.image(1, 1, *self.padded)
        program = torch.export.export(network, (x,))
        assert torch.allclose(program.module()(x), network(x), atol=1e-5)
        plain = torch.export.export(self.make().eval(), (x,))
        operators = [[n.target for n in p.graph.nodes] for p in (program, plain)]
        assert len(operators[0]) == len(operators[1])

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_a_program_exported_once_takes_any_batch_and_size(self) -> None:
        if not self.dynamic:
            pytest.skip("takes one size, or is exported for one")
        network = self.filled().eval()
        (rows, columns), factor = self.padded, self.factor
        example = self.image(2, 1, rows + factor + 1, columns + 2 * factor + 1)
        program = program_for_any_size(network, example).module()
        for shape in ((1, 1, rows, columns), (3, 1, rows + 1, columns + 4 * factor + 2)):
            x = self.image(*shape)
            assert torch.allclose(program(x), network(x), atol=1e-4)

    def test_channels_last_gives_the_same_logits(self) -> None:
        network, x = self.make(in_channels=3).eval(), self.image(2, 3, *self.size)
        expected = network(x)
        network = network.to(memory_format=torch.channels_last)
        assert torch.allclose(network(x.to(memory_format=torch.channels_last)), expected, atol=1e-5)

    def test_bfloat16_autocast_gives_finite_logits_and_gradients(self) -> None:
        network = self.filled(p=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(self.image(2, 1, *self.padded))
        total([x.float().square() for x in tensors(output)]).backward()
        assert all(x.isfinite().all() for x in tensors(output))
        for name, parameter in self.used(network):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_every_argument_changes_something(self) -> None:
        x = self.image(2, 1, *self.padded)

        def result(**changed: Any) -> tuple[dict[str, torch.Size], torch.Tensor]:
            network = self.make(**{**self.base, **changed})
            torch.manual_seed(5)
            logits = tensors(network(x))[0].detach()
            return {key: value.shape for key, value in network.state_dict().items()}, logits

        shapes, logits = result()
        for argument, value in self.changes.items():
            changed = value if isinstance(value, dict) else {argument: value}
            assert argument in changed
            found_shapes, found = result(**changed)
            assert found.shape == logits.shape, argument
            assert found_shapes != shapes or not torch.allclose(found, logits), argument

    def test_every_argument_is_tested(self) -> None:
        assert set(self.changes) == self.known_arguments()

    def test_the_logits_of_a_fixed_seed_are_known(self) -> None:
        self.check_golden(2, self.padded, self.golden)

    def check_golden(self, dims: int, size: Sequence[int], golden: Sequence[float]) -> None:
        # In training mode: with the statistics of a fresh network the signal would die away.
        logits = tensors(self.make(dims)(self.image(2, 1, *size)))[0].detach()
        place = (0, slice(None), *(5,) * (dims - 1), slice(7, 9))
        found = [logits.mean().item(), *logits[place].flatten().tolist()]
        assert found == pytest.approx(golden, abs=1e-4), [round(one, 5) for one in found]
