"""Condensation layer by layer, on networks with planted orientations."""

import math

import pytest
import torch
from torch import nn

from droplens import measure
from tests.measure.test_condensation import gaussian, planted


def dense(activation, groups=3, copies=10):
    """A layer whose neurons point in `groups` directions, half of them mirrored."""
    torch.manual_seed(0)
    rows = planted(groups, copies, 6, 0.01)
    rows[::2] *= -1
    model = nn.Sequential(
        nn.Linear(5, len(rows)), activation(), nn.Dropout(0.3), nn.Linear(len(rows), 2)
    )
    model = model.double()
    model[0].weight.data, model[0].bias.data = rows[:, :5].clone(), rows[:, 5].clone()
    return model, gaussian(20, 5)


@pytest.mark.parametrize(("activation", "expected"), [(nn.ReLU, 6), (nn.Tanh, 3), (nn.Identity, 3)])
def test_planted_orientations_fold_behind_odd_activations_alone(activation, expected):
    model, x = dense(activation)
    found = measure.condensation_by_layer(model, x)
    assert list(found) == ["0.weight", "3.weight"]
    own = found["0.weight"]
    assert own.cover.orientations == expected
    assert own.signed == (activation is nn.ReLU)
    assert own.outgoing == "3"
    rows = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    amplitudes = model[3].weight.detach().norm(dim=0) * rows.norm(dim=1)
    torch.testing.assert_close(own.picture.amplitudes, amplitudes)
    assert found["3.weight"].outgoing is None
    told = measure.condensation_by_layer(model, x, signed=True)["0.weight"]
    assert told.cover.orientations == 6


def test_without_data_amplitudes_are_the_incoming_norms():
    model, _ = dense(nn.Tanh)
    own = measure.condensation_by_layer(model)["0.weight"]
    assert own.signed
    assert own.outgoing is None
    assert own.cover.orientations == 6


def test_channels_of_a_convolution_that_are_read_after_a_flatten():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    with torch.no_grad():
        model[0].weight[1] = 2 * model[0].weight[0]
        model[0].bias[1] = 2 * model[0].bias[0]
    own = measure.condensation_by_layer(model, torch.randn(3, 1, 8, 8))["0.weight"]
    assert own.cover.labels[0] == own.cover.labels[1]
    weight = model[3].weight.detach().double().view(2, 4, 36)
    rows = torch.cat([model[0].weight.flatten(1), model[0].bias[:, None]], 1).detach().double()
    expected = weight.square().sum((0, 2)).sqrt() * rows.norm(dim=1)
    torch.testing.assert_close(own.picture.amplitudes, expected, rtol=1e-5, atol=0)


def test_attention_is_split_in_queries_keys_and_values():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2)
    attention.in_proj_weight.data[4:8] = attention.in_proj_weight.data[4:5]
    attention.in_proj_bias.data[4:8] = 0.1
    found = measure.condensation_by_layer(attention)
    assert list(found) == [
        "in_proj_weight[q]", "in_proj_weight[k]", "in_proj_weight[v]", "out_proj.weight",
    ]  # fmt: skip
    assert found["in_proj_weight[k]"].cover.orientations == 1
    assert found["in_proj_weight[q]"].cover.orientations > 1
    apart = measure.condensation_by_layer(nn.MultiheadAttention(4, 2, kdim=3, vdim=5))
    assert list(apart)[:3] == ["q_proj_weight", "k_proj_weight", "v_proj_weight"]


@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_and_transposed_layers(bias):
    model = nn.ModuleList(
        [nn.GRU(3, 4, 2, bias=bias), nn.ConvTranspose1d(4, 6, 3, groups=2, bias=bias)]
    )
    found = measure.condensation_by_layer(model)
    assert list(found) == ["0.weight_ih_l0", "0.weight_ih_l1", "1.weight"]
    rows = {own.name: own.rows for own in measure.neurons(model)}
    assert rows["0.weight_ih_l0"].shape == (12, 3 + 4 + bias)
    assert rows["1.weight"].shape == (6, 2 * 3 + bias)
    # Output channel 4 belongs to the second group: it reads input channels 2 and 3.
    weight = model[1].weight.detach()
    assert torch.equal(rows["1.weight"][4, :6], weight[2:, 1].flatten())


def test_a_scan_counts_fewer_directions_at_coarser_tolerances():
    weights = planted(4, 20, 12, 0.05)
    scan = measure.condensation_scan(weights, tolerances=[0.001, 0.05, 0.5])
    assert scan.orientations[0] > scan.orientations[1] >= scan.orientations[2] == 4
    for k, tolerance in enumerate(scan.tolerances):
        own = measure.condensation(weights, tolerance=tolerance)
        assert scan.effective_ratio[k] == own.effective_ratio
        assert scan.weighted_orientations[k] == own.weighted_orientations


def test_angles_of_two_weights_are_their_own():
    angles = torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)
    sizes = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    weights = torch.stack([angles.cos(), angles.sin()], 1) * sizes[:, None]
    picture = measure.orientation_picture(weights)
    torch.testing.assert_close(picture.angles, angles)
    torch.testing.assert_close(picture.amplitudes, sizes)
    assert picture.share == pytest.approx(1)
    folded = measure.orientation_picture(weights, signed=False)
    torch.testing.assert_close(folded.angles, angles.remainder(math.pi))


def test_the_plane_shows_the_leading_directions():
    weights = torch.zeros(30, 8, dtype=torch.float64)
    weights[:20, 5], weights[20:, 2] = 2.0, -1.0
    picture = measure.orientation_picture(weights)
    assert picture.share == pytest.approx(1)
    assert len(picture.angles.round(decimals=6).unique()) == 2
    nothing = measure.orientation_picture(torch.zeros(3, 4))
    assert nothing.share == 0
    assert torch.equal(nothing.angles, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: measure.condensation_by_layer(3), TypeError, "model has to be a torch module"),
        (lambda: measure.condensation_by_layer(nn.ReLU()), ValueError, "model has no linear, conv"),
        (
            lambda: measure.condensation_by_layer(nn.Linear(2, 2), tolerance=0),
            ValueError,
            "tolerance has to be between 0 and 1",
        ),
        (
            lambda: measure.condensation_scan(torch.eye(2), tolerances=[]),
            ValueError,
            "tolerances is empty",
        ),
        (
            lambda: measure.orientation_picture(torch.ones(3, 1)),
            ValueError,
            "weights has to have 2 to 4096 columns to be drawn, but has 1",
        ),
        (
            lambda: measure.orientation_picture(torch.eye(3), torch.ones(2)),
            ValueError,
            r"amplitudes has to have shape \(3,\)",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
