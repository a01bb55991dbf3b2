import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.dropout import _DropoutNd

from droplens import masks
from droplens import nn as dn
from droplens.estimates import z_bound
from droplens.nn import functional as DF
from tests.masks.conformance import FALSE_ALARM, assert_within
from tests.nn.cases import CASES, LayerCase

each_layer = pytest.mark.parametrize("case", CASES, ids=str)


def ones(case: LayerCase) -> Tensor:
    return torch.ones(case.shape)


class TestContract:
    @each_layer
    def test_eval_is_the_exact_identity(self, case: LayerCase) -> None:
        x = torch.randn(case.shape)
        assert case.make(0.5).eval()(x) is x
        assert case.function(x, 0.5, training=False) is x

    @each_layer
    def test_drop_in_for_torchs_layers(self, case: LayerCase) -> None:
        layer = case.make(0.5)
        assert isinstance(layer, _DropoutNd)
        assert layer.state_dict() == {}
        assert list(layer.parameters()) == list(layer.buffers()) == []
        assert layer.p == 0.5
        assert layer.law == case.law(0.5)
        assert "0.5" in repr(layer)

    @each_layer
    def test_layer_and_function_multiply_by_a_mask_of_the_law(self, case: LayerCase) -> None:
        x = torch.randn(case.shape)
        expected = x * case.law(0.3).sample(case.shape, seed=5)
        torch.testing.assert_close(case.function(x, 0.3, seed=5), expected)
        generator = torch.Generator().manual_seed(5)
        torch.testing.assert_close(case.make(0.3, generator=generator)(x), expected)
        torch.manual_seed(5)
        found = case.make(0.3)(x)
        torch.manual_seed(5)
        torch.testing.assert_close(found, x * case.law(0.3).sample(case.shape))

    @each_layer
    def test_p_zero_and_p_one(self, case: LayerCase) -> None:
        x = torch.randn(case.shape)
        assert torch.equal(case.make(0)(x), x)
        assert torch.equal(case.make(1)(x), torch.zeros_like(x))

    @each_layer
    def test_bad_rates(self, case: LayerCase) -> None:
        for p in (-0.1, 1.1, float("nan"), torch.tensor(2.0)):
            with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
                case.make(p)
        with pytest.raises(TypeError, match="p has to be a number"):
            case.make("half")
        layer = case.make(0.5)
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            layer.p = 2
        layer.p = 0.25
        assert layer.law == case.law(0.25)

    @each_layer
    def test_integers_are_refused(self, case: LayerCase) -> None:
        x = torch.ones(case.shape, dtype=torch.int64)
        with pytest.raises(TypeError, match=r"has to be floating point, but got torch\.int64"):
            case.make(0.5)(x)
        with pytest.raises(TypeError, match="input has to be floating point"):
            case.function(x, 0.0)

    @each_layer
    def test_an_empty_batch_passes(self, case: LayerCase) -> None:
        x = torch.ones(0, *case.shape[1:])
        assert case.make(0.5)(x).shape == x.shape

    @each_layer
    def test_inplace(self, case: LayerCase) -> None:
        x = torch.randn(case.shape)
        expected = case.function(x, 0.5, seed=1)
        again = case.function(x, 0.5, seed=1, inplace=True)
        assert again.data_ptr() == x.data_ptr()
        torch.testing.assert_close(x, expected)

    @each_layer
    def test_nan_stays_nan(self, case: LayerCase) -> None:
        x = torch.full(case.shape, math.nan)
        assert case.make(0.5)(x).isnan().all()

    @each_layer
    def test_copies_and_pickles(self, case: LayerCase) -> None:
        layer, x = case.make(0.5, seed=3), torch.randn(case.shape)
        layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(twin(x), copy.deepcopy(layer)(x))

    def test_a_generator_survives_a_copy(self) -> None:
        layer = dn.Dropout(0.5, generator=torch.Generator().manual_seed(0))
        twin, x = copy.deepcopy(layer), torch.ones(50)
        assert torch.equal(layer(x), twin(x))

    def test_generator_and_seed_together_are_refused(self) -> None:
        with pytest.raises(ValueError, match="give generator= or seed=, not both"):
            dn.Dropout(generator=torch.Generator(), seed=1)
        with pytest.raises(ValueError, match="give generator= or seed=, not both"):
            DF.dropout(torch.ones(2), generator=torch.Generator(), seed=1)
        with pytest.raises(TypeError, match=r"generator has to be a torch\.Generator, but got int"):
            dn.Dropout(generator=1)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="seed has to be an int"):
            dn.Dropout(seed=1.5)  # type: ignore[arg-type]

    def test_repr_shows_what_shapes_the_law(self) -> None:
        assert repr(dn.DropBlock2d(0.1, 7)) == "DropBlock2d(p=0.1, block_size=7, inplace=False)"
        assert "shared=True" in repr(dn.DropBlock2d(0.1, 7, shared=True))
        assert repr(dn.Dropout(seed=4)) == "Dropout(p=0.5, inplace=False, seed=4)"
        assert repr(dn.Masked(masks.Path(0.1))) == "Masked(Path(p=0.1), inplace=False)"


class TestShapes:
    def test_a_number_is_dropped_like_any_unit(self) -> None:
        values = {float(dn.Dropout(0.5)(torch.tensor(1.0))) for _ in range(100)}
        assert values == {0.0, 2.0}

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (dn.Dropout1d(0.5, seed=1), (3, 8)),
            (dn.Dropout3d(0.5, seed=1), (3, 4, 4, 4)),
            (dn.DropBlock1d(0.5, 2, seed=1), (3, 8)),
            (dn.DropBlock2d(0.5, 2, seed=1), (3, 8, 8)),
            (dn.DropBlock3d(0.5, 2, seed=1), (3, 4, 4, 4)),
        ],
        ids=str,
    )
    def test_one_example_without_a_batch_axis(
        self, layer: nn.Module, shape: tuple[int, ...]
    ) -> None:
        x, twin = torch.ones(shape), copy.deepcopy(layer)
        assert torch.equal(layer(x), twin(x[None])[0])

    def test_dropout2d_reads_three_axes_as_torch_does(self) -> None:
        layer, x = dn.Dropout2d(0.5), torch.ones(50, 4, 6)
        with pytest.warns(UserWarning, match="read a 3-D input as"):
            out = layer(x)
        assert torch.equal(out, out[..., :1].expand_as(out))
        with pytest.warns(UserWarning, match="read a 3-D input as"):
            DF.dropout2d(x)

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (dn.DropBlock2d(0.5, 3), (4, 5)),
            (dn.DropBlock2d(0.5, 3), (1, 1, 4, 5, 6)),
            (dn.Dropout1d(0.5), (4,)),
            (dn.Dropout3d(0.5), (1, 2, 3)),
            (dn.Dropout2d(0.5), (4, 5)),
        ],
        ids=str,
    )
    def test_a_wrong_rank_is_refused(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="grid axes, but got shape"):
            layer(torch.ones(shape))

    def test_block_size_zero_is_refused(self) -> None:
        with pytest.raises(ValueError, match="size has to be at least 1, but got 0"):
            dn.DropBlock2d(0.1, 0)

    def test_a_group_that_does_not_divide_is_refused(self) -> None:
        with pytest.raises(ValueError, match="4 does not divide 6"):
            dn.GroupedDropout(0.5, 4)(torch.ones(2, 6))

    def test_masked_takes_laws_only(self) -> None:
        with pytest.raises(TypeError, match=r"has to be a droplens\.masks\.Law, but got float"):
            dn.Masked(0.5)  # type: ignore[arg-type]

    def test_masked_with_a_law_without_a_rate(self) -> None:
        law = masks.Custom(
            torch.full((3,), 0.5),
            0.25 * torch.eye(3),
            lambda shape, generator: torch.rand(shape, generator=generator).round(),
        )
        layer = dn.Masked(law, seed=2)
        assert set(layer(torch.ones(20, 3)).unique().tolist()) == {0.0, 2.0}
        assert math.isnan(layer.p)
        with pytest.raises(ValueError, match="has no rate p, so none can be set"):
            layer.p = 0.3

    @pytest.mark.parametrize("case", [case for case in CASES if len(case.shape) == 4], ids=str)
    def test_memory_format_carries_over(self, case: LayerCase) -> None:
        x = torch.randn(case.shape).to(memory_format=torch.channels_last)
        out = case.make(0.5)(x)
        assert out.is_contiguous(memory_format=torch.channels_last)


class TestMean:
    @each_layer
    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_the_output_has_the_mean_of_the_input_everywhere(
        self, case: LayerCase, p: float
    ) -> None:
        n = 20_000 // case.shape[0]
        x = torch.ones(n * case.shape[0], *case.shape[1:], dtype=torch.float64)
        out = case.function(x, p, seed=8)
        variance = case.law(p).covariance(case.shape[1:]).diagonal()
        assert_within(out.mean(0) - 1, variance, len(x))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @each_layer
    def test_half_precision_keeps_the_mean(self, case: LayerCase, dtype: torch.dtype) -> None:
        # 1/(1 − p) in bfloat16 would be 0.16% off at p = 0.1.
        repeats = 60_000 // math.prod(case.shape)
        generator = torch.Generator().manual_seed(0)
        shape = (case.shape[0] * repeats, *case.shape[1:])
        x = (1 + torch.rand(shape, generator=generator)).to(dtype)
        out = case.make(0.1, seed=1)(x)
        assert out.dtype == dtype
        kept = out.double() != 0
        if case.name == "GaussianDropout":
            return
        mask = case.make(0.1, seed=1)(torch.ones(shape))
        ratio = (out.double() / (x.double() * mask.double()))[kept].mean()
        assert abs(float(ratio) - 1) < 2e-4

    def test_autocast_keeps_the_dtype(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), dn.Dropout(0.5))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.ones(2, 4)).dtype == torch.bfloat16
            assert dn.DropBlock1d(0.5, 2)(torch.ones(2, 4, 4)).dtype == torch.float32

    def test_examples_are_independent(self) -> None:
        out = dn.DropBlock2d(0.3, 3, seed=0)(torch.ones(20_000, 1, 4, 4, dtype=torch.float64))
        totals = out.sum((1, 2, 3)) - 16
        pairs = totals.reshape(-1, 2)
        products = pairs[:, 0] * pairs[:, 1]
        bound = z_bound(1 - FALSE_ALARM) * float(products.std()) / math.sqrt(len(products))
        assert abs(float(products.mean())) < bound

    def test_complex_numbers(self) -> None:
        x = torch.ones(100, dtype=torch.complex64)
        assert set(dn.Dropout(0.5)(x).real.unique().tolist()) == {0.0, 2.0}


class TestTransforms:
    @each_layer
    def test_vmap_with_different_masks(self, case: LayerCase) -> None:
        layer, x = case.make(0.5), torch.ones(64, *case.shape)
        out = torch.func.vmap(layer, randomness="different")(x)
        assert out.shape == x.shape
        assert not torch.equal(out[0], out[1])
        assert abs(float(out.mean()) - 1) < 0.5

    @each_layer
    def test_gradients_go_through_the_mask(self, case: LayerCase) -> None:
        x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
        out = case.function(x, 0.5, seed=3)
        mask = case.function(torch.ones_like(x), 0.5, seed=3)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        torch.testing.assert_close(gradient, 2 * mask.square() * x)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        torch.testing.assert_close(second, 2 * mask.square())

    @each_layer
    def test_func_transforms(self, case: LayerCase) -> None:
        x = torch.randn(case.shape, dtype=torch.float64)

        def loss(x: Tensor) -> Tensor:
            return case.function(x, 0.5, seed=3).square().sum()

        mask = case.function(torch.ones_like(x), 0.5, seed=3).detach()
        torch.testing.assert_close(torch.func.grad(loss)(x), 2 * mask.square() * x)
        _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, (2 * mask.square() * x).sum())

    @each_layer
    def test_meta_and_fake_tensors(self, case: LayerCase) -> None:
        for options in ({}, {"seed": 1}):
            out = case.make(0.5, **options)(torch.ones(case.shape, device="meta"))
            assert out.device.type == "meta"
            assert out.shape == case.shape
        with FakeTensorMode():
            assert case.make(0.5)(torch.ones(case.shape)).shape == case.shape

    @each_layer
    def test_an_exported_eval_graph_has_no_operation(self, case: LayerCase) -> None:
        exported = torch.export.export(case.make(0.5).eval(), (ones(case),))
        assert [node for node in exported.graph.nodes if node.op == "call_function"] == []

    @each_layer
    def test_a_function_mode_sees_every_layer(self, case: LayerCase) -> None:
        from torch.overrides import TorchFunctionMode

        from droplens.nn._apply import masked

        seen = []

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                if func is masked:
                    seen.append(args[1])
                return func(*args, **(kwargs or {}))

        with Watch():
            case.make(0.5)(ones(case))
            case.function(ones(case), 0.5)
        assert seen == [case.law(0.5)] * 2


class TestParallel:
    def test_data_parallel_replicas_share_the_layer(self) -> None:
        # Without devices DataParallel runs the module itself; replicas copy its __dict__.
        model = nn.DataParallel(nn.Sequential(nn.Linear(3, 3), dn.Dropout(0.5, seed=1)))
        assert model(torch.ones(4, 3)).shape == (4, 3)
        replica = dn.Dropout(0.5, seed=1)._replicate_for_data_parallel()
        assert replica(torch.ones(4, 3)).shape == (4, 3)


def test_the_layers_come_without_the_compiler():
    code = "import sys, torch, droplens.nn; print([m for m in sys.modules if m == 'torch._dynamo'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
