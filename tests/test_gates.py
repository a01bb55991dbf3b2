"""Gates open, masks go in their place, and the model is as it was."""

import pytest
import torch
from torch import nn

from droplens.gates import draw_masks, masks_off, masks_replaced, open_gates


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(4, 2),
    ).double()  # fmt: skip


x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_masks_off_is_the_network_without_dropout_in_either_mode(mode):
    net = network().train(mode)
    with masks_off(net):
        first, second = net(x), net(x)
    assert torch.equal(first, second)
    assert torch.equal(first, net.eval()(x))


def test_masks_off_keeps_norm_layers_in_eval():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).double().train()
    mean = net[0].running_mean.clone()
    with masks_off(net):
        assert torch.equal(net(x), net[0].eval()(x))
    assert torch.equal(net[0].running_mean, mean)


def test_a_gate_is_the_derivative_of_scaling_a_unit():
    net = network()
    opened = open_gates(net, x)
    assert [gate.name for gate in opened.gates] == ["2", "5"]
    gate = opened.gates[0].tensor
    (slope,) = torch.autograd.grad(opened.outputs[:, 0].sum(), gate)
    step = 1e-6
    scaled = {}
    for sign in (1, -1):
        factor = torch.ones(6, 5, dtype=torch.float64)
        factor[:, 3] += sign * step
        with masks_replaced(net, lambda call, h, f=factor: h * f if call.name == "2" else h):
            scaled[sign] = net(x)[:, 0]
    torch.testing.assert_close(
        slope[:, 3], (scaled[1] - scaled[-1]) / (2 * step), atol=1e-9, rtol=1e-6
    )


def test_gates_open_without_parameters_that_need_gradients_and_under_no_grad():
    net = network().requires_grad_(False)
    with torch.no_grad():
        opened = open_gates(net, x)
    slopes = torch.autograd.grad(opened.outputs.sum(), [gate.tensor for gate in opened.gates])
    assert all(bool((slope != 0).any()) for slope in slopes)


def test_in_place_layers_around_a_site_do_no_harm():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True), nn.Linear(5, 2)
    ).double()
    opened = open_gates(net, x)
    (slope,) = torch.autograd.grad(opened.outputs.sum(), opened.gates[0].tensor)
    hidden = net[0](x)
    expected = hidden * (hidden > 0) * net[3].weight.sum(0)
    torch.testing.assert_close(slope, expected)


def test_drawn_masks_follow_the_generator_and_leave_the_global_stream():
    net = network().eval()
    state = torch.get_rng_state()

    def draw(seed, names=None):
        generator = torch.Generator().manual_seed(seed)
        with masks_replaced(net, draw_masks(generator, names)):
            return net(x)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, names=()), net(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_site_that_is_off_in_train_mode_is_reported_not_opened():
    class Off(nn.Module):
        def forward(self, h):
            return nn.functional.dropout(h, 0.5, training=False)

    opened = open_gates(Off(), x)
    assert opened.gates == ()
    assert "stays off" in opened.unmeasured["dropout"]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.LSTM(3, 2).double(), TypeError, "returned a tuple of 2, but one tensor"),
        (nn.Flatten(), None, ""),
    ],
    ids=["tuple", "no dropout"],
)
def test_outputs_have_to_be_one_tensor(model, error, message):
    if error is None:
        assert open_gates(model, x).gates == ()
        return
    with pytest.raises(error, match=message):
        open_gates(model, x)
