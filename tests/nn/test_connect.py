import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from droplens import masks
from droplens import nn as dn
from tests.masks.conformance import assert_within

MODULES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 3), "weight", (5, 4)),
    "Linear on sequences": (lambda: nn.Linear(4, 3), "weight", (2, 5, 4)),
    "Conv2d": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect"),
        "weight",
        (2, 4, 7, 7),
    ),
    "LSTM": (lambda: nn.LSTM(4, 3, 2, batch_first=True), "weight_hh_l0", (2, 5, 4)),
    "GRU": (lambda: nn.GRU(4, 3, bidirectional=True), "weight_hh_l0_reverse", (5, 2, 4)),
    "RNN": (lambda: nn.RNN(4, 3), "weight_ih_l0", (5, 2, 4)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", (5, 2, 4)),
}
each_module = pytest.mark.parametrize("name", MODULES)


def build(name: str) -> tuple[nn.Module, str, Tensor]:
    torch.manual_seed(0)
    make, weight, shape = MODULES[name]
    return make(), weight, torch.randn(shape)


def run(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x)
    return out[0] if isinstance(out, tuple) else out


class TestMasks:
    @each_module
    def test_train_mode_multiplies_the_weight_by_one_mask(self, name: str) -> None:
        module, weight, x = build(name)
        plain = copy.deepcopy(module)
        dn.drop_connect(module, weight, 0.5, seed=1)
        found = run(module, x)
        coins = copy.deepcopy(module.parametrizations[weight][0])
        coins._stream.calls.zero_()
        with torch.no_grad():
            getattr(plain, weight).copy_(coins(getattr(plain, weight)))
        torch.testing.assert_close(found, run(plain, x))
        assert not torch.equal(run(module, x), found)

    @each_module
    def test_gradients_reach_the_parameter_through_the_mask(self, name: str) -> None:
        module, weight, x = build(name)
        dn.drop_connect(module, weight, 0.5)
        run(module, x).square().sum().backward()
        gradient = module.parametrizations[weight].original.grad
        dropped = float((gradient == 0).double().mean())
        assert 0.2 < dropped < 0.8

    @each_module
    def test_eval_is_exact(self, name: str) -> None:
        module, weight, x = build(name)
        expected = run(module.eval(), x)
        dn.drop_connect(module, weight, 0.5)
        assert torch.equal(run(module, x), expected)
        exported = module.parametrizations[weight].original
        assert getattr(module, weight) is exported

    @each_module
    def test_removed_it_is_the_module_it_was(self, name: str) -> None:
        module, weight, x = build(name)
        parameter, expected = getattr(module, weight), run(module, x)
        keys = set(vars(module))
        dn.drop_connect(module, weight, 0.5)
        run(module, x)
        dn.remove_drop_connect(module, weight)
        assert getattr(module, weight) is parameter
        assert torch.equal(run(module, x), expected)
        assert set(vars(module)) == keys
        assert not module._forward_hooks
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks
        assert type(module) is type(build(name)[0])

    def test_a_sequence_meets_one_mask_at_all_steps(self) -> None:
        layer = dn.drop_connect(nn.Linear(4, 3, bias=False), "weight", 0.5)
        out = layer(torch.ones(7, 4))
        assert torch.equal(out, out[:1].expand_as(out))
        cell = dn.drop_connect(nn.RNN(1, 1, bias=False), "weight_hh_l0", 0.5, seed=1)
        with torch.no_grad():
            cell.weight_ih_l0.fill_(0)
            cell.parametrizations.weight_hh_l0.original.fill_(0.5)
        # h_t = tanh(w z h_{t-1}): zero for ever, or never.
        outs = [cell(torch.zeros(5, 1), torch.ones(1, 1))[0] for _ in range(20)]
        assert {bool((out == 0).all()) or bool((out != 0).all()) for out in outs} == {True}

    def test_the_mean_output_is_that_without_dropout(self) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        x, n = torch.randn(1, 3, dtype=torch.float64), 20_000
        expected = layer(x)[0].detach()
        # Var of Σ_a W_ia x_a z_ia/μ = λ Σ_a W_ia² x_a².
        variance = (layer.weight.detach() ** 2) @ (x[0] ** 2) * masks.relative_variance(0.3)
        dn.drop_connect(layer, "weight", 0.3, per_example=True, seed=4)
        out = layer(x.expand(n, 3)).detach()
        assert_within(out.mean(0) - expected, variance, n)


class TestPerExample:
    @pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (6, 2, 5, 4)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_each_example_has_its_mask(self, shape: tuple[int, ...], bias: bool) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3, bias=bias)
        dn.drop_connect(layer, "weight", 0.5, per_example=True, seed=2)
        twin, x = copy.deepcopy(layer), torch.randn(shape)
        coins = twin.parametrizations.weight[0]
        weights = coins.mask(layer.weight.expand(6, 3, 4))
        expected = torch.stack(
            [F.linear(one, weight, layer.bias) for one, weight in zip(x, weights, strict=True)]
        )
        torch.testing.assert_close(layer(x), expected)
        assert not torch.equal(weights[0], weights[1])

    def test_one_example_without_a_batch_axis(self) -> None:
        layer = dn.drop_connect(nn.Linear(4, 3), "weight", 0.5, per_example=True)
        assert layer(torch.ones(4)).shape == (3,)

    def test_eval_and_removal(self) -> None:
        layer, x = nn.Linear(4, 3), torch.randn(5, 4)
        expected = layer(x)
        dn.drop_connect(layer, "weight", 0.5, per_example=True)
        assert torch.equal(layer.eval()(x), expected)
        dn.remove_drop_connect(layer)
        assert torch.equal(layer.train()(x), expected)
        assert "forward" not in vars(layer)

    def test_only_for_linear(self) -> None:
        with pytest.raises(ValueError, match=r"per_example works on the weight of nn\.Linear"):
            dn.drop_connect(nn.Conv1d(2, 2, 1), "weight", 0.5, per_example=True)
        with pytest.raises(ValueError, match="per_example works on the weight"):
            dn.drop_connect(nn.Linear(2, 2), "bias", 0.5, per_example=True)


class TestCheckpoints:
    @each_module
    def test_state_dicts_load_both_ways(self, name: str) -> None:
        plain, weight, _ = build(name)
        model = nn.Sequential(copy.deepcopy(plain))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        dn.drop_connect(model[0], weight, 0.5)
        state = model.state_dict()
        assert set(state) == {f"0.{key}" for key in plain.state_dict()}
        fresh = nn.Sequential(plain)
        fresh.load_state_dict(state, strict=True)
        torch.testing.assert_close(
            getattr(plain, weight), model[0].parametrizations[weight].original
        )
        untouched = nn.Sequential(build(name)[0])
        model.load_state_dict(untouched.state_dict(), strict=True)
        torch.testing.assert_close(
            getattr(untouched[0], weight), model[0].parametrizations[weight].original
        )

    def test_torchs_own_keys_load_too(self) -> None:
        layer = dn.drop_connect(nn.Linear(2, 2), "weight", 0.5)
        value = torch.full((2, 2), 3.0)
        layer.load_state_dict(
            {"parametrizations.weight.original": value, "bias": torch.zeros(2)}, strict=True
        )
        assert torch.equal(layer.parametrizations.weight.original, value)

    def test_a_missing_weight_is_still_missed(self) -> None:
        layer = dn.drop_connect(nn.Linear(2, 2), "weight", 0.5)
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict({"bias": torch.zeros(2)}, strict=True)

    def test_on_top_of_another_parametrization(self) -> None:
        layer = parametrizations.weight_norm(nn.Linear(2, 2))
        keys = set(layer.state_dict())
        dn.drop_connect(layer, "weight", 0.5)
        assert set(layer.state_dict()) == keys
        assert layer(torch.ones(3, 2)).shape == (3, 2)
        with pytest.raises(ValueError, match="has other parametrizations beside DropConnect"):
            dn.remove_drop_connect(layer)

    def test_copies_save_and_load_whole(self) -> None:
        layer = dn.drop_connect(nn.Linear(4, 4), "weight", 0.5, seed=1)
        x, twin = torch.randn(3, 4), copy.deepcopy(layer)
        assert torch.equal(layer(x), twin(x))
        twin.load_state_dict(layer.state_dict())
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        nn.Linear(4, 4).load_state_dict(torch.load(buffer, weights_only=True))


class TestContract:
    def test_everything_else_is_kept(self) -> None:
        conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=2, bias=False).double()
        calls = []
        conv.register_forward_hook(lambda *_: calls.append(1))
        x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
        expected = conv(x)
        dn.drop_connect(conv, "weight", 0.0)
        assert torch.equal(conv(x), expected)
        assert (conv.stride, conv.groups, conv.bias, conv.dilation) == ((2, 2), 2, None, (2, 2))
        assert len(calls) == 2

    def test_the_law_is_over_weights(self) -> None:
        layer = dn.drop_connect(nn.Linear(2, 2), "weight", 0.25)
        coins = layer.parametrizations.weight[0]
        assert isinstance(coins, dn.DropConnect)
        assert coins.law is None
        assert coins.weight_law == masks.Weight(0.25)
        assert "p=0.25" in repr(coins)

    def test_frozen_weights_and_modes_stay(self) -> None:
        layer = nn.Linear(2, 2).eval()
        layer.weight.requires_grad_(False)
        dn.drop_connect(layer, "weight", 0.5)
        assert not layer.parametrizations.weight.original.requires_grad
        assert not layer.parametrizations.weight[0].training

    def test_recurrent_weights_are_not_left_masked(self) -> None:
        lstm = dn.drop_connect(nn.LSTM(3, 3), "weight_hh_l0", 0.5)
        lstm(torch.ones(2, 1, 3))
        assert lstm._flat_weights[1] is lstm.parametrizations.weight_hh_l0.original
        with pytest.raises(RuntimeError):
            lstm(torch.ones(2, 1, 7))
        assert lstm._flat_weights[1] is lstm.parametrizations.weight_hh_l0.original

    def test_two_weights_of_one_module(self) -> None:
        lstm = nn.LSTM(3, 3)
        dn.drop_connect(lstm, "weight_hh_l0", 0.5)
        dn.drop_connect(lstm, "weight_ih_l0", 0.5)
        x = torch.ones(2, 1, 3)
        dn.remove_drop_connect(lstm, "weight_ih_l0")
        assert not torch.equal(lstm(x)[0], lstm(x)[0])
        dn.remove_drop_connect(lstm, "weight_hh_l0")
        assert torch.equal(lstm(x)[0], lstm(x)[0])
        assert not lstm._forward_pre_hooks

    def test_compiles_in_one_graph(self) -> None:
        torch._dynamo.reset()
        layer = dn.drop_connect(nn.Linear(4, 4), "weight", 0.5, seed=1)
        twin, x = copy.deepcopy(layer), torch.randn(3, 4)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), twin(x))

    def test_vmap_and_autocast(self) -> None:
        layer = dn.drop_connect(nn.Linear(4, 4), "weight", 0.5)
        out = torch.func.vmap(layer, randomness="different")(torch.ones(9, 2, 4))
        assert not torch.equal(out[0], out[1])
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.ones(2, 4)).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((nn.Linear(2, 2), "weigth", 0.5), ValueError, "one of .*but got 'weigth'"),
            ((nn.Linear(2, 2), "weight", 1.5), ValueError, "between 0 and 1, but got 1.5"),
            ((nn.Linear(2, 2), "weight", math.nan), ValueError, "between 0 and 1, but got nan"),
            ((nn.Linear(2, 2), "weight", "x"), TypeError, "p has to be a number"),
            ((3, "weight", 0.5), TypeError, "module has to be a torch module, but got int"),
        ],
    )
    def test_bad_input(
        self, arguments: tuple[nn.Module, str, float], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            dn.drop_connect(*arguments)

    def test_twice_is_refused(self) -> None:
        layer = dn.drop_connect(nn.Linear(2, 2), "weight", 0.5)
        with pytest.raises(ValueError, match="'weight' of ParametrizedLinear has DropConnect"):
            dn.drop_connect(layer, "weight", 0.5)

    def test_removing_what_is_not_there_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'weight' of Linear has no DropConnect"):
            dn.remove_drop_connect(nn.Linear(2, 2))

    def test_torchs_own_removal_works(self) -> None:
        lstm = dn.drop_connect(nn.LSTM(3, 3), "weight_hh_l0", 0.5)
        parametrize.remove_parametrizations(lstm, "weight_hh_l0", leave_parametrized=False)
        x = torch.ones(2, 1, 3)
        assert torch.equal(lstm(x)[0], lstm(x)[0])
        assert set(lstm.state_dict()) == set(nn.LSTM(3, 3).state_dict())
