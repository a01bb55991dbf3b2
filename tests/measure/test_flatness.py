import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from droplens import measure
from droplens.measure._directions import random_direction


def network(p=0.5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(p), nn.Linear(5, 2)
    ).double()


def examples(n=20):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(2, (n,), generator=generator)


class Bowl(nn.Module):
    """Output a·θ for fixed a: the squared loss is a quadratic bowl."""

    def __init__(self, size=4):
        super().__init__()
        self.theta = nn.Parameter(torch.arange(1.0, size + 1, dtype=torch.float64).reshape(2, -1))

    def forward(self, x):
        return x @ self.theta.flatten()


def test_a_quadratic_bowl_has_the_loss_of_its_formula():
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Bowl()
    y = x @ model.theta.detach().flatten()
    step = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    radii = (-1.0, 0.0, 0.5, 2.0)
    result = measure.flatness(model, (x, y), nn.MSELoss(), [{"theta": step}], radii)
    curvature = float((x @ step.flatten()).square().mean())
    expected = [r**2 * curvature for r in radii]
    torch.testing.assert_close(result.values[0].tolist(), expected)
    assert result.base == pytest.approx(0, abs=1e-20)
    assert result.seed is None
    assert result.filters is None
    assert result.loss[0].n == 1
    assert math.isnan(result.loss[0].standard_error)


def test_random_directions_in_a_bowl_have_the_mean_of_the_theory():
    """E L(θ + r d) = r²/n Σ_i E(x_iᵀd)²; each row of d is uniform on a sphere of its row's norm."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Bowl()
    y = x @ model.theta.detach().flatten()
    result = measure.flatness(model, (x, y), nn.MSELoss(), 2000, (1.0,), seed=0)
    weight = model.theta.detach().square().sum(1).repeat_interleave(2) / 2
    expected = float((x.square() * weight).sum(1).mean())
    z = (result.loss[0].value - expected) / result.loss[0].standard_error
    assert abs(z) < 4
    assert result.loss[0].over == "directions"
    assert result.loss[0].n == 2000


def test_rows_are_filters_and_biases_stay_put():
    model = network()
    step = random_direction(model, torch.Generator().manual_seed(0), "rows")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.testing.assert_close(step[name].norm(dim=1), parameter.detach().norm(dim=1))
        else:
            assert not step[name].any()


def test_layers_are_filters_with_their_bias():
    model = network()
    step = random_direction(model, torch.Generator().manual_seed(0), "layer")
    for layer in ("0", "4"):
        own = torch.cat([step[f"{layer}.weight"].flatten(), step[f"{layer}.bias"]])
        module = model.get_submodule(layer)
        weights = torch.cat([module.weight.detach().flatten(), module.bias.detach()])
        assert float(own.norm()) == pytest.approx(float(weights.norm()))
        assert step[f"{layer}.bias"].any()
    assert not step["1.weight"].any()


def test_convolutions_have_a_filter_per_output_channel_and_zero_rows_stay_zero():
    model = nn.Conv2d(2, 3, 3)
    with torch.no_grad():
        model.weight[1] = 0
    step = random_direction(model, torch.Generator().manual_seed(0), "rows")
    expected = model.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(step["weight"].flatten(1).norm(dim=1), expected)


@pytest.mark.parametrize("form", ["pair", "loader", "uneven batches"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_add_up(form, reduction):
    x, y = examples()
    data = {
        "pair": (x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True),
        "uneven batches": [(x[:3], y[:3]), (x[3:], y[3:])],
    }[form]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]).double(), reduction=reduction)
    model = network()
    result = measure.flatness(model, data, loss, 2, (0.0, 1.0), seed=1)
    reference = measure.flatness(model, (x, y), loss, 2, (0.0, 1.0), seed=1)
    torch.testing.assert_close(result.values, reference.values)
    with torch.no_grad():
        assert result.base == pytest.approx(float(loss(model.eval()(x), y)))


def test_the_model_is_as_before_and_dropout_is_off():
    model = network().train()
    model[1].running_mean.fill_(0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    runs = [measure.flatness(model, examples(), nn.CrossEntropyLoss(), 3, seed=4) for _ in "ab"]
    assert torch.equal(runs[0].values, runs[1].values)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(stream, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert runs[0].increase[0].value == 0
    assert runs[0].masks == "off"


def test_frozen_parameters_stay_put():
    model = network()
    model[0].weight.requires_grad_(False)
    step = random_direction(model, torch.Generator().manual_seed(0), "rows")
    assert "0.weight" not in step


def broken():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    return model


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        raise RuntimeError("my own trouble")


PAIR = examples()
CE = nn.CrossEntropyLoss()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((network(), PAIR, nn.CrossEntropyLoss), {}, TypeError, "CrossEntropyLoss, a class"),
        ((network(), PAIR, 3), {}, TypeError, "loss has to be a loss object"),
        (
            (network(), PAIR, nn.CrossEntropyLoss(reduction="none")),
            {},
            ValueError,
            "reduction 'mean' or 'sum', but got 'none'",
        ),
        ((network(), PAIR[0], CE), {}, ValueError, "data has no targets"),
        ((network(), (PAIR[0], PAIR[1] + 9), CE), {}, ValueError, "holds the label 10"),
        ((broken(), PAIR, CE), {}, ValueError, "weight '0.weight' holds NaN or Inf"),
        ((network().requires_grad_(False), PAIR, CE), {}, ValueError, "no parameters that require"),
        (("net", PAIR, CE), {}, TypeError, "model has to be a torch module"),
        ((network(), PAIR, CE, 0), {}, ValueError, "directions has to be at least 1"),
        ((network(), PAIR, CE, []), {}, ValueError, "directions is empty"),
        ((network(), PAIR, CE, 1.5), {}, TypeError, "directions has to be a number"),
        ((network(), PAIR, CE, [{"x": PAIR[0]}]), {}, ValueError, "no trainable parameter"),
        ((network(), PAIR, CE, [{"4.bias": PAIR[0]}]), {}, ValueError, r"to have shape \(2,\)"),
        ((network(), PAIR, CE, 1, ()), {}, ValueError, "radii is empty"),
        ((network(), PAIR, CE, 1, (math.nan,)), {}, ValueError, "radii has to be finite"),
        ((network(), PAIR, CE), {"filters": "neuron"}, ValueError, "filters has to be 'rows'"),
        ((Raises(), PAIR, CE), {}, RuntimeError, "my own trouble"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        measure.flatness(*arguments, **options)
