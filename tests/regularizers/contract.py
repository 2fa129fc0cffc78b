"""The tests every regularizer inherits: subclass `RegularizerContract`, name it Test..., done."""

import copy
import math
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from medseg_reg.regularizers import Regularizer, build, regularizer_class

MAPS = [(1,), (17,), (1, 1), (2, 2), (4, 4), (5, 3), (16, 10), (32, 32), (1, 1, 1), (5, 4, 7)]
SHAPES = [(2, 6, 9), (2, 6, 8, 5), (2, 6, 4, 5, 3)]


class RegularizerContract:
    """Class attributes say which regularizer, and with which parameters beside p.

    Attributes:
        name: its registered name.
        parameters: parameters beside p.
        calibrated: whether the realised rate is p; where not, its docstring says what it is.
        independent: whether what happens to a sample depends on that sample alone; where not, its
            docstring says what couples them.
        spares_dead: whether channels that are zero everywhere leave the rate of the others at p;
            where not, its docstring says what happens to them.

    Maps with another number of spatial axes than the method's ``spatial_dims`` must be refused;
    the tests on them are skipped.
    """

    name: ClassVar[str]
    parameters: ClassVar[dict[str, Any]] = {}
    calibrated: ClassVar[bool] = True
    independent: ClassVar[bool] = True
    spares_dead: ClassVar[bool] = True

    def make(self, p: float = 0.3) -> Regularizer:
        return build(self.name, p=p, **self.parameters).train()

    def served(self, spatial: int) -> None:
        """Skips a test on maps of a dimension that the method is not for."""
        if spatial not in regularizer_class(self.name).spatial_dims:
            pytest.skip(f"not a method for maps of {spatial} spatial axes")

    @staticmethod
    def positive(*shape: int, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return torch.rand(*shape, **options) + 0.5

    def test_it_passes_for_torchs_own_dropout(self) -> None:
        layer = self.make(0.3)
        assert isinstance(layer, _DropoutNd)
        assert layer.p == 0.3
        assert isinstance(layer.stochastic, bool)
        assert regularizer_class(self.name) is type(layer)

    def test_eval_and_p_zero_return_the_same_tensor_object(self) -> None:
        x = self.positive(2, 4, 5, 6)
        assert self.make(0.3).eval()(x) is x
        assert self.make(0.0)(x) is x

    @pytest.mark.parametrize("p", [-0.1, 1.0, 2, math.nan, math.inf, True, "0.1", None])
    def test_a_rate_outside_zero_to_one_is_refused_at_any_time(self, p: Any) -> None:
        with pytest.raises(ValueError, match="share of units to drop"):
            self.make(p)
        layer = self.make(0.3)
        with pytest.raises(ValueError, match="share of units to drop"):
            layer.p = p
        assert layer.p == 0.3

    def test_a_schedule_may_assign_the_rate(self) -> None:
        layer, x = self.make(0.0), self.positive(64, 6, 8, 8)
        layer.p = 0.5
        assert layer(x) is not x
        assert layer.measured_rate(x, layer(x)) > 0.2
        layer.p = 0
        assert layer(x) is x

    @pytest.mark.parametrize("shape", [(3,), (3, 4), (1, 2, 3, 4, 5, 6)])
    def test_a_wrong_shape_is_named_with_the_class(self, shape: tuple[int, ...]) -> None:
        layer = self.make()
        with pytest.raises(ValueError, match=type(layer).__name__) as error:
            layer(torch.ones(shape))
        assert str(shape) in str(error.value)
        assert "(B, C, H, W)" in str(error.value)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_maps_of_other_dimensions_are_refused(self, shape: tuple[int, ...]) -> None:
        layer = self.make()
        if len(shape) - 2 in layer.spatial_dims:
            pytest.skip("the method is for these maps")
        with pytest.raises(ValueError, match=type(layer).__name__) as error:
            layer(torch.ones(shape))
        assert str(shape) in str(error.value)

    def test_an_integer_map_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"int64.*\.float\(\)"):
            self.make()(torch.ones(1, 2, 3, 4, dtype=torch.int64))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_shape_and_dtype_are_kept(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.served(len(shape) - 2)
        y = self.make()(self.positive(*shape).to(dtype))
        assert y.shape == shape
        assert y.dtype == dtype
        assert y.isfinite().all()

    @pytest.mark.parametrize(
        ("shape", "memory_format"),
        [(SHAPES[1], torch.channels_last), (SHAPES[2], torch.channels_last_3d)],
    )
    def test_the_memory_format_is_kept(
        self, shape: tuple[int, ...], memory_format: torch.memory_format
    ) -> None:
        self.served(len(shape) - 2)
        layer, x = self.make(), self.positive(*shape)
        last = x.to(memory_format=memory_format)
        y = layer(last)
        assert y.is_contiguous(memory_format=memory_format)
        assert layer(x).is_contiguous()

    def test_the_input_is_not_changed(self) -> None:
        x = self.positive(2, 6, 8, 5)
        before = x.clone()
        self.make(0.5)(x)
        assert torch.equal(x, before)

    @pytest.mark.parametrize("size", MAPS)
    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_the_realised_rate_is_p_at_every_map_size(
        self, size: tuple[int, ...], p: float
    ) -> None:
        if not self.calibrated:
            pytest.skip("the published rule is not calibrated, see its docstring")
        self.served(len(size))
        layer = self.make(p)
        torch.manual_seed(0)
        pixels = math.prod(size)
        # the whole map may be one unit: many samples, of few channels where the map is large
        channels, batch = 7, max(4000, 60_000 // pixels) if pixels < 200 else 800
        rates = []
        for _ in range(2 if pixels < 200 else 5):
            x = torch.rand(batch, channels, *size) + 0.5
            rates.append(layer.measured_rate(x, layer(x)))
        # five standard errors of the worst case (one unit per sample), at most one percent point
        error = 5 * math.sqrt(p * (1 - p) / (batch * len(rates)))
        assert sum(rates) / len(rates) == pytest.approx(p, abs=min(0.01, error))

    def test_the_realised_rate_is_p_on_a_large_map(self) -> None:
        if not (self.calibrated and self.independent):
            pytest.skip("the rate is not p, or not that of each sample, see its docstring")
        self.served(2)
        layer, p = self.make(0.3), 0.3
        x = self.positive(250, 3, 64, 64)
        y = layer(x)
        rates = [layer.measured_rate(a[None], b[None]) for a, b in zip(x, y, strict=True)]
        error = torch.tensor(rates).std().item() / math.sqrt(len(rates))
        assert sum(rates) / len(rates) == pytest.approx(p, abs=0.002 + 4 * error)

    @pytest.mark.parametrize("p", [0.1, 0.4])
    def test_dead_channels_do_not_lower_the_rate_of_the_others(self, p: float) -> None:
        if not (self.calibrated and self.spares_dead and self.independent):
            pytest.skip("the rate is not p, or not that of each sample, see its docstring")
        torch.manual_seed(0)
        x = torch.rand(3000, 12, 4, 4) + 0.5
        x[:, 1::3] = 0
        layer = self.make(p)
        rates = [layer.measured_rate(x, layer(x)) for _ in range(2)]
        error = 5 * math.sqrt(p * (1 - p) / 6000)
        assert sum(rates) / 2 == pytest.approx(p, abs=min(0.015, error))

    def test_a_sample_does_not_depend_on_the_others_in_its_batch(self) -> None:
        if not self.independent:
            pytest.skip("the method couples the samples of a batch, see its docstring")
        layer, x = self.make(0.4), self.positive(3, 6, 8, 5)
        other = x.clone()
        other[1:] = 3 * other[1:].flip(1, 2) + 1
        torch.manual_seed(2)
        expected = layer(x)[0]
        torch.manual_seed(2)
        assert torch.equal(layer(other)[0], expected)

    def test_the_gradient_flows_and_is_finite(self) -> None:
        x = self.positive(4, 6, 8, 5).requires_grad_()
        self.make(0.3)(x).square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0

    def test_the_gradient_is_the_transpose_of_the_forward_map(self) -> None:
        layer = self.make(0.3)
        x = self.positive(2, 4, 3, 2, dtype=torch.float64).requires_grad_()

        def fixed(x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return layer(x)

        assert torch.autograd.gradcheck(fixed, (x,))
        assert torch.autograd.gradgradcheck(fixed, (x,))

    def test_copies_and_pickles_behave_alike(self) -> None:
        layer, x = self.make(0.4), self.positive(2, 6, 8, 5)
        torch.manual_seed(1)
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.manual_seed(1)
            assert torch.equal(twin(x), expected)
            assert repr(twin) == repr(layer)

    def test_it_adds_no_key_to_the_weights_of_a_network(self) -> None:
        layer, x = self.make(), self.positive(4, 6, 8, 5)
        assert not layer.state_dict()
        layer(x)
        assert not layer.state_dict()
        plain = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1))
        torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), layer).load_state_dict(plain.state_dict())

    def test_its_memory_can_be_saved_and_restored(self) -> None:
        layer, twin, x = self.make(0.4), self.make(0.4), self.positive(4, 6, 8, 5)
        for _ in range(3):
            layer(x)
        twin.load_memory(layer.memory())
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)
        with pytest.raises(ValueError, match=type(layer).__name__):
            layer.load_memory({"no such thing": torch.ones(1)})

    def test_the_catalogue_knows_it(self) -> None:
        cls = type(self.make())
        assert cls.unit
        assert cls.paper
        assert set(cls.spatial_dims) <= {1, 2, 3}

    def test_only_torchs_global_generator_decides(self) -> None:
        layer, x = self.make(0.4), self.positive(2, 6, 8, 5)
        torch.manual_seed(5)
        first = layer(x)
        torch.manual_seed(5)
        assert torch.equal(layer(x), first)
        if layer.stochastic:
            assert any(not torch.equal(layer(x), first) for _ in range(20))

    def test_eval_and_no_grad_draw_no_random_number_and_keep_no_graph(self) -> None:
        layer, x = self.make(0.4).eval(), self.positive(2, 6, 8, 5)
        state = torch.get_rng_state()
        layer(x)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            assert not layer.train()(x.requires_grad_()).requires_grad

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_it_compiles_without_a_graph_break(self) -> None:
        torch._dynamo.reset()
        layer, x = self.make(0.4), self.positive(2, 6, 8, 5)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        assert torch.allclose(compiled(x.requires_grad_()), expected)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_it_vanishes_from_an_exported_network(self) -> None:
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), self.make()).eval()
        program = torch.export.export(network, (torch.ones(1, 1, 4, 4),))
        calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
        assert calls == [torch.ops.aten.conv2d.default]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_it_works_under_autocast(self, dtype: torch.dtype) -> None:
        conv = torch.nn.Conv2d(2, 6, 3, padding=1)
        x = self.positive(2, 2, 8, 5)
        with torch.autocast("cpu", dtype=dtype):
            y = self.make(0.4)(conv(x).relu())
        assert y.dtype == dtype
        y.float().sum().backward()
        assert conv.weight.grad is not None
        assert conv.weight.grad.isfinite().all()

    def test_activation_checkpointing_changes_no_gradient(self) -> None:
        layer = self.make(0.4)
        grads = []
        for reentrant in (None, False, True):
            x = self.positive(2, 6, 8, 5).requires_grad_()
            torch.manual_seed(1)
            y = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
            y.square().sum().backward()
            grads.append(x.grad)
        assert torch.equal(grads[0], grads[1])
        assert torch.equal(grads[0], grads[2])

    @pytest.mark.parametrize("kind", ["zero", "constant", "negative", "tiny", "huge", "one live"])
    @pytest.mark.parametrize("size", [(1,), (1, 1), (3, 5), (2, 3, 4)])
    @pytest.mark.parametrize("channels", [1, 2, 7])
    def test_degenerate_maps_never_crash_and_give_finite_values(
        self, kind: str, size: tuple[int, ...], channels: int
    ) -> None:
        self.served(len(size))
        x = self.positive(4, channels, *size)
        x = {
            "zero": torch.zeros_like(x),
            "constant": torch.ones_like(x),
            "negative": -x - 1,
            "tiny": x * 1e-30,
            "huge": x * 1e25,
            "one live": torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1),
        }[kind]
        for p in (0.1, 0.9):
            assert self.make(p)(x).isfinite().all()

    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes_can_be_inferred_without_memory(self, shape: tuple[int, ...]) -> None:
        self.served(len(shape) - 2)
        assert self.make()(torch.ones(shape, device="meta")).shape == shape

    @pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)])
    def test_a_map_without_values_stays_what_it_is(self, shape: tuple[int, ...]) -> None:
        assert self.make()(torch.ones(shape)).shape == shape

    def test_nan_neither_crashes_nor_spreads_to_other_channels(self) -> None:
        x = self.positive(3, 6, 8, 5)
        x[0, 2] = math.nan
        for _ in range(5):
            y = self.make(0.3)(x)
            assert y[1:].isfinite().all()
            assert y[0, [0, 1, 3, 4, 5]].isfinite().all()

    def test_the_repr_shows_every_parameter(self) -> None:
        layer = self.make(0.25)
        assert f"{type(layer).__name__}(p=0.25" in repr(layer)
        for name, value in self.parameters.items():
            assert f"{name}={value!r}" in repr(layer)
